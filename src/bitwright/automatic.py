"""The data-driven choice of methods, and its rival: what was tried and chosen, and plain GPTQ for the same job.

`chooser` chooses; the choice is kept only where its divergence on the gate text is not above GPTQ's.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.evaluation.streamed import compare_heads
from bitwright.methods.solvers import AUTO
from bitwright.model.activations import Activations
from bitwright.preparation import Job
from bitwright.recipe import Plan
from bitwright.runs import RunDirectory
from bitwright.walk import FISHER, GUIDED, Walk

BASELINE = "gptq"
CHOICE = "auto.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate on one block.

    Attributes:
        block: name of the block.
        composition: as a recipe's method reads.
        solvers: where single groups have another solver: leader of the group -> solver.
        error: squared distance of the block's output, behind quantized blocks, from the unquantized model's, relative
            to what the block adds.
        refused: why it could not be tried.
    """

    block: str
    composition: str
    solvers: dict[str, str]
    error: float | None
    refused: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        transforms: of the whole recipe.
        solvers: site -> solver and the reason.
        trials: everything that was tried.
    """

    transforms: tuple[str, ...]
    solvers: dict[str, tuple[str, str]]
    trials: tuple[Trial, ...]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Choice":
        """Rebuild what `asdict` and JSON made."""
        return Choice(
            transforms=tuple(data["transforms"]),
            solvers={site: (pair[0], pair[1]) for site, pair in data["solvers"].items()},
            trials=tuple(Trial(**trial) for trial in data["trials"]),
        )


def is_automatic(plan: Plan) -> bool:
    """Whether a plan leaves the choice of some site's method to the data."""
    return any(entry.method == AUTO for entry in plan.sites.values())


def trials(work: Path) -> tuple[Trial, ...]:
    """Return what was tried in a run, from its work folder; nothing where nothing was left to the data."""
    choice = known(work)
    return () if choice is None else choice.trials


def known(work: Path) -> Choice | None:
    """Return what a run has chosen, from its work folder; None while it has not."""
    file = work / CHOICE
    return Choice.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def work_beside(work: Path, folder: Path) -> RunDirectory:
    """Make a run directory inside a run's work folder, with what was measured for the whole run."""
    run = RunDirectory(folder)
    for place in (run.model, run.work):
        place.mkdir(parents=True, exist_ok=True)
    for name in (FISHER, GUIDED):
        if (work / name).exists() and not (run.work / name).exists():
            os.link(work / name, run.work / name)
    return run


def baseline_job(job: Job) -> Job:
    """Return the same job with GPTQ, and no transforms, where the choice was left to the data."""
    reason = f"auto kept {BASELINE}: nothing that it chose was better on the gate text"
    sites = {
        name: replace(entry, method=BASELINE, reason=reason) if entry.method == AUTO else entry
        for name, entry in job.plan.sites.items()
    }
    return replace(job, recipe=replace(job.recipe, method=BASELINE, transforms=()), plan=Plan(sites=sites))


def gate_loss(job: Job, walk: Walk, gate: Activations, reference: Activations) -> float:
    """Mean KL divergence in nats per token of a finished walk on the gate text."""
    loss = compare_heads(walk.model, gate, job.gate, job.model, reference).kl_mean
    assert loss is not None
    return loss


def adopt(baseline: RunDirectory, run: RunDirectory) -> None:
    """Put the shards and block records of a finished baseline in the place of the run's own."""
    for folder, target, pattern in (
        (baseline.model, run.model, "*.safetensors"),
        (baseline.work, run.work, "block-*.json"),
        (baseline.work, run.work, "stats-*.safetensors"),
    ):
        for file in sorted(folder.glob(pattern)):
            file.replace(target / file.name)
