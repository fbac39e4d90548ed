"""What accuracy hides: questions that quantized models answer otherwise than their original, right or wrong.

    python benchmarks/tasks.py [--model DIR] [--file JSONL ...] [--questions 400] [--out benchmarks/results]

Without --file the questions are made from the held-out part of the standard library's sources, which neither the demo
model's training nor calibration has seen: the last word of a passage that names it before, and the rest of a line among
those of three other lines. Calibration: 32 windows of 256 tokens of the part that it was trained on.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from bitwright.data.corpora import load_corpus
from bitwright.demo import demo_model
from bitwright.pipeline import quantize
from bitwright.recipe import Calibration, Recipe
from bitwright.records import Environment, write_json_atomic, write_text_atomic
from bitwright.schemes import Scheme
from bitwright.task_run import TaskResult, run_tasks

ROOT = Path(__file__).resolve().parents[1]
CELLS = (
    ("W8A16-channel", "rtn"), ("W4A16-g128", "rtn"), ("W4A16-g128", "gptq"), ("W3A16-g128", "rtn"),
    ("W3A16-g128", "gptq"), ("W2A16-g64", "gptq"),
)  # fmt: skip
CALIBRATION = Calibration(text="stdlib", num_samples=32, seqlen=256)
CONTEXT_CHARACTERS, SHORTEST_WORD, LINE_CHARACTERS = 400, 4, (12, 60)
NEVER_FAILS = 1e6
"""Gate on the KL divergence: what a scheme loses is what is asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument(
        "--file", type=Path, action="append", help="questions; made from the held-out sources if absent"
    )
    parser.add_argument("--questions", type=int, default=400, help="per task")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = given.file or make_questions(Path(folder), given.questions)
        for scheme, method in CELLS:
            run = Path(folder) / f"{scheme}-{method}"
            recipe = Recipe(scheme=Scheme.parse(scheme), method=method, calibration=CALIBRATION, max_kl=NEVER_FAILS)
            made = quantize(given.model, recipe, run)
            for result in run_tasks(run, files, reference=given.model, limit=given.questions):
                rows.append({**row_of(result), "scheme": scheme, "method": method, "kl_mean": made.results["kl_mean"]})
                print(json.dumps(rows[-1]), flush=True)
    stem = f"tasks_{given.model.name}_{date.today().isoformat()}"
    environment = Environment.capture()
    write_json_atomic(given.out / f"{stem}.json", {"environment": environment.to_mapping(), "rows": rows})
    write_text_atomic(given.out / f"{stem}.md", page(rows, given.model.name, environment))
    print(f"written: {given.out / stem}.md")


def make_questions(folder: Path, count: int) -> list[Path]:
    """Write both tasks and return their files; the same for the same sources and count."""
    documents = load_corpus("stdlib:heldout").documents
    generator = random.Random(0)
    words = list(last_words(documents))
    lines = list(line_ends(documents))
    questions = [
        [{"context": context, "continuation": word} for context, word in generator.sample(words, count)],
        [choice(generator, context, end, lines) for context, end in generator.sample(lines, count)],
    ]
    files = [folder / "last_word.jsonl", folder / "line_end.jsonl"]
    for file, entries in zip(files, questions, strict=True):
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return files


def last_words(documents: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Passages and the word after them, which is among their own words."""
    for document in documents:
        for match in re.finditer(r"(?<=[a-z,] )[A-Za-z]+\b", document):
            context = document[max(0, match.start() - CONTEXT_CHARACTERS) : match.start()].rstrip(" ")
            known = set(re.findall(r"[A-Za-z]+", context))
            if len(match[0]) >= SHORTEST_WORD and match[0] in known and len(context) > CONTEXT_CHARACTERS // 2:
                yield context, match[0]


def line_ends(documents: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Passages that end within a line, and the rest of that line."""
    shortest, longest = LINE_CHARACTERS
    for document in documents:
        for match in re.finditer(r"^[^\n]{8,40}[a-z,=(] ([^\s][^\n]*)$", document, flags=re.MULTILINE):
            context = document[max(0, match.start(1) - CONTEXT_CHARACTERS) : match.start(1)].rstrip(" ")
            if shortest <= len(match[1]) <= longest and len(context) > CONTEXT_CHARACTERS // 2:
                yield context, match[1]


def choice(generator: random.Random, context: str, end: str, lines: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A question of four options, three of them from elsewhere."""
    others = [other for _, other in generator.sample(lines, 8) if other != end][:3]
    options = [*others, end]
    generator.shuffle(options)
    return {"query": context, "choices": options, "gold": options.index(end)}


def row_of(result: TaskResult) -> dict[str, Any]:
    """What the page needs of a result."""
    assert result.reference is not None
    assert result.flips is not None
    return {
        "task": Path(result.task.source).stem,
        "num_questions": len(result.task.questions),
        "chance": result.score.chance,
        "accuracy": result.score.accuracy,
        "stderr": result.score.stderr,
        "reference": result.reference.accuracy,
        **{f"flips_{key}": value for key, value in asdict(result.flips).items()},
    }


def page(rows: list[dict[str, Any]], model: str, environment: Environment) -> str:
    """The table as Markdown."""
    lines = [
        f"# Answers of quantized {model}",
        "",
        f"{date.today().isoformat()}, {environment.cpu}, bitwright {environment.versions['bitwright']}, torch "
        f"{environment.versions['torch']}. Made by `python benchmarks/tasks.py`; accuracies in %, ± standard error, "
        "the difference's of pairs; changed, lost and gained are counts of questions; p is McNemar's.",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        chance = "" if own[0]["chance"] is None else f", chance {100 * own[0]['chance']:.0f} %"
        lines += [
            "",
            f"## {task}: {own[0]['num_questions']} questions, original {100 * own[0]['reference']:.1f} %{chance}",
        ]
        lines += ["", "| scheme | method | KL | accuracy | difference | changed | lost | gained | p |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
        lines += [line(row) for row in own]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['scheme']} | {row['method']} | {row['kl_mean']:.4f} | "
        f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} | "
        f"{100 * row['flips_difference']:+.1f} ± {100 * row['flips_stderr']:.1f} | {row['flips_num_changed']} | "
        f"{row['flips_num_lost']} | {row['flips_num_gained']} | {row['flips_mcnemar_p']:.2g} |"
    )


if __name__ == "__main__":
    main()
