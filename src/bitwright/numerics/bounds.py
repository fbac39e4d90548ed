"""How good tables and codes can be: equal occupation, Panter and Dite, entropy coding, and Shannon's bound.

At b bits per weight, from worst to best for one weight at a time:

- Equal occupation: the thresholds are quantiles, every code is used equally often and carries b bits. That is the
  optimum for the entropy of the codes and for nothing else: the outermost cells are wide, and the error is in them.
- Uniform with the best range (`theory.optimal_clip`): a bit is worth less than 6.02 dB, since the range grows with b.
- Lloyd-Max (`lloyd_max.optimal_levels`): no table of 2^b levels errs less. For many levels their density is p^(1/3),
  between the p of equal occupation and the constant of a uniform grid, and the error (1/12) (∫ p^(1/3))³ 2^(-2b):
  Panter and Dite.
- Entropy-coded uniform: a grid without end whose codes are compressed to b bits on average. At high rate its error is
  a factor πe/6 (1.53 dB, a quarter of a bit) above Shannon's bound, whatever the distribution.
- Shannon's bound 2^(2h) / (2πe) 2^(-2b), h the differential entropy: no quantizer of any kind, with blocks of any
  length, errs less. For the Gaussian it is 2^(-2b).

Reference: Panter and Dite, 1951; Gish and Pierce, Asymptotically efficient quantizing, 1968; Cover and Thomas, Elements
of information theory, chapter 10.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from bitwright.errors import RecipeError
from bitwright.numerics.distributions import Distribution
from bitwright.numerics.theory import grid_entropy, levels_mse

HIGH_RATE_GAP_DB = 10 * math.log10(math.pi * math.e / 6)

# Beyond the last level of a grid without end lies no more than this share of the values.
_NEGLIGIBLE = 1e-14
_MAX_CODES = 2**16


def shannon_mse(distribution: Distribution, *, bits: float) -> float:
    """Return Shannon's lower bound on the error at `bits` per value; for the Gaussian it can be approached."""
    return 2.0 ** (2 * (distribution.entropy_bits - bits)) / (2 * math.pi * math.e)


def panter_dite_mse(distribution: Distribution, *, bits: float) -> float:
    """Return the error of the best table of 2^bits levels in the limit of many levels."""
    # Imported here: scipy costs more time to import than the rest of the package.
    from scipy.integrate import quad

    half = quad(lambda x: distribution.density(x) ** (1 / 3), 0, distribution.support)[0]
    return float((2 * half) ** 3 / 12 * 4.0**-bits)


def equal_occupation(distribution: Distribution, num_levels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return levels and thresholds of equally likely cells; every level is the mean of its cell, the best there is.

    Raises:
        RecipeError: fewer than one level.
    """
    if num_levels < 1:
        raise RecipeError(f"equal_occupation: needs at least one level, not {num_levels}.")
    thresholds = tuple(distribution.quantile(i / num_levels) for i in range(1, num_levels))
    cells = pairwise([-math.inf, *thresholds, math.inf])
    return tuple(num_levels * distribution.moments(a, b).first for a, b in cells), thresholds


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyCoded:
    """A uniform grid without end whose codes are entropy-coded.

    Args:
        step: distance of neighbours, in standard deviations.
        bits: entropy of the codes.
        mse: in units of the variance.
    """

    step: float
    bits: float
    mse: float


def entropy_coded(distribution: Distribution, *, bits: float) -> EntropyCoded:
    """Return the grid of all multiples of a step whose codes have an entropy of `bits`.

    Raises:
        RecipeError: bits not positive, or so many that the tail would need more than 2^16 codes.
    """
    if not bits > 0:
        raise RecipeError(f"entropy_coded: needs a positive number of bits, not {bits}.")
    # Imported here: scipy costs more time to import than the rest of the package.
    from scipy.optimize import root_scalar

    reach = min(distribution.support, distribution.tail_quantile(_NEGLIGIBLE))
    # The entropy of a fine grid is h - log2(step); that of a coarse one falls more slowly.
    guess = 2.0 ** (distribution.entropy_bits - bits)
    if 8 * reach / guess > _MAX_CODES:
        raise RecipeError(f"entropy_coded: {bits} bits of the {distribution.name} distribution need too many codes.")

    def levels(step: float) -> list[float]:
        last = math.ceil(reach / step)
        return [step * code for code in range(-last, last + 1)]

    def excess(step: float) -> float:
        return grid_entropy(distribution, levels(step)) - bits

    step = float(root_scalar(excess, bracket=(guess / 4, 16 * guess), method="brentq", xtol=1e-12).root)
    grid = levels(step)
    return EntropyCoded(step=step, bits=grid_entropy(distribution, grid), mse=levels_mse(distribution, grid))
