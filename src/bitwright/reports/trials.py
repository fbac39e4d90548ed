"""What method auto tried on which block, what each trial left of error, and what was chosen where and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitwright.reports import wording
from bitwright.reports.charts import role
from bitwright.reports.entries import Figure, is_finite
from bitwright.reports.facts import Facts
from bitwright.reports.findings import TrialFact

REASON = "auto"
"""How the reason of a choice that auto made begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One composition over the blocks it was tried on.

    Attributes:
        errors: per block of `Trials.blocks`; None where it was not tried, or could not be.
        mean: over the blocks, where all are known.
        best: no other has a lower mean.
        refused: why it could not be tried; empty if it could.
    """

    composition: str
    errors: tuple[Figure, ...]
    mean: Figure
    best: bool
    refused: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """Another solver for one group, on one block.

    Attributes:
        change: which sites had which solver.
        before: the lowest error on this block until then.
        kept: this one is lower.
    """

    block: str
    composition: str
    change: str
    error: Figure
    before: Figure
    kept: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Trials:
    """Everything that was tried.

    Attributes:
        blocks: on which, in their order.
    """

    blocks: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    refinements: tuple[Refinement, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The methods that the sites got: a row of `methods` per role, with an entry per block."""

    blocks: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]


def trials(facts: Facts) -> Trials | None:
    """Arrange the trials; None where nothing was left to the data."""
    found = facts.findings.trials
    if not found:
        return None
    tried = {trial.block for trial in found if trial.block}
    blocks = tuple(block.block for block in facts.blocks if block.block in tried)
    blocks += tuple(dict.fromkeys(trial.block for trial in found if trial.block and trial.block not in blocks))
    return Trials(blocks=blocks, candidates=_candidates(found, blocks), refinements=tuple(_refinements(found)))


def summary(found: Trials) -> str:
    """What was tried and what did best, in words."""
    named = [candidate for candidate in found.candidates if not candidate.refused]
    text = (
        f"{wording.things(len(named), 'composition')} were tried on {wording.things(len(found.blocks), 'block')}, "
        "judged by the error of the block's output on calibration windows that the trial had not seen."
    )
    best = next((candidate for candidate in named if candidate.best), None)
    if best is not None:
        text += f" {best.composition} left the least error, {wording.number(best.mean)} on average."
    kept = sum(refinement.kept for refinement in found.refinements)
    if found.refinements:
        text += (
            f" Then single groups tried other solvers: {wording.things(len(found.refinements), 'trial')}, of which "
            f"{wording.count(kept)} lowered the error and {'was' if kept == 1 else 'were'} kept."
        )
    return text


def chosen(facts: Facts) -> Chosen:
    """The methods of all sites by role and block."""
    blocks = tuple(dict.fromkeys(site.block for site in facts.sites))
    cells: dict[str, dict[str, dict[str, None]]] = {}
    for site in facts.sites:
        cells.setdefault(role(site.site), {}).setdefault(site.block, {})[site.method] = None
    methods = {
        kind: tuple(", ".join(by_block.get(block, {})) or wording.ABSENT for block in blocks)
        for kind, by_block in cells.items()
    }
    return Chosen(blocks=blocks, methods=methods)


def _candidates(found: Sequence[TrialFact], blocks: Sequence[str]) -> tuple[Candidate, ...]:
    errors: dict[str, dict[str, Figure]] = {}
    refused: dict[str, str] = {}
    for trial in found:
        if trial.refused:
            refused.setdefault(trial.composition, trial.refused)
        if not trial.solvers:
            errors.setdefault(trial.composition, {}).setdefault(trial.block, trial.error)
    means = {name: _mean([by_block.get(block) for block in blocks]) for name, by_block in errors.items()}
    lowest = min((mean for mean in means.values() if mean is not None), default=None)
    rows = [
        Candidate(
            composition=name, errors=tuple(by_block.get(block) for block in blocks), mean=means[name],
            best=means[name] is not None and means[name] == lowest, refused=refused.get(name, ""),
        )
        for name, by_block in errors.items()
    ]  # fmt: skip
    return tuple(sorted(rows, key=lambda row: (bool(row.refused), row.mean is None, row.mean or 0.0)))


def _mean(values: Sequence[Figure]) -> Figure:
    known = [value for value in values if value is not None and is_finite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _refinements(found: Sequence[TrialFact]) -> list[Refinement]:
    """In the order of the trials; what a block has kept so far is part of each later trial on it."""
    lowest: dict[tuple[str, str], float] = {}
    rows: list[Refinement] = []
    for trial in found:
        place = trial.block, trial.composition
        before = lowest.get(place)
        is_lower = trial.error is not None and is_finite(trial.error) and (before is None or trial.error < before)
        if trial.solvers:
            rows.append(
                Refinement(
                    block=trial.block, composition=trial.composition, change=_change(trial), error=trial.error,
                    before=before, kept=is_lower,
                )
            )  # fmt: skip
        if is_lower and trial.error is not None:
            lowest[place] = trial.error
    return rows


def _change(trial: TrialFact) -> str:
    """`gptq in q_proj, k_proj; rtn in o_proj`."""
    by_solver: dict[str, dict[str, None]] = {}
    for site, solver in trial.solvers.items():
        by_solver.setdefault(solver, {})[role(site)] = None
    return "; ".join(f"{solver} in {', '.join(roles)}" for solver, roles in by_solver.items())
