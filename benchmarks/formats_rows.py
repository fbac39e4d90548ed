"""What was measured, and the comparisons made of it: Pareto sets, interpolation, ratios with standard errors.

A ratio of two KL divergences is one of means over the same windows of text. Its standard error is that of the paired
windows (delta method on the logarithm), so that what makes a window hard for both does not count.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

DATA_FREE = ("rtn", "absmax")
SAME_SIZE_BITS = 0.02
"""Rows that differ by no more in bits per weight count as equally large."""
NUM_STDERRS = 2.0
"""A ratio further than this from 1, in standard errors of its logarithm, is called a difference."""

Rival = tuple[tuple[float, "Row"], ...]
"""What a row is compared with: one row of weight 1, or two neighbours whose weights add up to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured cell.

    Attributes:
        key: says whether it is still valid: scheme, method, model and data.
        plain: for quantized activations, the scheme that quantizes the same weights only.
        family: the kind of format; `integer` has evenly spaced levels and scales in floats.
        code_bits: of one weight without scales and tables, as packed.
        ideal_bits: bits per weight if the codes were entropy coded; scales and tables as stored.
        kl: mean KL divergence from the reference of each window, nats per token.
        nll: mean negative log-likelihood of each window, nats per token.
    """

    key: str
    scheme: str
    method: str
    plain: str | None = None
    family: str
    code_bits: float
    bits: float
    ideal_bits: float
    kl: tuple[float, ...]
    nll: tuple[float, ...]

    @property
    def kl_mean(self) -> float:
        return mean(self.kl)

    @property
    def kl_stderr(self) -> float:
        return stderr(self.kl)

    @property
    def perplexity(self) -> float:
        return math.exp(mean(self.nll))

    def to_mapping(self) -> dict[str, Any]:
        """For JSON, with the means that a reader wants."""
        means = {"kl_mean": self.kl_mean, "kl_stderr": self.kl_stderr, "perplexity": self.perplexity}
        return {**asdict(self), **means, "perplexity_stderr": self.perplexity * stderr(self.nll)}

    @staticmethod
    def from_mapping(mapping: dict[str, Any]) -> "Row":
        stored: dict[str, Any] = {name: mapping[name] for name in Row.__slots__}
        stored["kl"], stored["nll"] = tuple(stored["kl"]), tuple(stored["nll"])
        return Row(**stored)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A quotient of two means over the same windows."""

    value: float
    stderr: float

    @property
    def verdict(self) -> int:
        """-1 below 1, 1 above, 0 where the standard error does not tell."""
        distance = math.log(self.value) * self.value
        return 0 if abs(distance) <= NUM_STDERRS * self.stderr else int(math.copysign(1, distance))

    def __str__(self) -> str:
        return with_error(self.value, self.stderr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A row beside the uniform row, or the two, of its size."""

    row: Row
    rival: Rival

    @property
    def ratio(self) -> Ratio:
        """KL of the row over KL of the rival."""
        return ratio(self.row.kl, [(weight, other.kl) for weight, other in self.rival])

    @property
    def rival_kl(self) -> float:
        return math.exp(sum(weight * math.log(other.kl_mean) for weight, other in self.rival))

    @property
    def rival_kl_stderr(self) -> float:
        return ratio([1.0] * len(self.row.kl), [(weight, other.kl) for weight, other in self.rival]).stderr * (
            self.rival_kl**2
        )

    @property
    def rival_bits(self) -> float:
        return sum(weight * other.bits for weight, other in self.rival)

    @property
    def rival_name(self) -> str:
        named = [f"{other.scheme} {other.method}" for _, other in self.rival]
        return named[0] if len(named) == 1 else f"between {' and '.join(named)}"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def with_error(value: float, error: float) -> str:
    """A value to two digits of its standard error."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 6
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def ratio(values: Sequence[float], rivals: Sequence[tuple[float, Sequence[float]]]) -> Ratio:
    """mean(values) / Π mean(rival)^weight over paired windows; all means must be positive."""
    centre = mean(values)
    relative = [value / centre for value in values]
    log_quotient = math.log(centre)
    for weight, rival in rivals:
        rival_centre = mean(rival)
        log_quotient -= weight * math.log(rival_centre)
        relative = [r - weight * x / rival_centre for r, x in zip(relative, rival, strict=True)]
    return Ratio(value=math.exp(log_quotient), stderr=math.exp(log_quotient) * stderr(relative))


def pareto_set(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other equals or beats in KL at as few bits; ascending in bits, falling in KL."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda each: (each.bits, each.kl_mean)):
        if not best or row.kl_mean < best[-1].kl_mean:
            best.append(row)
    return best


def rival_at(bits: float, curve: Sequence[Row]) -> Rival | None:
    """The best row of about this size on the Pareto set; else its two neighbours there, weighted by distance in bits.

    The weights interpolate the logarithm of KL linearly in bits. None where the set does not reach.
    """
    frontier = pareto_set(curve)
    close = [row for row in frontier if abs(row.bits - bits) <= SAME_SIZE_BITS]
    if close:
        return ((1.0, close[-1]),)
    for smaller, larger in pairwise(frontier):
        if smaller.bits <= bits <= larger.bits:
            share = (bits - smaller.bits) / (larger.bits - smaller.bits)
            return ((1 - share, smaller), (share, larger))
    return None


def bits_for(kl: float, curve: Sequence[Row]) -> float | None:
    """Bits per weight at which the Pareto set reaches a KL, by the same interpolation; None where it does not."""
    for smaller, larger in pairwise(pareto_set(curve)):
        if larger.kl_mean <= kl <= smaller.kl_mean:
            share = math.log(smaller.kl_mean / kl) / math.log(smaller.kl_mean / larger.kl_mean)
            return smaller.bits + share * (larger.bits - smaller.bits)
    return None


def comparisons(rows: Sequence[Row], curve: Sequence[Row]) -> list[Comparison]:
    """Every row that the curve reaches beside its rival there, ascending in bits."""
    ordered = sorted(rows, key=lambda row: (row.bits, row.kl_mean))
    found = [(row, rival_at(row.bits, curve)) for row in ordered]
    return [Comparison(row=row, rival=rival) for row, rival in found if rival is not None]


def tally(found: Sequence[Comparison]) -> str:
    """How many rows are better, worse, or neither, and by how much, in words."""
    ratios = [each.ratio for each in found]
    better, worse, neither = ([each.verdict for each in ratios].count(verdict) for verdict in (-1, 1, 0))
    values = [each.value for each in ratios]
    span = f"ratio {values[0]:.2f}" if len(values) == 1 else f"ratios {min(values):.2f} to {max(values):.2f}"
    return f"better in {better} of {len(found)}, worse in {worse}, not told apart in {neither}; {span}"
