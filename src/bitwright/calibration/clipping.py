"""Where to clip activations, found on their histogram: least squared error, or least divergence.

A small range has fine steps and loses the outliers, a large one keeps them and rounds coarsely. Both searches try
clipped ranges, build the grid that each would give, and measure what that grid does to the histogram. Every candidate
costs one lookup per level rather than one per bin, because a level's cell is an interval and sums over intervals are
differences of cumulative sums.

`mse` takes the values as evenly spread within a bin, which is exact in the limit and tells steps finer than a bin
apart. The rounding error of a value moves by at most one bin width when the value moves by one, so that the root mean
square error found is within one bin width of the true one.

`entropy` compares distributions over bins, so that it sees no rounding error in cells as fine as bins: candidates keep
at least as many bins as there are levels. It counts how many values are clipped, not how far: an outlier costs the same
at ten and at a thousand times the range.

Neither counts exact zeros where 0 is a level: every range represents them exactly. Otherwise their spike, half of all
values after ReLU, would draw the divergence to whatever range separates it from its neighbours.

Legend: G groups, K candidates, V levels, B bins. Ends and levels are in units of the bin width where nothing else is
said: exact, as the width is a power of two.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bitwright.calibration.histogram import HALF_BINS, Histogram
from bitwright.numerics.formats import LevelFormat

# Factors on an end of the range: 3 % apart, finer than the valley of either measure, down to 1/32, below which few bins
# remain. Two ends are first searched together, 19 % apart, then each alone.
FACTORS = tuple(2.0 ** (-step / 24) for step in range(121))
COARSE = 6
REFINEMENTS = 2

# Takes lower and upper ends [K] to costs [K].
Cost = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """What to search for one group: a cost, and the ends to try on each side, [K] each, from the widest on."""

    cost: Cost
    lows: Tensor
    highs: Tensor


def mse_range(histogram: Histogram, format: LevelFormat) -> tuple[Tensor, Tensor]:
    """Return the range with the least squared error, (low [G], high [G]) in float64; never worse than no clipping."""
    levels = level_table(format)

    def problem(counts: Tensor, low: Tensor, high: Tensor) -> Problem:
        def cost(low: Tensor, high: Tensor) -> Tensor:
            return squared_error(counts, grid_values(low, high, levels, symmetric=format.symmetric))

        if format.symmetric:
            reach = _clipped(torch.maximum(-low, high))
            return Problem(cost, torch.maximum(low, -reach), torch.minimum(high, reach))
        return Problem(cost, _clipped(low), _clipped(high))

    return _search(histogram, problem, levels, symmetric=format.symmetric)


def entropy_range(histogram: Histogram, format: LevelFormat) -> tuple[Tensor, Tensor]:
    """Return the range with the least Kullback-Leibler divergence, (low [G], high [G]) in float64.

    Symmetric formats see magnitudes, and their levels from 0 up; the others see both ends.

    Reference:
        Migacz, 8-bit inference with TensorRT, GTC 2017. Differs: cells are those of the real levels instead of equal
        parts of the range; bins that only hold clipped values share their level's mass (as in MXNet), where the
        original gives them none and the divergence is infinite; asymmetric ranges; candidates by a constant factor
        and out of empty bins, instead of each bin; zeros do not count (NVIDIA's code gives their bin the count of its
        neighbour).
    """
    levels = level_table(format)
    upper = levels[levels >= 0] / levels[-1]

    def magnitudes(counts: Tensor, low: Tensor, high: Tensor) -> Problem:
        folded = counts[HALF_BINS:] + counts[:HALF_BINS].flip(0)

        def cost(low: Tensor, high: Tensor) -> Tensor:
            reach = torch.maximum(-low, high)
            return divergence(folded, torch.zeros_like(reach), reach, reach.unsqueeze(1) * upper)

        reach = _to_occupied(_clipped(torch.maximum(-low, high)), folded)
        return Problem(cost, torch.maximum(low, -reach), torch.minimum(high, reach))

    def both_ends(counts: Tensor, low: Tensor, high: Tensor) -> Problem:
        def cost(low: Tensor, high: Tensor) -> Tensor:
            values = grid_values(low, high, levels, symmetric=False)
            return divergence(counts, low + HALF_BINS, high + HALF_BINS, values + HALF_BINS)

        lows = -_to_occupied(_clipped(-low), counts[:HALF_BINS].flip(0))
        return Problem(cost, lows, _to_occupied(_clipped(high), counts[HALF_BINS:]))

    return _search(histogram, magnitudes if format.symmetric else both_ends, levels, symmetric=format.symmetric)


def level_table(format: LevelFormat) -> Tensor:
    """Return the levels of a format before the zero point, [V] float64, ascending, in units of the scale."""
    codes = torch.arange(format.min_code, format.min_code + int(2**format.bits)).to(format.code_dtype)
    levels = format.decode(codes, None if format.symmetric else torch.zeros(())).double()
    # Codes of NaN and Inf fail both comparisons, or one.
    return torch.unique(levels[(levels >= format.min_value) & (levels <= format.max_value)])


def grid_values(low: Tensor, high: Tensor, levels: Tensor, *, symmetric: bool) -> Tensor:
    """Return what the min-max grid of each range [K] represents, ascending, [K, V]; `ranges.minmax` before rounding."""
    lowest, highest = levels[0], levels[-1]
    if not symmetric:
        scale = (high - low) / (highest - lowest)
        zero_point = (lowest - low / scale).round().clamp(lowest, highest)
        return (levels - zero_point.unsqueeze(1)) * scale.unsqueeze(1)
    upright = torch.maximum(high / highest, low / lowest)
    flipped = torch.maximum(-high / lowest, -low / highest)
    mirrored = (flipped < upright).unsqueeze(1)
    return torch.minimum(flipped, upright).unsqueeze(1) * torch.where(mirrored, -levels.flip(0), levels)


def squared_error(counts: Tensor, values: Tensor) -> Tensor:
    """Return Σ (x - nearest value)² over a histogram, [K], in squared bin widths.

    Args:
        counts: [2N] float64, values evenly spread in their bins; bin N + i is [i, i + 1).
        values: [K, V], ascending.
    """
    left = torch.arange(-HALF_BINS, HALF_BINS, dtype=torch.float64)
    moments = torch.stack([counts, counts * (left + 0.5), counts * (left * (left + 1) + 1 / 3)])
    cumulative = _from_zero(moments)

    position = (_thresholds(values) + HALF_BINS).clamp_(0, 2 * HALF_BINS)
    index = position.long().clamp_(max=2 * HALF_BINS - 1)
    part, left = position - index, left[index]
    inside = counts[index] * part
    at_thresholds = cumulative[:, index]
    at_thresholds[0] += inside
    at_thresholds[1] += inside * (left + part / 2)
    at_thresholds[2] += inside * (left * (left + part) + part * part / 3)

    ends = cumulative[:, -1].reshape(3, 1, 1).expand(3, values.shape[0], 1)
    zeroth, first, second = torch.diff(at_thresholds, prepend=torch.zeros_like(ends), append=ends)
    return (second + values * (values * zeroth - 2 * first)).sum(1)


def divergence(counts: Tensor, low: Tensor, high: Tensor, values: Tensor) -> Tensor:
    """Return KL(P || Q) of clipped distributions P and what their quantization Q leaves of them, [K].

    P: the bins from low to high; what lies outside is added to the outermost of them. Q: the same bins without what
    lies outside; the mass of a level is spread evenly over those of its bins that P uses. Infinite where a level
    without mass would have to represent some, or where fewer bins than levels are kept (unless nothing is clipped).

    Args:
        counts: [B] float64, at least one above 0; bin i is [i, i + 1).
        low: [K], the lower end of each range.
        high: [K], the upper end.
        values: [K, V], ascending; a bin belongs to the value nearest to its centre.
    """
    mass, used, plain = _from_zero(torch.stack([counts, (counts > 0).double(), torch.xlogy(counts, counts)]))
    first, last = (end.floor().long().clamp(0, counts.numel() - 1).unsqueeze(1) for end in (low, high))
    stop = last + 1
    total, kept = mass[-1], mass[stop] - mass[first]
    below, above = mass[first], mass[-1] - mass[stop]

    inner = (_thresholds(values) - 0.5).ceil().long()
    bounds = torch.cat([first, torch.minimum(torch.maximum(inner, first), stop), stop], dim=1)
    started, ended = bounds > first, bounds == stop
    reference = torch.where(ended, total, mass[bounds] * started).diff()
    new_first, new_last = (counts[first] == 0) & (below > 0), (counts[last] == 0) & (above > 0)
    num_used = (used[bounds] + (new_first & started).double() + (new_last & ended).double()).diff()
    shared = mass[bounds].diff() / (num_used * kept.clamp(min=1))
    cross = torch.xlogy(reference, torch.where(reference > 0, shared, 1.0)).sum(1, keepdim=True)

    outermost = _log_mass(counts[first], below) + _log_mass(counts[last], above)
    result = (plain[stop] - plain[first] + outermost - cross) / total - total.log()
    too_few = (stop - first < values.shape[1]) & (kept < total)
    return torch.where(too_few, torch.inf, result).squeeze(1)


def _search(
    histogram: Histogram, pose: Callable[[Tensor, Tensor, Tensor], Problem], levels: Tensor, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the cheapest range of each group; groups of zeros keep the range from 0 to 0."""
    low, high = histogram.low.clamp(max=0), histogram.high.clamp(min=0)
    search, widths = _search_pairs if symmetric else _search_ends, histogram.width
    uncounted = histogram.num_zeros if bool((levels == 0).any()) else torch.zeros_like(histogram.num_zeros)
    for group in torch.nonzero(low < high).flatten().tolist():
        width, counts = widths[group], histogram.counts[group].double()
        counts[HALF_BINS] -= uncounted[group]
        best_low, best_high = search(pose(counts, low[group] / width, high[group] / width))
        low[group], high[group] = best_low * width, best_high * width
    return low, high


def _search_pairs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the best of the ranges from `lows[i]` to `highs[i]`."""
    # The first of equals: the widest.
    index = int(torch.argmin(problem.cost(problem.lows, problem.highs)))
    return problem.lows[index], problem.highs[index]


def _search_ends(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the best range whose ends were chosen independently."""
    cost, lows, highs = problem
    pairs = torch.cartesian_prod(lows[::COARSE], highs[::COARSE])
    low, high = _search_pairs(Problem(cost, pairs[:, 0], pairs[:, 1]))
    for _ in range(REFINEMENTS):
        low, high = _search_pairs(Problem(cost, low.expand_as(highs), highs))
        low, high = _search_pairs(Problem(cost, lows, high.expand_as(lows)))
    return low, high


def _clipped(end: Tensor) -> Tensor:
    """Return the ends to try for an end of the values."""
    return end * torch.tensor(FACTORS, dtype=torch.float64)


def _to_occupied(ends: Tensor, counts: Tensor) -> Tensor:
    """Move ends [K] >= 0 out of empty bins, to the centre of the next bin towards 0 that is not empty.

    A range that ends where there are no values only stretches the levels.
    """
    bins = torch.arange(counts.numel())
    last = torch.where(counts > 0, bins, -1).cummax(0).values
    here = ends.long().clamp(max=counts.numel() - 1)
    there = last[here]
    return torch.where((there == here) | (there < 0), ends, there + 0.5)


def _thresholds(values: Tensor) -> Tensor:
    """Return where the nearest value changes, [K, V - 1]."""
    return (values[:, 1:] + values[:, :-1]) / 2


def _from_zero(x: Tensor) -> Tensor:
    """Return cumulative sums along the last dimension, starting with 0."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _log_mass(count: Tensor, added: Tensor) -> Tensor:
    """Return what adding mass to a bin changes in Σ n log n."""
    return torch.xlogy(count + added, count + added) - torch.xlogy(count, count)
