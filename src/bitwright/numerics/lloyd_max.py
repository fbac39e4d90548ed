"""The levels that lose least when a known distribution is rounded to them.

Two conditions hold at the optimum: each border lies half-way between its two levels (nearest level), and each level is
the mean of the values in its cell (centroid). Lloyd's method satisfies them in turn until nothing moves. Where the
logarithm of the density is concave, as for uniform, Gaussian and Laplace, there is only one such point: the optimum.

    bits    Gaussian MSE    Laplace MSE     (variance 1)
    1       0.3634          0.5000
    2       0.1175          0.1762
    3       0.03455         0.05448
    4       0.009501        0.01537

Max's table of 1960 prints 0.009497 for 16 Gaussian levels. That is below the minimum, so no table reaches it.
"""

import itertools
import math
from dataclasses import dataclass

from bitwright.errors import RecipeError, VerificationError
from bitwright.numerics.distributions import Distribution

MIN_BITS, MAX_BITS = 1, 6

# Levels that still move by this much are at most a few hundred times as far from their limit: well below float32.
_TOLERANCE = 1e-12
# The number of steps grows like 4^bits: about 700 at 4 bits and 9000 at 6.
_MAX_STEPS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimalLevels:
    """What Lloyd's method finds.

    Args:
        levels: ascending, symmetric about 0 and without 0, in standard deviations.
        mse: mean squared error, in units of the variance.
    """

    levels: tuple[float, ...]
    mse: float


def optimal_levels(distribution: Distribution, bits: int) -> OptimalLevels:
    """Find the 2^bits levels of least mean squared error for a distribution.

    Args:
        distribution: of mean 0 and variance 1.
        bits: 1 to 6.
    Raises:
        RecipeError: bits outside 1..6.
        VerificationError: the levels still move after the largest number of steps.
    Reference:
        Lloyd, Least squares quantization in PCM, 1982 (method I); Max, Quantizing for minimum distortion, 1960.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise RecipeError(f"lloyd-max: bits must be {MIN_BITS} to {MAX_BITS}, not {bits}.")
    # Only the positive half is computed, with a border fixed at 0. It starts uniform, within three deviations.
    num_levels = 2 ** (bits - 1)
    reach = min(3.0, distribution.support)
    levels = [reach * (i + 0.5) / num_levels for i in range(num_levels)]
    for _ in range(_MAX_STEPS):
        masses, firsts = _cells(distribution, levels)
        centroids = [first / mass for mass, first in zip(masses, firsts, strict=True)]
        moved = max(abs(new - old) for new, old in zip(centroids, levels, strict=True))
        levels = centroids
        if moved < _TOLERANCE:
            break
    else:
        raise VerificationError(f"lloyd-max: {distribution.name}, {bits} bits: moves after {_MAX_STEPS} steps.")
    masses, firsts = _cells(distribution, levels)
    # The error of both halves: 1 - 2 Σ (2 y E[x] - y² P), with E and P over the positive cells.
    gains = (2 * y * first - y * y * mass for y, mass, first in zip(levels, masses, firsts, strict=True))
    return OptimalLevels(levels=(*(-level for level in reversed(levels)), *levels), mse=1 - 2 * math.fsum(gains))


def _cells(distribution: Distribution, levels: list[float]) -> tuple[list[float], list[float]]:
    """P(x in cell) and E[x; x in cell] for the cells of ascending positive levels."""
    borders = [0.0, *((low + high) / 2 for low, high in itertools.pairwise(levels)), math.inf]
    tails = [distribution.tail(border) for border in borders]
    pairs = list(itertools.pairwise(tails))
    return [near.mass - far.mass for near, far in pairs], [near.first - far.first for near, far in pairs]
