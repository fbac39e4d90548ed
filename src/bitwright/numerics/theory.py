"""The error of a grid, predicted from the distribution: what measurements are checked against.

A quantizer is a set of levels and the thresholds between them. Its error is a sum of integrals over cells, each with a
closed form by partial moments (see `distributions`), and splits in two:

    rounding   x between the outermost levels: the distance to the level of its cell
    clipping   x beyond them: the distance to the outermost level

The exact sum holds for any levels at any number of bits (`levels_error`). The rule of thumb replaces the rounding part
by s²/12 · P(inside): over a cell of width s a density that is nearly flat makes the error uniform on [-s/2, s/2], with
mean 0 and variance s²/12 (`high_resolution_mse`). It is good where s is well below the standard deviation, and wrong
where a cell is as wide as the distribution: at 2 bits, and with ranges set by an outlier.

A small range has fine steps and cuts the tails, a large one keeps the tails and has coarse steps: the optimum lies
where the two slopes cancel (`optimal_clip`). Every further bit halves s, divides s²/12 by 4 and so adds 10 log10(4) =
6.02 dB of SQNR, exactly so for uniform inputs; with Gaussian or Laplace inputs the optimal range grows with the number
of bits, and each bit is worth less than that.

Where published texts differ, and what is right:
- The optimal clip for N(0, 1) at 4 bits is often given as 2.55. That takes s = 2c / 2^b with c at the outer border of
  the last cell, yet counts clipping from c instead of from the last value c - s/2. Counted consistently the last value
  is at 2.514 (border at 2.68, as in the MSE-optimal uniform quantizer of 16 levels). At 8 bits both give 3.92.
- `q = round((r - z) / s)` with an integer z mixes units: r is a weight, z a code. Correct: `q = clamp(round(r/s) + z)`.
- A fake-quantize `s · round(x / s)`, without clamp and zero point, has no code range: values outside it are not clipped
  but get codes that b bits do not have. Correct: `s · (clamp(round(x/s) + z, qmin, qmax) - z)`.

All lengths are in standard deviations, all errors in units of the variance.

Reference: Bennett, Spectra of quantized signals, 1948; Max, Quantizing for minimum distortion, 1960; ACIQ,
arXiv:1810.05723 (clipping; the 2.55 above).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bitwright.errors import RecipeError
from bitwright.numerics.distributions import Distribution

DB_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class SquaredError:
    """Mean squared error in units of the variance, by cause.

    Args:
        rounding: of values between the outermost levels.
        clipping: of values beyond them.
    """

    rounding: float
    clipping: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.rounding + self.clipping


def sqnr_db(mse: float) -> float:
    """Return the signal to noise ratio in dB of an error in units of the signal's power."""
    return -10 * math.log10(mse)


def uniform_levels(bits: int, clip: float = 1.0) -> tuple[float, ...]:
    """Return 2^bits equidistant levels from -clip to clip.

    Raises:
        RecipeError: bits below 1 or clip not positive.
    """
    if bits < 1 or not clip > 0:
        raise RecipeError(f"theory: needs bits >= 1 and clip > 0, not {bits} and {clip}.")
    last = 2**bits - 1
    return tuple(clip * (2 * code - last) / last for code in range(2**bits))


def midpoints(levels: Sequence[float]) -> tuple[float, ...]:
    """Return the thresholds of rounding to the nearest of ascending levels."""
    return tuple((a + b) / 2 for a, b in pairwise(levels))


def levels_error(
    distribution: Distribution,
    levels: Sequence[float],
    thresholds: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
) -> SquaredError:
    """Return the exact error of a quantizer, cell by cell.

    Args:
        distribution: of variance 1.
        levels: decoded values in units of `scale`, in any order.
        thresholds: borders of the cells of the ascending levels, one fewer, in units of `scale`; None rounds to the
            nearest level.
        scale: > 0, in standard deviations.
    Raises:
        RecipeError: no level, scale not positive, or thresholds that do not ascend or do not fit the levels.
    """
    cells = _cells(levels, thresholds, scale)
    lowest, highest = cells[0][0], cells[-1][0]
    inside = [_error(distribution, v, max(a, lowest), min(b, highest)) for v, a, b in cells]
    below = [_error(distribution, v, a, min(b, lowest)) for v, a, b in cells]
    above = [_error(distribution, v, max(a, highest), b) for v, a, b in cells]
    return SquaredError(rounding=math.fsum(inside), clipping=math.fsum(below + above))


def levels_mse(
    distribution: Distribution,
    levels: Sequence[float],
    thresholds: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
) -> float:
    """Return the total of `levels_error`."""
    return math.fsum(_error(distribution, v, a, b) for v, a, b in _cells(levels, thresholds, scale))


def code_probabilities(
    distribution: Distribution,
    levels: Sequence[float],
    thresholds: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
) -> tuple[float, ...]:
    """Return how often each of the ascending levels is used; arguments as `levels_error`."""
    return tuple(max(0.0, distribution.moments(a, b).mass) for _, a, b in _cells(levels, thresholds, scale))


def grid_entropy(
    distribution: Distribution,
    levels: Sequence[float],
    thresholds: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
) -> float:
    """Return the bits per code after ideal entropy coding; arguments as `levels_error`."""
    return entropy_bits(code_probabilities(distribution, levels, thresholds, scale=scale))


def entropy_bits(probabilities: Sequence[float]) -> float:
    """Return -Σ p log2 p."""
    return -math.fsum(p * math.log2(p) for p in probabilities if p > 0)


def zeroed_share(distribution: Distribution, *, step: float) -> float:
    """Return the share of values that a uniform grid with a level at 0 rounds to 0: |x| < step / 2."""
    return 1 - 2 * distribution.tail_probability(step / 2)


def rounding_mse(step: float) -> float:
    """Return the variance s²/12 of an error that is uniform over a cell of width `step`."""
    return step * step / 12


def clipping_mse(distribution: Distribution, *, lower: float, upper: float) -> float:
    """Return the squared error of clamping to [lower, upper], lower <= 0 <= upper; exact."""
    return distribution.tail_mse(-lower) + distribution.tail_mse(upper)


def high_resolution_mse(distribution: Distribution, *, lower: float, upper: float, step: float) -> SquaredError:
    """Return s²/12 · P(inside) and the clipping of the grid lower, lower + step, ..., upper: the rule of thumb.

    Raises:
        RecipeError: a range without 0 or a step that is not positive.
    """
    if not (lower <= 0 <= upper and step > 0):
        raise RecipeError(f"theory: needs lower <= 0 <= upper and step > 0, not {lower}, {upper} and {step}.")
    inside = 1 - distribution.tail_probability(-lower) - distribution.tail_probability(upper)
    return SquaredError(
        rounding=rounding_mse(step) * inside, clipping=clipping_mse(distribution, lower=lower, upper=upper)
    )


def total_mse(distribution: Distribution, *, bits: int, clip: float) -> float:
    """Return the exact error of 2^bits equidistant levels from -clip to clip.

    Raises:
        RecipeError: bits below 1 or clip not positive.
    """
    return levels_mse(distribution, uniform_levels(bits, clip))


def predicted_sqnr_db(distribution: Distribution, *, bits: int, clip: float) -> float:
    """Return the SQNR in dB of 2^bits equidistant levels from -clip to clip."""
    return sqnr_db(total_mse(distribution, bits=bits, clip=clip))


def optimal_clip(distribution: Distribution, *, bits: int) -> float:
    """Return the outermost of 2^bits equidistant levels when their error is least."""
    return optimal_scale(distribution, uniform_levels(bits))


def optimal_scale(distribution: Distribution, levels: Sequence[float]) -> float:
    """Return the scale of a table that minimises its error when values round to the nearest level.

    With the levels (-1, 1) this is the binary scale E|x|, with (-1, 0, 1) the ternary one.

    Raises:
        RecipeError: no level but 0.
    """
    largest = max((abs(level) for level in levels), default=0.0)
    if largest == 0:
        raise RecipeError("optimal_scale: the table has no level but 0.")
    # No range beyond 4 standard deviations per bit pays, even for the Laplace tail.
    reach = min(distribution.support, 4 + 4 * math.log2(len(levels))) / largest
    return minimise(lambda scale: levels_mse(distribution, levels, scale=scale), low=0.01 * reach, high=reach)


def float_sqnr_db(mantissa_bits: int) -> float:
    """Return the SQNR of a floating-point grid wherever it neither overflows nor underflows.

    Between 2^e and 2^(e+1) the step is 2^(e-m), so that the noise at x is x² 2^(-2m) / 12 · 2^(-2f), f the fraction of
    log2|x|. For magnitudes that spread smoothly over octaves f is uniform, and the mean of 2^(-2f) is 3 / (8 ln 2).

    Args:
        mantissa_bits: stored bits m after the point; the sign and the exponent do not count.
    """
    return sqnr_db(2.0 ** (-2 * mantissa_bits) / 12 * 3 / (8 * math.log(2)))


def range_loss_db(ratio: float) -> float:
    """Return the SQNR lost inside the range when the range is `ratio` times as wide at equal bits: 20 log10(ratio)."""
    return 20 * math.log10(ratio)


def minimise(function: Callable[[float], float], *, low: float, high: float) -> float:
    """Return where a function of a positive number is least: a coarse geometric scan, then Brent's method.

    The scan finds the right valley where there are several narrower ones, as with floating-point tables.
    """
    # Imported here: scipy costs more time to import than the rest of the package.
    from scipy.optimize import minimize_scalar

    last = 63
    scan = [low * (high / low) ** (i / last) for i in range(last)] + [high]
    best = min(range(last + 1), key=lambda i: function(scan[i]))
    found = minimize_scalar(
        lambda x: function(float(x)),
        bounds=(scan[max(best - 1, 0)], scan[min(best + 1, last)]),
        method="bounded",
        options={"xatol": 1e-9 * high},
    )
    return float(found.x)


def _cells(
    levels: Sequence[float], thresholds: Sequence[float] | None, scale: float
) -> list[tuple[float, float, float]]:
    """Value, lower and upper border of each cell, ascending."""
    values = sorted(set(levels))
    borders = midpoints(values) if thresholds is None else tuple(thresholds)
    if not values or not scale > 0:
        raise RecipeError(f"theory: needs at least one level and a positive scale, not {len(values)} and {scale}.")
    if len(borders) != len(values) - 1 or list(borders) != sorted(borders):
        raise RecipeError(f"theory: {len(values)} levels need {len(values) - 1} ascending thresholds between them.")
    ends = [-math.inf, *(scale * border for border in borders), math.inf]
    return [(scale * value, low, high) for value, (low, high) in zip(values, pairwise(ends), strict=True)]


def _error(distribution: Distribution, value: float, low: float, high: float) -> float:
    if not low < high:
        return 0.0
    mass, first, second = distribution.moments(low, high)
    return max(0.0, second - 2 * value * first + value * value * mass)
