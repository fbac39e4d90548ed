"""The rungs that repair climbs: a better method, smaller groups, more bits, a low-rank addend, 16 bit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bitwright.methods.low_rank import LOW_RANK
from bitwright.schemes import Scheme

METHODS = ("rtn", "gptq", "gptaq")
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """How an item is quantized."""

    scheme: str | None
    method: str
    low_rank: bool = False

    def __str__(self) -> str:
        addend = f"+{LOW_RANK}" if self.low_rank else ""
        return "16 bit" if self.scheme is None else f"{self.scheme} {self.method}{addend}"


def above(rung: Rung, choices: Sequence[str | None], *, with_addend: bool) -> Iterator[Rung]:
    """The rungs above one among the schemes that its sites may have, nearest first."""
    if rung.scheme is None:
        return
    if rung.method in METHODS[:-1]:
        yield replace(rung, method=METHODS[METHODS.index(rung.method) + 1])
    scheme = Scheme.parse(rung.scheme)
    for size in GROUP_SIZES:
        finer = _with_group(scheme, size)
        if finer is not None:
            yield replace(rung, scheme=finer)
    bits = scheme.weights.format.bits
    named = [name for name in choices if name is not None]
    for name in sorted(named, key=lambda name: Scheme.parse(name).weights.format.bits):
        if Scheme.parse(name).weights.format.bits > bits:
            yield replace(rung, scheme=name)
    if with_addend and not rung.low_rank:
        yield replace(rung, low_rank=True)
    yield replace(rung, scheme=None)


def finer_groups(menu: Sequence[str]) -> tuple[str, ...]:
    """Return the schemes of a menu in smaller groups, those that it does not have."""
    found = (_with_group(Scheme.parse(name), size) for name in menu for size in GROUP_SIZES)
    return tuple(dict.fromkeys(name for name in found if name is not None and name not in menu))


def _with_group(scheme: Scheme, size: int) -> str | None:
    """The scheme with smaller groups; None where its groups are as small already, or it has none."""
    granularity = scheme.weights.granularity
    if granularity.kind != "group" or granularity.group_size is None or granularity.group_size <= size:
        return None
    return str(scheme.with_granularity(replace(granularity, group_size=size)))
