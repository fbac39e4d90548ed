"""One scheme for all, where it may beat a mix: sums of scores misjudge both, and a mix should not lose."""

from collections.abc import Iterator, Sequence

from bitwright.search.allocate import Allocation, Item, Limits, allocation_of

MAX_RIVALS = 3
MISJUDGED = 2.0
"""By how much a sum may exceed the measured loss: rivals whose sums are above a limit times this are left out."""


def faithful_rivals(items: Sequence[Item], limits: Limits) -> list[Allocation]:
    """Return the uniform allocations that keep limits on costs, the most faithful by their sums first.

    Args:
        items: as for `allocate`; those without a choice keep their one scheme.
        limits: which rivals must keep.
    """
    kept = [each for each in _uniform(items) if limits.hold(list(each.chosen.values()))]
    return sorted(kept, key=lambda each: each.loss)[:MAX_RIVALS]


def small_rivals(items: Sequence[Item], max_loss: float) -> list[Allocation]:
    """Return the smallest uniform allocations that may keep a limit on the loss, the smallest first."""
    near = [each for each in _uniform(items) if each.loss <= MISJUDGED * max_loss]
    return sorted(near, key=lambda each: each.size_bytes)[:MAX_RIVALS]


def _uniform(items: Sequence[Item]) -> Iterator[Allocation]:
    """One scheme for all items that have a choice; 16 bit for all is no rival."""
    free = [{choice.scheme for choice in item.choices} - {None} for item in items if len(item.choices) > 1]
    for scheme in sorted(set.intersection(*free), key=str) if free else ():
        chosen = [next((c for c in item.choices if c.scheme == scheme), item.choices[0]) for item in items]
        yield allocation_of(items, chosen)
