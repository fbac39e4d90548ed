"""Every trade that is worth making between size and loss: exact solutions at sizes from the least to the most useful.

Between two neighbours other optimal allocations may lie, as the sizes are samples; each one returned is optimal.
"""

from collections.abc import Sequence
from dataclasses import replace

from bitwright.errors import RecipeError
from bitwright.search.allocate import Allocation, Item, Limits, allocate


def frontier(items: Sequence[Item], num: int = 40, *, limits: Limits | None = None) -> list[Allocation]:
    """Return allocations from the smallest to the most faithful, none of which another beats in size and in loss.

    Args:
        items: each takes one of its choices.
        num: sizes to solve for; fewer allocations come back where several sizes have one answer.
        limits: on other resources, and on size or loss to cut the ends off.
    Raises:
        RecipeError: fewer than two sizes, or nothing keeps the limits.
    """
    if num < 2:
        raise RecipeError(f"frontier: num must be at least 2, got {num}.")
    bounds = limits or Limits()
    smallest = _smallest(items, bounds)
    best = allocate(items, objective="loss", limits=bounds)
    found = [smallest]
    span = best.size_bytes - smallest.size_bytes
    for step in range(1, num - 1):
        size = smallest.size_bytes + span * step / (num - 1)
        if found[-1].loss <= best.loss:
            break
        found.append(allocate(items, objective="loss", limits=replace(bounds, max_size_bytes=size)))
    found.append(best)
    return _undominated(found)


def _smallest(items: Sequence[Item], bounds: Limits) -> Allocation:
    """The least loss of the least size."""
    size = allocate(items, objective="size", limits=bounds).size_bytes
    return allocate(items, objective="loss", limits=replace(bounds, max_size_bytes=float(size)))


def _undominated(found: Sequence[Allocation]) -> list[Allocation]:
    kept: list[Allocation] = []
    for allocation in sorted(found, key=lambda each: (each.size_bytes, each.loss)):
        if not kept or allocation.loss < kept[-1].loss:
            kept.append(allocation)
    return kept
