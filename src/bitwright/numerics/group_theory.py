"""The error of groups that share a scale set by their own largest weight: groups, channels, blocks and tables.

The largest |x| of n weights is not fixed. With F(m) = P(|x| <= m) its distribution is F(m)^n, and given that it is m,
the others are independent draws from the part of the density inside [-m, m]. The mean over m of an error computed cell
by cell is therefore exact: no rule of thumb, no simulation. With a zero point both extremes count, and the mean is over
two numbers.

Small groups have small extremes. E[max |x|] grows like sqrt(2 ln n) for the Gaussian, like ln n for Laplace, like a
power of n for Student's t, and the steps with it; a scale per group buys back the difference at the price of its bits.

The integrals run over quantiles u of the largest value by the midpoint rule, after u = y - sin(2πy) / 2π, which takes
out the infinite slopes at both ends.

Reference: David and Nagaraja, Order statistics, chapter 2; Sidi, A new variable transformation for numerical
integration, 1993 (the sine); OCP Microscaling formats specification 1.0 (block scales).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Literal

from bitwright.errors import RecipeError
from bitwright.numerics.distributions import Distribution, Moments
from bitwright.numerics.theory import midpoints

NUM_NODES = 96
NUM_OUTSIDE_NODES, NUM_SIDE_NODES = 32, 24
NUM_PHASES = 16

MinMax = Literal["asymmetric", "symmetric", "restricted"]
Rounding = Literal["down", "nearest", "up", "best"]

_NOTHING = Moments(0.0, 0.0, 0.0)


def expected_absmax(distribution: Distribution, num_samples: int, *, power: int = 1) -> float:
    """Return E[M^power] of the largest magnitude M among `num_samples` independent values.

    Raises:
        RecipeError: fewer than one sample.
    """
    _check_group(num_samples, 1)
    # Imported here: scipy costs more time to import than the rest of the package.
    from scipy.integrate import quad

    def exceeds(m: float) -> float:
        outside = 2 * distribution.tail_probability(m)
        return 1.0 if outside >= 1 else -math.expm1(num_samples * math.log1p(-outside))

    # Below the median of M the integrand is almost constant, above it falls: two smooth pieces.
    middle = distribution.tail_quantile(_tail_of_quantile(0.5, num_samples))
    pieces = [(0.0, middle), (middle, distribution.support)]
    return float(sum(quad(lambda m: power * m ** (power - 1) * exceeds(m), a, b, limit=200)[0] for a, b in pieces))


def absmax_mse(distribution: Distribution, levels: Sequence[float], group_size: int) -> float:
    """Return the error of a table scaled so that its largest magnitude is the group's.

    With the levels -q..q this is symmetric min-max rounding without the extra code; with NF4's, what bitsandbytes does.

    Raises:
        RecipeError: an empty group or a table without a magnitude.
    """
    values = _table(levels)
    largest = max(map(abs, values))
    total = 0.0
    for weight, m in _absmax_nodes(distribution, group_size):
        total += weight * _error_at(distribution, values, m, m / largest, group_size)
    return total


def absmax_code_probabilities(
    distribution: Distribution, levels: Sequence[float], group_size: int
) -> tuple[float, ...]:
    """Return how often each of the ascending levels is used by groups scaled as in `absmax_mse`."""
    values = _table(levels)
    largest = max(map(abs, values))
    shares = [0.0] * len(values)
    for weight, m in _absmax_nodes(distribution, group_size):
        cells = _absmax_cells(distribution, values, m, m / largest, group_size)
        shares = [share + weight * cell.mass for share, cell in zip(shares, cells, strict=True)]
    return tuple(shares)


def absmax_optimal_levels(distribution: Distribution, num_levels: int, group_size: int) -> tuple[float, ...]:
    """Return the table in [-1, 1] with the least error for groups divided by their largest magnitude.

    Lloyd's iteration on w / max|w|, whose errors count max|w|²; every group has one value at exactly -1 or 1. It starts
    from equidistant levels.

    Raises:
        RecipeError: fewer than two levels or an empty group.
    """
    if num_levels < 2:
        raise RecipeError(f"absmax_optimal_levels: needs at least two levels, not {num_levels}.")
    levels = [2 * i / (num_levels - 1) - 1 for i in range(num_levels)]
    nodes = list(_absmax_nodes(distribution, group_size, num_nodes=32))
    moved = math.inf
    while moved > 1e-6:
        above, below = [0.0] * num_levels, [0.0] * num_levels
        for weight, m in nodes:
            cells = _absmax_cells(distribution, levels, m, m, group_size)
            above = [a + weight * m * cell.first for a, cell in zip(above, cells, strict=True)]
            below = [b + weight * m * m * cell.mass for b, cell in zip(below, cells, strict=True)]
        centroids = [a / b for a, b in zip(above, below, strict=True)]
        moved = max(abs(new - old) for new, old in zip(centroids, levels, strict=True))
        levels = centroids
    return tuple(levels)


def minmax_mse(distribution: Distribution, *, bits: int, group_size: int, kind: MinMax) -> float:
    """Return the error of integers of `bits` bits whose range is just that of the group and 0: plain round-to-nearest.

    Within 1 % from 16 weights per group on; in groups of a few the error jumps with the zero point, and the mean over
    extremes is less exact.

    Args:
        distribution: of the weights, independent.
        bits: at least 2.
        group_size: weights that share a scale, at least 2.
        kind: `asymmetric`: 2^b codes and an integer zero point; `symmetric`: -2^(b-1)..2^(b-1)-1 with a signed scale,
            the larger side having the extra code; `restricted`: without that code.
    Raises:
        RecipeError: too few bits or weights.
    """
    _check_group(group_size, 2)
    if bits < 2:
        raise RecipeError(f"minmax_mse: needs at least 2 bits, not {bits}.")
    last = 2 ** (bits - 1) - 1
    if kind == "restricted":
        return absmax_mse(distribution, range(-last, last + 1), group_size)
    values_of = _affine_values if kind == "asymmetric" else _signed_values
    inner, share = (group_size - 2) / group_size, 1 / group_size
    total = 0.0
    for weight, low, high in _extremes(distribution, group_size):
        values = values_of(low, high, bits)
        cells = _cells(distribution, values, (low, high), inner, {low: share, high: share})
        total += weight * _squared(values, cells)
    return total


def microscaling_mse(
    distribution: Distribution,
    levels: Sequence[float],
    *,
    group_size: int,
    mantissa_bits: int = 0,
    rounding: Rounding = "up",
    divisor: float | None = None,
) -> float:
    """Return the error of blocks whose scale, max|w| / divisor, is itself rounded to a short float.

    Averaged over the size of the weights, since it matters where they lie between two powers of two. The scale's own
    range is taken as unlimited, which is what the float32 scale above NVFP4's block scales is for.

    Args:
        distribution: of the weights, independent.
        levels: the elements' values, such as those of FP4.
        group_size: weights per block: 32 in MX formats, 16 in NVFP4.
        mantissa_bits: of the scale: 0 for E8M0 (powers of two), 3 for E4M3.
        rounding: `up` never clips; `down`; `nearest`; `best`: per block whichever neighbour has the smaller expected
            error given the block's largest magnitude (a search that sees the other weights too does a little better).
        divisor: None for the largest level. The OCP specification's rule is `down` with the largest power of two among
            the levels (4 for FP4).
    Raises:
        RecipeError: an empty block or a table without a magnitude.
    """
    values = _table(levels)
    divisor = max(map(abs, values)) if divisor is None else divisor
    total = 0.0
    for weight, m in _absmax_nodes(distribution, group_size):
        for phase in range(NUM_PHASES):
            size = 2.0 ** (phase / NUM_PHASES)
            scales = [s / size for s in _rounded(m * size / divisor, mantissa_bits, rounding)]
            errors = [_error_at(distribution, values, m, scale, group_size) for scale in scales]
            total += weight / NUM_PHASES * min(errors)
    return total


def _check_group(group_size: int, least: int) -> None:
    if group_size < least:
        raise RecipeError(f"theory: a group has at least {least} weights, not {group_size}.")


def _table(levels: Sequence[float]) -> list[float]:
    values = sorted(set(map(float, levels)))
    if not any(values):
        raise RecipeError("theory: a table needs a level besides 0.")
    return values


def _smoothed(num_nodes: int) -> Iterator[tuple[float, float]]:
    """Weights and nodes on (0, 1) for integrands with steep ends."""
    for i in range(num_nodes):
        angle = 2 * math.pi * (i + 0.5) / num_nodes
        yield (1 - math.cos(angle)) / num_nodes, (angle - math.sin(angle)) / (2 * math.pi)


def _tail_of_quantile(u: float, num_samples: int) -> float:
    """P(x > m) at the u-quantile m of the largest of `num_samples` magnitudes: (1 - u^(1/n)) / 2."""
    return -math.expm1(math.log(u) / num_samples) / 2


def _absmax_nodes(
    distribution: Distribution, group_size: int, num_nodes: int = NUM_NODES
) -> Iterator[tuple[float, float]]:
    """Weights and values of the group's largest magnitude."""
    _check_group(group_size, 1)
    for weight, u in _smoothed(num_nodes):
        yield weight, distribution.tail_quantile(_tail_of_quantile(u, group_size))


def _extremes(distribution: Distribution, group_size: int) -> Iterator[tuple[float, float, float]]:
    """Weights, smallest and largest value of a group.

    The probability t outside the two has the density n(n-1) t (1-t)^(n-2); a uniform share of it lies below.
    """
    n = group_size
    for weight, v in _smoothed(NUM_OUTSIDE_NODES):
        # v = (1-t)^(n-1) turns the density of t into the weight n t.
        t = -math.expm1(math.log(v) / (n - 1))
        # A mirrored group has the mirrored error, so that half of the shares, those below 1/2, count twice.
        for side_weight, share in islice(_smoothed(NUM_SIDE_NODES), NUM_SIDE_NODES // 2):
            low, high = distribution.quantile(t * share), -distribution.quantile(t * (1 - share))
            yield 2 * n * t * weight * side_weight, low, high


def _affine_values(low: float, high: float, bits: int) -> list[float]:
    low, high, last = min(low, 0.0), max(high, 0.0), 2**bits - 1
    step = (high - low) / last
    zero_point = min(max(round(-low / step), 0), last)
    return [step * (code - zero_point) for code in range(last + 1)]


def _signed_values(low: float, high: float, bits: int) -> list[float]:
    low, high, last = min(low, 0.0), max(high, 0.0), 2 ** (bits - 1) - 1
    upright, flipped = max(high / last, -low / (last + 1)), max(high / (last + 1), -low / last)
    if flipped < upright:
        return [flipped * code for code in range(-last, last + 2)]
    return [upright * code for code in range(-last - 1, last + 1)]


def _rounded(step: float, mantissa_bits: int, rounding: Rounding) -> tuple[float, ...]:
    """The candidates for a scale: floats with `mantissa_bits` stored bits around `step`."""
    unit = 2.0 ** (math.floor(math.log2(step)) - mantissa_bits)
    rules: dict[Rounding, Callable[[float], float]] = {"down": math.floor, "nearest": round, "up": math.ceil}
    if rounding == "best":
        return unit * math.floor(step / unit), unit * math.ceil(step / unit)
    return (unit * rules[rounding](step / unit),)


def _error_at(distribution: Distribution, values: Sequence[float], m: float, scale: float, group_size: int) -> float:
    """Expected squared error per weight of a group with largest magnitude m and a given scale."""
    cells = _absmax_cells(distribution, values, m, scale, group_size)
    return _squared([scale * value for value in values], cells)


def _absmax_cells(
    distribution: Distribution, values: Sequence[float], m: float, scale: float, group_size: int
) -> list[Moments]:
    share = 0.5 / group_size
    scaled = [scale * value for value in values]
    return _cells(distribution, scaled, (-m, m), (group_size - 1) / group_size, {-m: share, m: share})


def _cells(
    distribution: Distribution,
    values: Sequence[float],
    ends: tuple[float, float],
    inner: float,
    atoms: dict[float, float],
) -> list[Moments]:
    """Moments of a group's weights per ascending value: a share `inner` distributed between the ends, and the atoms."""
    low, high = ends
    inner /= max(distribution.moments(low, high).mass, 1e-300)
    borders = [min(max(border, low), high) for border in midpoints(values)]
    cells: list[Moments] = []
    for a, b in pairwise([low, *borders, high]):
        mass, first, second = distribution.moments(a, b) if a < b else _NOTHING
        cells.append(Moments(inner * mass, inner * first, inner * second))
    for x, share in atoms.items():
        nearest = min(range(len(values)), key=lambda i: abs(values[i] - x))
        mass, first, second = cells[nearest]
        cells[nearest] = Moments(mass + share, first + share * x, second + share * x * x)
    return cells


def _squared(values: Sequence[float], cells: Sequence[Moments]) -> float:
    pairs = zip(values, cells, strict=True)
    return math.fsum(
        max(0.0, cell.second - 2 * value * cell.first + value * value * cell.mass) for value, cell in pairs
    )
