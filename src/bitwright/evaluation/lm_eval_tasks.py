"""Tasks of lm-evaluation-harness on a model that transformers has loaded, whole, with what each question scored.

The harness chooses data, prompts, examples and metrics; ours are its results with their standard errors, and the scores
of single questions, by which a model is compared with a reference.
"""

import difflib
import importlib
import io
import logging
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.errors import DataError, MissingDependency, UnknownName
from bitwright.evaluation.flips import Flips, compare_right

BOOTSTRAP_DRAWS = 1000
"""For the standard errors of metrics that are no means, such as perplexity."""
FEWSHOT_SEED = 1234
"""The harness's own."""
RIGHT_OR_WRONG = ({0.0}, {1.0}, {0.0, 1.0})


@dataclass(frozen=True, kw_only=True, slots=True)
class LmEvalScore:
    """One metric of one task.

    Attributes:
        task: its name.
        version: of the task, as the harness counts it.
        metric: such as `acc`, with the filter's name where there is one.
        value: what the harness reports.
        stderr: its standard error; None where the harness has none.
        num_fewshot: examples before each question.
        num_questions: that were asked.
        per_question: the question's place in the data -> what it scored; empty where that is no number.
    """

    task: str
    version: str
    metric: str
    value: float
    stderr: float | None
    num_fewshot: int
    num_questions: int
    per_question: Mapping[int, float]


def lm_eval_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
    quiet: bool = True,
) -> list[LmEvalScore]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: loaded by transformers.
        tokenizer: its own.
        tasks: names as in `lm-eval ls tasks`; groups and patterns with `*` as well.
        limit: only the first questions of each task.
        num_fewshot: examples before each question; what the task says unless given.
        batch_size: sequences at a time. 1 for models that find a scale per tensor of inputs: others would share it.
        include_path: a folder with further tasks.
        quiet: hide the harness's progress bars and messages.
    Raises:
        MissingDependency: the package lm-eval is absent.
        UnknownName: no such task.
        DataError: the data of a task cannot be loaded.
    """
    evaluator, huggingface, managing = _harness(tasks)
    with _silent(quiet):
        manager: Any = managing.TaskManager(include_path=None if include_path is None else str(include_path))
        loaded = _load(manager, tasks, num_fewshot)
        adapter = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results: Any = evaluator.evaluate(
            lm=adapter, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=True
        )
    return [
        score
        for task, figures in results["results"].items()
        if task in results["samples"]
        for score in _scores_of(task, figures, results)
    ]


def require_lm_eval(tasks: Sequence[str]) -> None:
    """Raises MissingDependency where the harness is not installed."""
    _harness(tasks)


def compare_lm_eval(scores: Sequence[LmEvalScore], reference: Sequence[LmEvalScore]) -> list[Flips | None]:
    """Compare a model's scores with a reference's, metric by metric; None for metrics that are not right or wrong."""
    others = {(score.task, score.metric): score for score in reference}
    found: list[Flips | None] = []
    for score in scores:
        other = others.get((score.task, score.metric))
        both = sorted(score.per_question.keys() & other.per_question.keys()) if other is not None else []
        if other is None or not both or not _is_right_or_wrong(score) or not _is_right_or_wrong(other):
            found.append(None)
            continue
        found.append(compare_right([(bool(score.per_question[i]), bool(other.per_question[i])) for i in both]))
    return found


def _is_right_or_wrong(score: LmEvalScore) -> bool:
    return set(score.per_question.values()) in RIGHT_OR_WRONG


def _harness(tasks: Sequence[str]) -> tuple[Any, Any, Any]:
    names = ("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks")
    try:
        evaluator, huggingface, managing = (importlib.import_module(name) for name in names)
    except ImportError as error:
        raise MissingDependency(
            f"--lm-eval {','.join(tasks)}: needs the package lm-eval ({error}). Run pip install 'bitwright[lm-eval]'."
        ) from None
    return evaluator, huggingface, managing


def _load(manager: Any, tasks: Sequence[str], num_fewshot: int | None) -> Any:
    """Load the tasks' data, and set what the harness's own command would set."""
    names: list[str] = []
    for wanted in tasks:
        matching = manager.match_tasks([wanted])
        if not matching:
            close = difflib.get_close_matches(wanted, manager.all_tasks, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise UnknownName(f"--lm-eval: unknown task '{wanted}'.{hint} lm-eval ls tasks lists them all.")
        names += matching
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"--lm-eval {','.join(tasks)}: data cannot be loaded ({reason}). Check the network, or give --file."
        ) from None
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _scores_of(task: str, figures: Mapping[str, Any], results: Mapping[str, Any]) -> list[LmEvalScore]:
    """Every metric of a task; the harness calls them `metric,filter` and their errors `metric_stderr,filter`."""
    scores: list[LmEvalScore] = []
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = figures.get(f"{metric}_stderr,{filtered}")
        samples = [each for each in results["samples"][task] if each["filter"] == filtered]
        numbers = {each["doc_id"]: each.get(metric) for each in samples}
        usable = all(isinstance(number, (bool, int, float)) for number in numbers.values())
        scores.append(
            LmEvalScore(
                task=task,
                version=str(results["versions"].get(task, "")),
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                num_fewshot=int(results["n-shot"].get(task, 0)),
                num_questions=int(results["n-samples"][task]["effective"]),
                per_question={place: float(number) for place, number in numbers.items()} if usable else {},
            )
        )
    return scores


@contextmanager
def _silent(quiet: bool) -> Generator[None, None, None]:
    """Keep what the harness prints off stdout, which is for results; if quiet, hide it, and messages below errors."""
    previous = logging.root.manager.disable
    if quiet:
        logging.disable(logging.WARNING)
    place = io.StringIO() if quiet else sys.stderr
    try:
        with redirect_stdout(place), redirect_stderr(place):
            yield
    finally:
        logging.disable(previous)
