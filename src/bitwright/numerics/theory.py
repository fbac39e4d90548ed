"""The error of a uniform grid, predicted from the distribution: what measurements are checked against.

Rounding. In a cell of width s the density is nearly flat, so that the rounding error is uniform on [-s/2, s/2]: mean 0,
variance s²/12. Clipping. A value beyond the outermost grid value c errs by its distance to c. Together, for a grid of
step s whose values run from `lower` to `upper` (exact up to the curvature of the density over a cell; the edge of the
uniform distribution is a jump and counts exactly only when it falls on the border of a cell):

    MSE = s²/12 · P(lower <= x <= upper) + E[(x - upper)²; x > upper] + E[(lower - x)²; x < lower]

A small range has fine steps and cuts the tails, a large one keeps the tails and has coarse steps: the optimum lies
where the two slopes cancel. With 2^b values from -c to c, s = 2c / (2^b - 1).

Every further bit halves s, divides s²/12 by 4 and so adds 10 log10(4) = 6.02 dB of SQNR, exactly so for uniform inputs
(SQNR = 6.02 b dB); with Gaussian or Laplace inputs the optimal c grows with b, and each bit is worth less than that.

Where published texts differ, and what is right:
- The optimal clip for N(0, 1) at 4 bits is often given as 2.55. That takes s = 2c / 2^b with c at the outer border of
  the last cell, yet counts clipping from c instead of from the last value c - s/2. Counted consistently the last value
  is at 2.514 (border at 2.68, as in the MSE-optimal uniform quantizer of 16 levels). At 8 bits both give 3.92.
- `q = round((r - z) / s)` with an integer z mixes units: r is a weight, z a code. Correct: `q = clamp(round(r/s) + z)`.
- A fake-quantize `s · round(x / s)`, without clamp and zero point, has no range: it never clips, whatever b is, and
  cannot predict the error of b bits. Correct: `s · (clamp(round(x/s) + z, qmin, qmax) - z)`.

Reference: Bennett, Spectra of quantized signals, 1948; ACIQ, arXiv:1810.05723 (clipping; the 2.55 above).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitwright.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """A symmetric distribution of mean 0 and variance 1.

    Args:
        name: for messages and tables.
        tail_probability: c >= 0 to P(x > c).
        tail_mse: c >= 0 to E[(x - c)²; x > c].
        support: largest magnitude; inf when unbounded.
    """

    name: str
    tail_probability: Callable[[float], float]
    tail_mse: Callable[[float], float]
    support: float


_HALF_WIDTH = math.sqrt(3.0)
_DECAY = math.sqrt(2.0)


def _uniform_tail_probability(c: float) -> float:
    return max(0.0, _HALF_WIDTH - c) / (2 * _HALF_WIDTH)


def _uniform_tail_mse(c: float) -> float:
    return max(0.0, _HALF_WIDTH - c) ** 3 / (6 * _HALF_WIDTH)


def _gaussian_tail_probability(c: float) -> float:
    return 0.5 * math.erfc(c / math.sqrt(2.0))


def _gaussian_tail_mse(c: float) -> float:
    density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return max(0.0, (c * c + 1) * _gaussian_tail_probability(c) - c * density)


def _laplace_tail_probability(c: float) -> float:
    return 0.5 * math.exp(-_DECAY * c)


def _laplace_tail_mse(c: float) -> float:
    return math.exp(-_DECAY * c) / _DECAY**2


UNIFORM = Distribution(
    name="uniform", tail_probability=_uniform_tail_probability, tail_mse=_uniform_tail_mse, support=_HALF_WIDTH
)
GAUSSIAN = Distribution(
    name="gaussian", tail_probability=_gaussian_tail_probability, tail_mse=_gaussian_tail_mse, support=math.inf
)
LAPLACE = Distribution(
    name="laplace", tail_probability=_laplace_tail_probability, tail_mse=_laplace_tail_mse, support=math.inf
)


def rounding_mse(step: float) -> float:
    """Variance s²/12 of the error of rounding to multiples of `step`."""
    return step * step / 12


def clipping_mse(distribution: Distribution, *, lower: float, upper: float) -> float:
    """Squared error of clamping to [lower, upper], lower <= 0 <= upper, in units of the variance."""
    return distribution.tail_mse(-lower) + distribution.tail_mse(upper)


def grid_mse(distribution: Distribution, *, lower: float, upper: float, step: float) -> float:
    """Rounding plus clipping error of the grid lower, lower + step, ..., upper.

    Args:
        distribution: of variance 1.
        lower: smallest grid value, <= 0, in standard deviations.
        upper: largest grid value, >= 0, in standard deviations.
        step: distance of neighbours, in standard deviations.
    """
    inside = 1 - distribution.tail_probability(-lower) - distribution.tail_probability(upper)
    return rounding_mse(step) * inside + clipping_mse(distribution, lower=lower, upper=upper)


def total_mse(distribution: Distribution, *, bits: int, clip: float) -> float:
    """Error of 2^bits values from -clip to clip, for variance 1.

    Raises:
        RecipeError: bits below 1 or clip not positive.
    """
    if bits < 1 or not clip > 0:
        raise RecipeError(f"theory: needs bits >= 1 and clip > 0, not {bits} and {clip}.")
    return grid_mse(distribution, lower=-clip, upper=clip, step=2 * clip / (2**bits - 1))


def predicted_sqnr_db(distribution: Distribution, *, bits: int, clip: float) -> float:
    """SQNR in dB of 2^bits values from -clip to clip; the signal's power is 1."""
    return -10 * math.log10(total_mse(distribution, bits=bits, clip=clip))


def optimal_clip(distribution: Distribution, *, bits: int) -> float:
    """Return the largest grid value, in standard deviations, that minimises `total_mse`."""
    # Imported here: scipy costs more time to import than the rest of the package, and only this function needs it.
    from scipy.optimize import minimize_scalar

    # No clip beyond 4 sqrt(bits) standard deviations pays at any bits >= 1, even for the Laplace tail.
    upper = min(distribution.support, 4.0 * bits)
    found = minimize_scalar(
        lambda clip: total_mse(distribution, bits=bits, clip=float(clip)),
        bounds=(1e-3, upper),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(found.x)
