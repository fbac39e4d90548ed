"""`bitwright tasks`: a run beside its original, what is recorded, printed and refused."""

import json
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from bitwright.cli.tasks_command import tasks as command
from bitwright.errors import CheckpointError, RecipeError
from bitwright.pipeline import quantize
from bitwright.recipe import Calibration, Recipe
from bitwright.records import read_jsonl
from bitwright.schemes import Scheme
from bitwright.task_run import run_lm_eval, run_tasks

app = typer.Typer()
app.command()(command)


@pytest.fixture(scope="module")
def files(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    words = tiny_text.split()
    folder = tmp_path_factory.mktemp("tasks")
    entries = [
        {"query": " ".join(words[9 * i : 9 * i + 6]), "choices": words[5 * i : 5 * i + 4], "gold": i % 4}
        for i in range(8)
    ]
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (folder / "words.jsonl").write_text("\n".join(json.dumps({"text": " ".join(words[i : i + 6])}) for i in range(8)))
    return [folder / "choices.jsonl", folder / "words.jsonl"]


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(tiny_text)
    calibration = Calibration(text=str(folder / "text.txt"), num_samples=2, seqlen=32)
    recipe = Recipe(scheme=Scheme.parse("W2A16-g32"), method="rtn", calibration=calibration, max_kl=1e6)
    return quantize(tiny_llama_dir, recipe, folder / "run").run


def test_a_model_beside_itself_changes_no_answer(tiny_llama_dir: Path, files: list[Path]) -> None:
    for result in run_tasks(tiny_llama_dir, files, reference=tiny_llama_dir):
        assert result.score == result.reference
        assert result.flips is not None
        assert (result.flips.num_changed, result.flips.difference, result.flips.mcnemar_p) == (0, 0, 1)


def test_a_run_records_what_its_model_scored(run: Path, tiny_llama_dir: Path, files: list[Path]) -> None:
    found = run_tasks(run, files, reference=tiny_llama_dir, limit=5)
    assert [len(result.task.questions) for result in found] == [5, 5]
    assert found[0].score.per_question == run_tasks(run / "4-model", files[:1], limit=5)[0].score.per_question
    assert found[0].score.per_question != run_tasks(tiny_llama_dir, files[:1], limit=5)[0].score.per_question
    records = [record for record in read_jsonl(run / "5-records.jsonl") if record["kind"] == "tasks"]
    assert [record["task"] for record in records] == [str(file) for file in files]
    assert records[0]["accuracy"] == found[0].score.accuracy
    assert (records[0]["limit"], records[0]["model"]) == (5, str(run))


def test_words_are_compared_between_the_same_tokens_only(
    tiny_llama_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, files: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    described = json.loads((other / "tokenizer.json").read_text())
    described["model"]["merges"] = described["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="same tokenizer"):
        run_tasks(tiny_llama_dir, files[1:], reference=other)
    assert run_tasks(tiny_llama_dir, files[:1], reference=other)[0].flips is not None


def test_the_command_prints_tables_or_json(tiny_llama_dir: Path, files: list[Path]) -> None:
    options = [str(tiny_llama_dir), "--file", str(files[0]), "--file", str(files[1]), "--limit", "3"]
    printed = CliRunner().invoke(app, [*options, "--reference", str(tiny_llama_dir)])
    assert printed.exit_code == 0, printed.output
    for words in ("accuracy per character", "word perplexity", "25.0 %", "lost", "gained", "McNemar"):
        assert words in printed.output
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert [task["num_questions"] for task in found["tasks"]] == [3, 3]
    assert found["tasks"][0]["flips"] is None
    assert CliRunner().invoke(app, [*options, "--quiet"]).output == ""


def test_nothing_to_answer_is_an_error(tiny_llama_dir: Path) -> None:
    refused = CliRunner().invoke(app, [str(tiny_llama_dir)])
    assert isinstance(refused.exception, RecipeError)
    with pytest.raises(RecipeError, match="names no task"):
        run_lm_eval(tiny_llama_dir, [])
