"""`bitwright tasks`: accuracy on questions, and which answers a quantized model gives otherwise than its original."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import ProgressBars, print_json, wide_console
from bitwright.cli.shared_options import AsJson, Device, Quiet, RemoteCode
from bitwright.errors import RecipeError

if TYPE_CHECKING:
    from bitwright.evaluation.flips import Flips
    from bitwright.task_run import LmEvalResult, TaskResult

PIPE_WIDTH = 160
FLIPS_CAPTION = (
    "difference ± its standard error by pairs; changed: answers that differ; lost, gained: right ones that became "
    "wrong, wrong ones that became right; p: McNemar's, that chance alone splits them so"
)


def tasks(
    target: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="Model directory, hub id or run directory.")],
    file: Annotated[list[str] | None, typer.Option(help="JSONL of questions (docs/tasks.md); may be repeated.")] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas; may be repeated.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Also compare with the answers of this model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question; --lm-eval only.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further tasks; --lm-eval only.")] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Compute type: float32, bfloat16 or float16; --lm-eval takes the model's.")
    ] = "float32",
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Answer multiple-choice and last-word questions; with a reference, say which answers changed."""
    from bitwright.task_run import run_lm_eval, run_tasks

    names = [part.strip() for each in lm_eval or () for part in each.split(",") if part.strip()]
    if not file and not names:
        raise RecipeError("tasks: nothing to answer. Give --file QUESTIONS.jsonl or --lm-eval TASK.")
    answered: list[TaskResult] = []
    if file:
        with ProgressBars(quiet=quiet or as_json) as progress:
            answered = run_tasks(
                target,
                file,
                reference=reference,
                limit=limit,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    measured: list[LmEvalResult] = []
    if names:
        measured = run_lm_eval(
            target,
            names,
            reference=reference,
            limit=limit,
            num_fewshot=fewshot,
            include_path=include_path,
            device=device,
            trust_remote_code=trust_remote_code,
            quiet=quiet or as_json,
        )
    if as_json:
        tables = {"tasks": answered, "lm_eval": measured}
        found = {name: [result.to_json() for result in results] for name, results in tables.items()}
        print_json({"model": target, "reference_model": reference, "limit": limit, **found})
    elif not quiet:
        console = wide_console(PIPE_WIDTH)
        console.print(*result_tables(target, reference, answered, measured), highlight=False)


def result_tables(
    target: str, reference: str | None, answered: "list[TaskResult]", measured: "list[LmEvalResult]"
) -> list[Table]:
    """Scores of every task and metric and, with a reference, what changed."""
    rows = [row for result in answered for row in _file_rows(result)]
    rows += [_lm_eval_row(result) for result in measured]
    scores = _table(target, ("questions", "value", "chance", *(("reference",) if reference else ())))
    scores.caption = "± standard error over questions"
    for row in rows:
        figures = [str(row.num_questions), row.value, row.chance, row.reference]
        scores.add_row(row.task, row.metric, *(figures if reference else figures[:3]))
    if reference is None:
        return [scores]
    changes = _table(f"beside {reference}", ("difference", "changed", "lost", "gained", "p"))
    changes.caption = FLIPS_CAPTION
    for row in rows:
        if row.flips is not None:
            changes.add_row(row.task, row.metric, *_flips(row.flips))
    return [scores, changes]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One metric of one task, in words."""

    task: str
    metric: str
    num_questions: int
    value: str
    chance: str = "–"
    reference: str = "–"
    flips: "Flips | None" = None


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _file_rows(result: "TaskResult") -> list[_Row]:
    """The rows of one file: accuracy by both rules, or accuracy and perplexity of last words."""
    score, other = result.score, result.reference
    count = len(result.task.questions)
    name = Path(result.task.source).stem
    first = f"{name} ({score.num_truncated} cut to fit)" if score.num_truncated else name
    chance = "–" if score.chance is None else f"{100 * score.chance:.1f} %"
    theirs = "–" if other is None else _percent(other.accuracy, other.stderr)
    value = _percent(score.accuracy, score.stderr)
    rows = [
        _Row(
            task=first,
            metric="accuracy",
            num_questions=count,
            value=value,
            chance=chance,
            reference=theirs,
            flips=result.flips,
        )
    ]
    if score.accuracy_normalised is not None:
        value = _percent(score.accuracy_normalised, score.stderr_normalised)
        if other is not None and other.accuracy_normalised is not None:
            theirs = _percent(other.accuracy_normalised, other.stderr_normalised)
        rows.append(
            _Row(
                task=name,
                metric="accuracy per character",
                num_questions=count,
                value=value,
                chance=chance,
                reference=theirs,
                flips=result.flips_normalised,
            )
        )
    if score.word_perplexity is not None:
        value = _number(score.word_perplexity, score.word_perplexity_stderr)
        if other is not None and other.word_perplexity is not None:
            theirs = _number(other.word_perplexity, other.word_perplexity_stderr)
        rows.append(_Row(task=name, metric="word perplexity", num_questions=count, value=value, reference=theirs))
    return rows


def _lm_eval_row(result: "LmEvalResult") -> _Row:
    score, other = result.score, result.reference
    return _Row(
        task=f"{score.task}, {score.num_fewshot}-shot",
        metric=score.metric,
        num_questions=score.num_questions,
        value=_number(score.value, score.stderr),
        reference="–" if other is None else _number(other.value, other.stderr),
        flips=result.flips,
    )


def _flips(flips: "Flips") -> list[str]:
    changed = "–" if flips.num_changed is None else str(flips.num_changed)
    difference = _percent(flips.difference, flips.stderr, sign="+")
    return [difference, changed, str(flips.num_lost), str(flips.num_gained), f"{flips.mcnemar_p:.2g}"]


def _percent(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + (" %" if stderr is None else f" ± {100 * stderr:.1f} %")


def _number(value: float, stderr: float | None) -> str:
    return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")
