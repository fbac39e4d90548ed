"""Distributions of mean 0 and variance 1, by their partial moments: what the theory of quantization error needs.

Whoever replaces every x between a and b by one value v makes a squared error that is a quadratic in v,

    ∫ (x - v)² p(x) dx = M2 - 2 v M1 + v² M0,    Mk = ∫ x^k p(x) dx,    both from a to b,

so that closed forms of M0, M1 and M2 give the exact error of every quantizer, uniform or not, at any number of bits.
All distributions here are symmetric, and are described by their upper tail: P(x > c), E[x; x > c] and E[x²; x > c]. A
tail keeps its leading digits however far out it is, where a difference from 1 would lose them.

Gaussian is what the weights of a layer resemble; Laplace has heavier tails (excess kurtosis 3) and stands for whole
tensors of rows with different sizes; Student's t has tails that fall as a power, as activations with outliers do; the
uniform distribution has no tail and is where the rules of thumb are exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from bitwright.errors import RecipeError


class Moments(NamedTuple):
    """∫ x^k p(x) dx over an interval, for k = 0, 1 and 2."""

    mass: float
    first: float
    second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """A symmetric distribution of mean 0 and variance 1.

    Args:
        name: for messages and tables.
        support: largest magnitude; inf when unbounded.
        entropy_bits: differential entropy -∫ p log2 p.
        density: x >= 0 to p(x).
        tail: c >= 0 to the moments over x > c.
        tail_quantile: p in (0, 1/2] to the c >= 0 with P(x > c) = p.
    """

    name: str
    support: float
    entropy_bits: float
    density: Callable[[float], float]
    tail: Callable[[float], Moments]
    tail_quantile: Callable[[float], float]

    def moments(self, low: float, high: float) -> Moments:
        """Return the moments over low <= x <= high; either end may be infinite."""
        if low >= 0:
            near, far = self.tail(low), self.tail(high)
            return Moments(near.mass - far.mass, near.first - far.first, near.second - far.second)
        if high <= 0:
            mirrored = self.moments(-high, -low)
            return Moments(mirrored.mass, -mirrored.first, mirrored.second)
        below, above = self.tail(-low), self.tail(high)
        return Moments(1 - below.mass - above.mass, below.first - above.first, 1 - below.second - above.second)

    def tail_probability(self, c: float) -> float:
        """Return P(x > c), c >= 0."""
        return self.tail(c).mass

    def tail_mse(self, c: float) -> float:
        """Return E[(x - c)²; x > c], c >= 0: the error of one side clamped to c."""
        if math.isinf(c):
            return 0.0
        mass, first, second = self.tail(c)
        return max(0.0, second - 2 * c * first + c * c * mass)

    def quantile(self, probability: float) -> float:
        """Return the x with P(X <= x) = probability.

        Raises:
            RecipeError: a probability outside (0, 1).
        """
        if not 0 < probability < 1:
            raise RecipeError(f"quantile of the {self.name} distribution: {probability} is outside (0, 1).")
        if probability <= 0.5:
            return -self.tail_quantile(probability)
        return self.tail_quantile(1 - probability)


def student_t(degrees: float) -> Distribution:
    """Return Student's t distribution with `degrees` degrees of freedom, scaled to variance 1.

    Raises:
        RecipeError: two degrees or fewer, where the variance is infinite.
    """
    if not degrees > 2:
        raise RecipeError(f"student_t: {degrees} degrees of freedom have no variance. Use more than 2.")
    # Imported here: scipy costs more time to import than the rest of the package.
    from scipy.special import digamma, stdtr, stdtrit

    nu = degrees
    unit = math.sqrt((nu - 2) / nu)  # The standard deviation of the usual t is 1 / unit.
    log_beta = math.lgamma(nu / 2) + math.lgamma(0.5) - math.lgamma((nu + 1) / 2)

    def standard_density(t: float) -> float:
        return math.exp(-(nu + 1) / 2 * math.log1p(t * t / nu) - log_beta) / math.sqrt(nu)

    def tail(c: float) -> Moments:
        if math.isinf(c):
            return Moments(0.0, 0.0, 0.0)
        t = c / unit
        mass = float(stdtr(nu, -t))
        first = (nu + t * t) / (nu - 1) * standard_density(t)
        # Integration by parts of t · (t p).
        second = (nu - 1) / (nu - 2) * t * first + nu / (nu - 2) * mass
        return Moments(mass, unit * first, unit * unit * second)

    half = (nu + 1) / 2
    nats = half * (float(digamma(half)) - float(digamma(nu / 2))) + 0.5 * math.log(nu) + log_beta + math.log(unit)
    return Distribution(
        name=f"Student t, {degrees:g} degrees",
        support=math.inf,
        entropy_bits=nats / math.log(2),
        density=lambda x: standard_density(x / unit) / unit,
        tail=tail,
        tail_quantile=lambda p: -unit * float(stdtrit(nu, p)),
    )


_HALF_WIDTH = math.sqrt(3.0)
_DECAY = math.sqrt(2.0)
_NORMAL = NormalDist()


def _uniform_tail(c: float) -> Moments:
    if c >= _HALF_WIDTH:
        return Moments(0.0, 0.0, 0.0)
    density = 0.5 / _HALF_WIDTH
    rest = _HALF_WIDTH - c
    return Moments(
        density * rest,
        density * rest * (_HALF_WIDTH + c) / 2,
        density * rest * (_HALF_WIDTH**2 + _HALF_WIDTH * c + c * c) / 3,
    )


def _gaussian_density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gaussian_tail(c: float) -> Moments:
    if math.isinf(c):
        return Moments(0.0, 0.0, 0.0)
    mass, density = 0.5 * math.erfc(c / math.sqrt(2.0)), _gaussian_density(c)
    return Moments(mass, density, mass + c * density)


def _laplace_tail(c: float) -> Moments:
    if math.isinf(c):
        return Moments(0.0, 0.0, 0.0)
    mass, mean_excess = 0.5 * math.exp(-_DECAY * c), 1 / _DECAY
    return Moments(mass, mass * (c + mean_excess), mass * (c * c + 2 * c * mean_excess + 2 * mean_excess**2))


UNIFORM = Distribution(
    name="uniform",
    support=_HALF_WIDTH,
    entropy_bits=math.log2(2 * _HALF_WIDTH),
    density=lambda x: 0.5 / _HALF_WIDTH if x <= _HALF_WIDTH else 0.0,
    tail=_uniform_tail,
    tail_quantile=lambda p: _HALF_WIDTH * (1 - 2 * p),
)
GAUSSIAN = Distribution(
    name="gaussian",
    support=math.inf,
    entropy_bits=0.5 * math.log2(2 * math.pi * math.e),
    density=_gaussian_density,
    tail=_gaussian_tail,
    tail_quantile=lambda p: -_NORMAL.inv_cdf(p),
)
LAPLACE = Distribution(
    name="laplace",
    support=math.inf,
    entropy_bits=math.log2(math.sqrt(2.0) * math.e),
    density=lambda x: math.exp(-_DECAY * x) / _DECAY,
    tail=_laplace_tail,
    tail_quantile=lambda p: -math.log(2 * p) / _DECAY,
)
