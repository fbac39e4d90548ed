"""What every training has in common as a run: it belongs to what was asked, resumes, and leaves figures and a curve."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bitwright.errors import RecipeError, VerificationError
from bitwright.evaluation.score import Score
from bitwright.model.whole import load_whole
from bitwright.preparation import check_device
from bitwright.progress import Progress, no_progress
from bitwright.records import Environment, append_jsonl, deciding_versions
from bitwright.runs import RunDirectory
from bitwright.strict_yaml import to_plain
from bitwright.train.engine import require_packages
from bitwright.train.options import ADAMW_8BIT, TrainingOptions
from bitwright.train.packed_base import adopt_layers, is_from_bitsandbytes
from bitwright.train.processes import Processes
from bitwright.training_text import DrawnText

TRAINING, LOSSES, BASE = "training", "losses.jsonl", "0-base"
UNGATED = 1e9
"""A gate, in nats per token, for runs that are judged otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """A finished training: its run directory, headline figures, the loss of every step, and why it failed its gate."""

    run: Path
    results: dict[str, Any]
    failure: str | None

    @property
    def losses(self) -> tuple[float, ...]:
        """In nats per token, or what the objective is."""
        return tuple(self.results["losses"])


def task_identity(task: Any) -> dict[str, Any]:
    """A task as plain data, less what changes nothing in the result."""
    mapping = cast(dict[str, Any], to_plain(task))
    for name in ("save_every", "tensorboard"):
        del mapping["training"][name]
    return mapping


class AnyTask(Protocol):
    """What all trainings are told."""

    @property
    def training(self) -> TrainingOptions:
        """How long and how fast."""
        ...

    @property
    def device(self) -> str:
        """Where."""
        ...

    @property
    def gradient_bits(self) -> int | None:
        """Of gradients between processes; None for dense ones."""
        ...


def begin(out: str | Path, task: AnyTask, *, shard: bool = False) -> tuple[RunDirectory, Processes]:
    """Check, before anything is read, that a training can run here and has a place; return that and the processes.

    Args:
        out: the run directory.
        task: what is asked for.
        shard: every process keeps a share of the model.
    Raises:
        MissingDependency, RunError, ResourceError, RecipeError: why not.
    """
    require_packages(task.training)
    if shard and task.training.optimizer == ADAMW_8BIT:
        raise RecipeError("--shard: bitsandbytes does not know shares of tensors. Use --optimizer adamw.")
    run, processes = RunDirectory(Path(out)), Processes(task.device, task.gradient_bits, shard=shard)
    check_device(task.device)
    if processes.is_main:
        run.check_place()
    processes.wait()
    return run, processes


def carry_out(
    run: RunDirectory, asked: Mapping[str, Any], work: Callable[[], None], processes: Processes, *, fresh: bool
) -> TrainingResult:
    """Do the work of a run, unless it is finished, in every process; the main one alone makes the folder its own.

    Args:
        asked: plain data; all that determines the result.
        work: ends with `run.finish` in the main process.
    Returns:
        what the finished run has found.
    Raises:
        RunError: the folder belongs to another run.
        VerificationError: what the work has found is wrong; the run says so.
    """
    asked = {**asked, "processes": processes.count, "versions": deciding_versions()}
    fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    run.check(fingerprint, fresh=fresh)
    if fresh or not run.is_complete:
        processes.wait()  # until all have seen that it is not finished
        try:
            if processes.is_main:
                run.start(fingerprint, asked, fresh=fresh)
            processes.wait()
            work()
            processes.wait()
            with suppress(OSError):
                run.model.rmdir()  # empty, where the result is not a model
        except VerificationError as error:
            if processes.is_main:
                run.judge(str(error))
            raise
        finally:
            run.release()
    info = run.info
    assert info is not None
    return TrainingResult(run=run.path, results=cast(dict[str, Any], info["results"]), failure=info.get("failure"))


def worsening(before: Score, after: Score, *, text_share: float = 1.0, start: Path | None = None) -> str | None:
    """Return what to say where the loss that was trained has risen on held-out text, beyond two standard errors.

    Args:
        before: of the model that training began with.
        after: of the trained one; a score that is not finite is always worse.
        text_share: of the text's own next tokens in the loss; the rest is the divergence from a reference.
        start: where the model is that training began with, if it was kept.
    """
    # Of the two either may be infinite, which a ratio would not bear.
    rise, error = text_share * (math.log(after.perplexity) - math.log(before.perplexity)), 0.0
    figures = f"perplexity {before.perplexity:.4g} -> {after.perplexity:.4g}"
    if after.perplexity_stderr is not None:
        error = text_share * after.perplexity_stderr / after.perplexity
    if before.kl_mean is not None and after.kl_mean is not None:
        rise += (1 - text_share) * (after.kl_mean - before.kl_mean)
        error += (1 - text_share) * (after.kl_stderr or 0.0)
        figures += f", KL {before.kl_mean:.3g} -> {after.kl_mean:.3g}"
    if rise <= 2 * error:
        return None
    kept = "" if start is None else f" {start} holds what it began with."
    return (
        f"training ended worse than it began on held-out text ({figures}). Use a lower --learning-rate or more "
        f"--steps.{kept}"
    )


def read_text(text: DrawnText, run: RunDirectory, processes: Processes, progress: Progress) -> tuple[Tensor, Tensor]:
    """Return windows to train on [N, T] and to judge by [K, T]; the main process has them written, if need be."""
    if processes.is_main:
        text.read(run.path, processes.device, progress)
    processes.wait()
    return text.read(run.path, processes.device, no_progress)


def load_in_memory(model: Path, device: str, dtype: torch.dtype, *, trust_remote_code: bool) -> nn.Module:
    """Load a whole model, as training needs it."""
    adopts = is_from_bitsandbytes(model)
    loaded = load_whole(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if adopts:
        adopt_layers(loaded)
    return loaded.to(device)


def write_training_records(run: RunDirectory, results: Mapping[str, Any]) -> None:
    """Write the records of a training: the figures, then the loss of every step."""
    losses = run.work / TRAINING / LOSSES
    steps = [json.loads(line) for line in losses.read_text(encoding="utf-8").splitlines()]
    headline = {key: value for key, value in results.items() if key not in ("losses", "kind")}
    run.records.unlink(missing_ok=True)
    append_jsonl(
        run.records,
        {"kind": "environment", **asdict(Environment.capture())},
        {"kind": "training", "method": results["kind"], **headline},
        *({"kind": "training_step", **step} for step in steps),
    )
