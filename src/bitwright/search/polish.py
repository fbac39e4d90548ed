"""Improve an allocation by measuring: an evolution that switches schemes between items and keeps what is better.

`allocate` minimises a sum of losses that were measured one at a time. Errors of different sites add up otherwise, so
the best sum is not quite the best model. From its answer on, each round makes a few offspring, in which some items give
up bits and others gain them within the limits, measures them, and keeps the best of parent and offspring: (1 + λ).

Each measured assignment is written to a file, so that a run that was killed continues where it stopped.

Reference:
    EvoPress, arXiv:2410.14649: level switches that keep the budget, (1 + λ) selection. Differs: limits may be several
    and need only hold, every survivor is measured on the same data, and there is no selection in stages.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import RecipeError
from bitwright.progress import Progress, no_progress
from bitwright.search.allocate import Allocation, Choice, Item, Limits, allocation_of
from bitwright.search.meter import Assignment, Meter

_MAX_SWITCHES = 3
_TRIES_PER_OFFSPRING = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Polished:
    """What `polish` found.

    Attributes:
        allocation: the best that was measured.
        measured_loss: of it.
        start_loss: measured on the allocation that it began from.
        num_measured: assignments measured in all, earlier runs of the same file included.
        losses: best measured loss after each round.
    """

    allocation: Allocation
    measured_loss: float
    start_loss: float
    num_measured: int
    losses: tuple[float, ...]


def polish(
    allocation: Allocation,
    items: Sequence[Item],
    measure: Callable[[Assignment], float],
    *,
    limits: Limits,
    offspring: int = 8,
    rounds: int = 20,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> Polished:
    """Return the best allocation found; never one that was measured as worse than the first.

    Args:
        allocation: where to begin; it must keep the limits.
        items: as for `allocate`.
        measure: loss of an assignment, site -> scheme's name; must give the same for the same.
        limits: what the sums over all items may not exceed.
        offspring: tried per round.
        rounds: how many.
        seed: of all choices.
        cache: JSON lines of what was measured; read first if it exists. One file per model, data and measure.
        progress: called with (what, done, total).
    Raises:
        RecipeError: the allocation does not keep the limits or is not one of these items.
    """
    parent = _genes(allocation, items)
    if not limits.hold(_choices(items, parent)):
        raise RecipeError("polish: the allocation it begins from does not keep the limits. Allocate with these limits.")
    meter = Meter(measure, cache)
    generator, survivor = random.Random(seed), parent
    best = start = meter.loss(_schemes(items, parent))
    history: list[float] = []
    for number in range(rounds):
        for child in _offspring(items, parent, limits, generator, offspring):
            loss = meter.loss(_schemes(items, child))
            if loss < best:
                best, survivor = loss, child
        parent = survivor
        history.append(best)
        progress("polish", number + 1, rounds)
    return Polished(
        allocation=allocation_of(items, _choices(items, parent)),
        measured_loss=best,
        start_loss=start,
        num_measured=len(meter.known),
        losses=tuple(history),
    )


_Genes = tuple[int, ...]
"""Place of the chosen among each item's choices."""


def _offspring(
    items: Sequence[Item], parent: _Genes, limits: Limits, generator: random.Random, count: int
) -> list[_Genes]:
    """Distinct allocations near the parent that keep the limits; fewer than asked where there are no more."""
    found: list[_Genes] = []
    free = [index for index, item in enumerate(items) if len(item.choices) > 1]
    for _ in range(_TRIES_PER_OFFSPRING * count if free else 0):
        child = _mutate(items, parent, free, generator)
        if child != parent and child not in found and limits.hold(_choices(items, child)):
            found.append(child)
            if len(found) == count:
                break
    return found


def _mutate(items: Sequence[Item], parent: _Genes, free: Sequence[int], generator: random.Random) -> _Genes:
    """Give some items one level more and as many others one level less, in the order of their sizes.

    A lone change happens too: it uses room that the limits leave, or trades a level for another of the same size.
    """
    child = list(parent)
    switches = generator.randint(1, _MAX_SWITCHES)
    moved = generator.sample(free, min(2 * switches, len(free)))
    if generator.random() < 1 / len(free) + 0.2:
        moved = moved[:1]
    for place, index in enumerate(moved):
        levels = sorted(range(len(items[index].choices)), key=lambda level: items[index].choices[level].size_bytes)
        up = place % 2 == 0 if len(moved) > 1 else generator.random() < 0.5
        position = levels.index(child[index]) + (1 if up else -1)
        child[index] = levels[min(max(position, 0), len(levels) - 1)]
    return tuple(child)


def _genes(allocation: Allocation, items: Sequence[Item]) -> _Genes:
    try:
        return tuple(item.choices.index(allocation.chosen[item.name]) for item in items)
    except (KeyError, ValueError):
        raise RecipeError("polish: the allocation is not one of these items. Allocate them first.") from None


def _schemes(items: Sequence[Item], genes: _Genes) -> Assignment:
    return allocation_of(items, _choices(items, genes)).schemes


def _choices(items: Sequence[Item], genes: _Genes) -> list[Choice]:
    return [item.choices[gene] for item, gene in zip(items, genes, strict=True)]
