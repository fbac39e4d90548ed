"""Histograms that merge exactly: any split into batches, any order and any number of ranks give the same bits.

A histogram over a range that is not known beforehand must grow, and one that redistributes its counts when it grows
depends on the order of the batches. Here the bins of a group are 2^k wide and start at multiples of 2^k, so that bin i
holds the values with floor(x / 2^k) = i, and widening is exact: floor(floor(x / 2^k) / 2) = floor(x / 2^(k+1)). There
are 2N = 4096 bins, i from -N to N - 1, and k is the smallest exponent at which smallest and largest value fit. So k
depends on nothing but the range, and the counts on nothing but the values.

What this costs: the larger end of the range takes between N/2 and N bins, as 2^k rarely fits tightly. One value a
thousand times larger than the rest leaves the rest a few bins; clipping far below 1/16 of the largest value then relies
on the assumption that values spread evenly over a bin.

Legend: T tokens, I columns, G groups of columns, each with its own histogram.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import DataError, RecipeError, ShapeError, VerificationError
from bitwright.numerics.granularity import row_chunks
from bitwright.numerics.linalg import wide_dtype

HALF_BINS = 2048
LOG2_HALF_BINS = 11

# Where float32 ends: every float32, subnormals included, is a multiple of 2^-149, so that finer bins tell nothing.
MIN_EXPONENT = -149


def group_ends(x: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return smallest and largest value of each group, float64 [G] on the CPU; 0 is not included.

    Args:
        x: [T, I] with at least one row, any float dtype.
        groups: [I], the group of each column.
        num_groups: G; every group has a column.
    Raises:
        VerificationError: NaN or Inf.
    """
    # Adding 0 turns -0 into 0: which of the two a minimum returns would depend on the order.
    low, high = (end.cpu().double() + 0.0 for end in torch.aminmax(x, dim=0))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise VerificationError(
            "activations hold NaN or Inf, so that they have no range. Run the model in bfloat16 or float32, as float16 "
            "ends at 65504; if they persist, check the checkpoint."
        )
    groups = groups.cpu()
    return (
        torch.full((num_groups,), math.inf, dtype=torch.float64).scatter_reduce_(0, groups, low, "amin"),
        torch.full((num_groups,), -math.inf, dtype=torch.float64).scatter_reduce_(0, groups, high, "amax"),
    )


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts of the values of G groups; `update` adds values, `merge` adds histograms. No tensor is modified in place.

    Attributes:
        counts: [G, 2N] int64; entry N + i counts the values in [i 2^k, (i + 1) 2^k). On the CPU, like all the state:
            work happens where the activations are, and the state of several devices merges without copies.
        num_zeros: [G] int64, how many of the values are exactly 0. ReLU makes many, which lie at the edge of a bin.
        exponent: [G] int64, k.
        low: [G] float64, the smallest value; +Inf before the first one.
        high: [G] float64, the largest value; -Inf before the first one.
    """

    counts: Tensor
    num_zeros: Tensor
    exponent: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, num_groups: int) -> "Histogram":
        """Return histograms that have seen nothing."""
        return cls(
            counts=torch.zeros(num_groups, 2 * HALF_BINS, dtype=torch.int64),
            num_zeros=torch.zeros(num_groups, dtype=torch.int64),
            exponent=torch.full((num_groups,), MIN_EXPONENT),
            low=torch.full((num_groups,), math.inf, dtype=torch.float64),
            high=torch.full((num_groups,), -math.inf, dtype=torch.float64),
        )

    @property
    def num_groups(self) -> int:
        """G."""
        return self.counts.shape[0]

    @property
    def is_empty(self) -> bool:
        """Whether a group has seen no value."""
        return bool((self.low > self.high).any())

    @property
    def num_values(self) -> Tensor:
        """How many values each group has seen, [G] int64."""
        return self.counts.sum(1)

    @property
    def width(self) -> Tensor:
        """Width 2^k of the bins, [G] float64, in units of the values; exact."""
        return _powers_of_two(self.exponent)

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, [G, 2N + 1] float64, in units of the values; exact."""
        return torch.arange(-HALF_BINS, HALF_BINS + 1, dtype=torch.float64) * self.width.unsqueeze(1)

    def update(self, x: Tensor, groups: Tensor | None = None) -> None:
        """Count the values of a batch; an error leaves the histogram as it was.

        Args:
            x: [T, I], any float dtype, on any device. Float64 is rounded to float32 first: activations are never wider.
            groups: [I] int64, the group of each column; None puts all columns into the only group.
        Raises:
            ShapeError: x is not [T, I], or groups not [I].
            VerificationError: NaN or Inf, also where float64 values exceed float32.
        """
        if x.ndim != 2 or (groups is not None and groups.shape != x.shape[1:]):
            given = None if groups is None else list(groups.shape)
            raise ShapeError(f"histogram: x {list(x.shape)} with groups {given}. Pass x [T, I] and groups [I].")
        if x.numel() == 0:
            return
        x = x.detach()
        if x.dtype == torch.float64:
            x = x.float()
        if wide_dtype(x.device) != torch.float64:
            x = x.cpu()
        if groups is None:
            x, groups = x.reshape(-1, 1), torch.zeros(1, dtype=torch.int64)
        self._extend(*group_ends(x, groups, self.num_groups))
        self.counts = self.counts + self._count(x, groups)
        self.num_zeros = self.num_zeros.scatter_add(0, groups.cpu(), (x == 0).sum(0).cpu())

    def merge(self, other: "Histogram") -> "Histogram":
        """Return the histogram of the values of both; associative and commutative, bit by bit.

        Raises:
            ShapeError: different numbers of groups.
        """
        if self.num_groups != other.num_groups:
            raise ShapeError(
                f"histogram: {self.num_groups} and {other.num_groups} groups do not merge. Use one granularity."
            )
        merged = replace(self)
        merged._extend(other.low, other.high)
        merged.counts = merged.counts + _widened(other.counts, merged.exponent - other.exponent)
        merged.num_zeros = self.num_zeros + other.num_zeros
        return merged

    def quantile(self, fraction: float) -> Tensor:
        """Return the value below which a fraction of the values lies, [G] float64.

        Interpolates linearly between order statistics, as NumPy does. Inside a bin the values are taken as evenly
        spread, so that the result is within one bin of the exact one; fractions 0 and 1 give the exact ends.

        Raises:
            RecipeError: a fraction outside [0, 1].
            DataError: the histogram is empty.
        """
        if not 0 <= fraction <= 1:
            raise RecipeError(f"quantile: {fraction} is outside [0, 1]. Use 0.999 for the 99.9th percentile.")
        if self.is_empty:
            raise DataError("quantile: the histogram saw no values. Run calibration batches first.")
        position = fraction * (self.num_values - 1).double()
        rank = position.floor()
        below = self._order_statistic(rank.long())
        above = self._order_statistic(torch.minimum(rank.long() + 1, self.num_values - 1))
        return torch.lerp(below, above, position - rank)

    def _order_statistic(self, rank: Tensor) -> Tensor:
        """Return the value [G] with the given number of values below it."""
        cumulative, rank = self.counts.cumsum(1), rank.unsqueeze(1)
        index = torch.searchsorted(cumulative, rank, right=True)
        inside = self.counts.gather(1, index)
        offset = (rank - (cumulative.gather(1, index) - inside) + 0.5) / inside
        value = ((index - HALF_BINS + offset).squeeze(1) * self.width).clamp(self.low, self.high)
        rank = rank.squeeze(1)
        value = torch.where(rank == 0, self.low, value)
        return torch.where(rank == self.num_values - 1, self.high, value)

    def _extend(self, low: Tensor, high: Tensor) -> None:
        """Include the range from low to high [G]; bins merge where it does not fit."""
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        exponent = _fitting_exponent(self.low, self.high)
        self.counts = _widened(self.counts, exponent - self.exponent)
        self.exponent = exponent

    def _count(self, x: Tensor, groups: Tensor) -> Tensor:
        """Return the counts [G, 2N] of x alone, whose range fits."""
        groups = groups.to(x.device)
        # Products with a power of two are exact: float32 values over a width of float32 values cannot leave float64.
        inverse = _powers_of_two(-self.exponent).to(x.device)[groups]
        first = (groups * (2 * HALF_BINS) + HALF_BINS).double()
        counts = torch.zeros(self.counts.numel(), dtype=torch.int64, device=x.device)
        ones = torch.ones(0, dtype=torch.int64, device=x.device)
        for rows in row_chunks(x):
            index = (x[rows].double() * inverse).floor_().add_(first).long().reshape(-1)
            if ones.numel() < index.numel():
                ones = torch.ones_like(index)
            counts.scatter_add_(0, index, ones[: index.numel()])
        return counts.cpu().view_as(self.counts)


def _powers_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float64; `torch.exp2` is not exact everywhere."""
    return torch.tensor([math.ldexp(1.0, k) for k in exponent.tolist()], dtype=torch.float64)


def _fitting_exponent(low: Tensor, high: Tensor) -> Tensor:
    """Return the smallest k with floor(low / 2^k) >= -N and floor(high / 2^k) <= N - 1, [G]."""
    # x = m 2^e with 1/2 <= m < 1. high < N 2^k asks for e <= k + log2 N; -low <= N 2^k for one less where m = 1/2.
    _, above = torch.frexp(high.clamp(min=0))
    mantissa, below = torch.frexp(-low.clamp(max=0))
    above = torch.where(high > 0, above - LOG2_HALF_BINS, MIN_EXPONENT)
    below = torch.where(low < 0, below - LOG2_HALF_BINS - (mantissa == 0.5).int(), MIN_EXPONENT)
    return torch.maximum(above, below).clamp_(min=MIN_EXPONENT).long()


def _widened(counts: Tensor, shift: Tensor) -> Tensor:
    """Return counts [G, 2N] over bins 2^shift as wide, shift [G] >= 0."""
    if not bool(shift.any()):
        return counts
    # An arithmetic shift is floor(i / 2^shift); beyond 63 bits it leaves 0 and -1 anyhow.
    bins = torch.arange(-HALF_BINS, HALF_BINS).expand_as(counts)
    target = (bins >> shift.clamp(max=63).unsqueeze(1)) + HALF_BINS
    return torch.zeros_like(counts).scatter_add_(1, target, counts)
