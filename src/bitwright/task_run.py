"""The verb of `bitwright tasks`: answer the questions of files, or lm-evaluation-harness's, also beside a reference."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import CheckpointError, RecipeError
from bitwright.evaluation.flips import Flips, compare_answers
from bitwright.evaluation.lm_eval_tasks import LmEvalScore, compare_lm_eval, lm_eval_scores, require_lm_eval
from bitwright.evaluation.question_tokens import EncodedQuestion, encode_task
from bitwright.evaluation.questions import Task, read_task
from bitwright.evaluation.tasks import TaskScore, task_score
from bitwright.exporters.reload import load
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import LONGEST_DEFAULT_WINDOW
from bitwright.preparation import load_tokenizer, max_length, open_model
from bitwright.progress import Progress, no_progress
from bitwright.records import append_jsonl
from bitwright.runs import RUN_FILE, model_directory, open_run, quantized_run

LM_EVAL_BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """A model's score on the questions of a file and, with a reference, what changed.

    Attributes:
        task: the questions.
        score: the model's.
        reference: the reference's.
        flips: answers by log-likelihood against the reference's.
        flips_normalised: answers by log-likelihood per character; None for last words.
    """

    task: Task
    score: TaskScore
    reference: TaskScore | None = None
    flips: Flips | None = None
    flips_normalised: Flips | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the single answers, as plain data."""
        return {
            "task": self.task.source,
            "layout": self.task.layout,
            "num_questions": len(self.task.questions),
            "data_hash": self.task.data_hash,
            **_without_answers(self.score),
            "reference": None if self.reference is None else _without_answers(self.reference),
            "flips": None if self.flips is None else asdict(self.flips),
            "flips_normalised": None if self.flips_normalised is None else asdict(self.flips_normalised),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LmEvalResult:
    """One metric of a task of lm-evaluation-harness and, with a reference, what changed."""

    score: LmEvalScore
    reference: LmEvalScore | None = None
    flips: Flips | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the single questions, as plain data."""
        return {
            **_without_questions(self.score),
            "reference": None if self.reference is None else _without_questions(self.reference),
            "flips": None if self.flips is None else asdict(self.flips),
        }


def run_tasks(
    target: str | Path,
    files: Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> list[TaskResult]:
    """Answer the questions of files, with one decoder block in memory at a time; a run directory records the results.

    Args:
        target: model directory, hub id or run directory.
        files: JSON lines, see `questions`.
        reference: a model whose answers are compared; of the same tokenizer where words are predicted.
        limit: only the first questions of each file.
        device: where blocks are computed.
        dtype: compute type of activations.
        progress: called with (what, done, total).
    Raises:
        BitwrightError: see `errors`; files are read before models.
    """
    tasks = [read_task(file, limit=limit) for file in files]
    opened = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    model = open_model(model_directory(target), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    other = None
    if reference is not None:
        other = open_model(model_directory(reference), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    asked = [_encoded(model, task, trust_remote_code) for task in tasks]
    asked_other = [[] if other is None else _encoded(other, task, trust_remote_code) for task in tasks]
    for task, ours, theirs in zip(tasks, asked, asked_other, strict=True):
        if other is not None and task.is_last_word and ours != theirs:
            raise CheckpointError(
                f"{reference}: makes other tokens of {task.source} than {target}. "
                "Give a reference with the same tokenizer; without it only options can be compared."
            )
    results: list[TaskResult] = []
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        for task, ours, theirs in zip(tasks, asked, asked_other, strict=True):
            name = Path(task.source).stem
            score = task_score(model, ours, Path(work), progress, label=name)
            expected = None
            if other is not None:
                expected = task_score(other, theirs, Path(work), progress, label=f"{name}, reference")
            results.append(_result(task, score, expected))
    asks = {"model": str(target), "reference": None if reference is None else str(reference), "limit": limit}
    _record(target, [{"kind": "tasks", **asks, **opened, **result.to_json()} for result in results])
    return results


def run_lm_eval(
    target: str | Path,
    tasks: Sequence[str],
    *,
    reference: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    quiet: bool = True,
) -> list[LmEvalResult]:
    """Run tasks of lm-evaluation-harness on a model held whole, in the dtype that it says.

    Args:
        target: model directory, hub id or run directory; a run directory records the results.
        tasks: the harness's names.
        reference: a model that the same questions are put to.
        limit: only the first questions of each task.
        num_fewshot: examples before each question; what the task says unless given.
        include_path: a folder with further tasks.
        device: where.
        quiet: hide the harness's progress bars.
    Raises:
        BitwrightError: see `errors`.
    """
    if not tasks:
        raise RecipeError("--lm-eval: names no task. Give one, such as arc_easy.")
    require_lm_eval(tasks)
    found = [
        _lm_eval(source, tasks, limit, num_fewshot, include_path, device, trust_remote_code, quiet)
        for source in (target, *(() if reference is None else (reference,)))
    ]
    scores, others = found[0], found[1] if reference is not None else []
    matching = {(score.task, score.metric): score for score in others}
    results = [
        LmEvalResult(score=score, reference=matching.get((score.task, score.metric)), flips=flips)
        for score, flips in zip(scores, compare_lm_eval(scores, others), strict=True)
    ]
    asks = {"model": str(target), "reference": None if reference is None else str(reference), "limit": limit}
    _record(target, [{"kind": "lm-eval", **asks, "device": device, **result.to_json()} for result in results])
    return results


def _encoded(model: StreamedModel, task: Task, trust_remote_code: bool) -> list[EncodedQuestion]:
    tokenizer = load_tokenizer(model.skeleton.checkpoint, trust_remote_code=trust_remote_code)
    return encode_task(tokenizer, task, max_length=max_length(model) or LONGEST_DEFAULT_WINDOW)


def _result(task: Task, score: TaskScore, reference: TaskScore | None) -> TaskResult:
    if reference is None:
        return TaskResult(task=task, score=score)
    ours, theirs = score.per_question, reference.per_question
    return TaskResult(
        task=task,
        score=score,
        reference=reference,
        flips=compare_answers(ours, theirs),
        flips_normalised=None if task.is_last_word else compare_answers(ours, theirs, normalised=True),
    )


def _lm_eval(
    source: str | Path,
    tasks: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
) -> list[LmEvalScore]:
    checkpoint = open_checkpoint(model_directory(source))
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    gc.collect()  # the model before this one
    return lm_eval_scores(
        load(checkpoint.path, trust_remote_code=trust_remote_code).to(device),
        tokenizer,
        tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=1 if checkpoint.quantizes_inputs else LM_EVAL_BATCH,
        include_path=include_path,
        quiet=quiet,
    )


def _without_answers(score: TaskScore) -> dict[str, Any]:
    return {key: value for key, value in asdict(score).items() if key != "per_question"}


def _without_questions(score: LmEvalScore) -> dict[str, Any]:
    return {key: value for key, value in asdict(score).items() if key != "per_question"}


def _record(target: str | Path, records: list[dict[str, Any]]) -> None:
    """Add to the records of a run; a model directory has none."""
    if (Path(target) / RUN_FILE).is_file():
        append_jsonl(open_run(quantized_run(Path(target))).records, *records)
