"""One scheme for all, where it may beat a mix: sums of scores misjudge both, and a mix must not be the worse choice."""

from collections.abc import Iterator, Sequence

from bitwright.search.allocate import Allocation, Item, Limits, allocation_of

MAX_RIVALS = 3


def uniform_rivals(items: Sequence[Item], limits: Limits, *, below: int | None = None) -> list[Allocation]:
    """Return the uniform allocations that are worth a measurement, the most promising first.

    Args:
        items: as for `allocate`; those without a choice keep their one scheme.
        limits: which rivals must keep.
        below: bytes that they must stay below; None for any size.
    """
    rivals = [
        each
        for each in _uniform(items)
        if limits.hold(list(each.chosen.values())) and (below is None or each.size_bytes < below)
    ]
    return sorted(rivals, key=lambda each: each.loss)[:MAX_RIVALS]


def _uniform(items: Sequence[Item]) -> Iterator[Allocation]:
    free = [{choice.scheme for choice in item.choices} for item in items if len(item.choices) > 1]
    for scheme in sorted(set.intersection(*free), key=str) if free else ():
        chosen = [next((c for c in item.choices if c.scheme == scheme), item.choices[0]) for item in items]
        yield allocation_of(items, chosen)
