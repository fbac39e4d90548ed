"""Closed forms against quadrature of the density, against scipy.stats, and against samples."""

import math
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from bitwright.errors import RecipeError
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, UNIFORM, Distribution, student_t

NUM_SAMPLES = 2**20
STUDENT_T3, STUDENT_T7 = student_t(3), student_t(7)
ORACLES: dict[Distribution, Any] = {
    UNIFORM: scipy.stats.uniform(loc=-math.sqrt(3), scale=2 * math.sqrt(3)),
    GAUSSIAN: scipy.stats.norm(),
    LAPLACE: scipy.stats.laplace(scale=1 / math.sqrt(2)),
    STUDENT_T3: scipy.stats.t(3, scale=math.sqrt(1 / 3)),
    STUDENT_T7: scipy.stats.t(7, scale=math.sqrt(5 / 7)),
}
EVERY = pytest.mark.parametrize("distribution", list(ORACLES), ids=lambda d: d.name)
INTERVALS = [(-math.inf, -1.2), (-3.0, -0.4), (-0.8, 0.0), (-0.7, 0.9), (0.0, 0.05), (0.5, 1.7), (1.0, math.inf)]


@cache
def sample(distribution: Distribution) -> torch.Tensor:
    """Independent values: the distribution's quantiles of uniform numbers."""
    generator = torch.Generator().manual_seed(1)
    if distribution is GAUSSIAN:
        return torch.randn(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    uniform = torch.rand(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    return torch.from_numpy(ORACLES[distribution].ppf(uniform.numpy()))


def assert_mean(samples: torch.Tensor, expected: float) -> None:
    assert samples.mean().item() == pytest.approx(expected, abs=5 * samples.std().item() / math.sqrt(samples.numel()))


@EVERY
@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_partial_moments_are_the_integrals_of_the_density(distribution: Distribution, low: float, high: float) -> None:
    # Pieces between the ends of the support, where the uniform density jumps, and 0, where Laplace's has its kink.
    borders = sorted({low, high, *(x for x in (-distribution.support, 0.0, distribution.support) if low < x < high)})
    for order, moment in enumerate(distribution.moments(low, high)):
        pieces = [
            quad(lambda x, k=order: x**k * distribution.density(abs(x)), a, b, limit=200)[0]
            for a, b in pairwise(borders)
        ]
        assert moment == pytest.approx(sum(pieces), rel=1e-7, abs=1e-10)


@EVERY
def test_mean_and_variance(distribution: Distribution) -> None:
    assert distribution.moments(-math.inf, math.inf) == pytest.approx((1.0, 0.0, 1.0))
    assert 2 * distribution.tail_mse(0.0) == pytest.approx(1.0)
    assert distribution.tail_probability(0.0) == pytest.approx(0.5)


@EVERY
@pytest.mark.parametrize("x", [0.0, 0.3, 1.0, 1.7, 4.0, 9.0])
def test_density_and_tail_agree_with_scipy(distribution: Distribution, x: float) -> None:
    oracle = ORACLES[distribution]
    assert distribution.density(x) == pytest.approx(float(oracle.pdf(x)))
    assert distribution.tail_probability(x) == pytest.approx(float(oracle.sf(x)), rel=1e-9)


@EVERY
@pytest.mark.parametrize("probability", [1e-9, 0.001, 0.2, 0.5, 0.7, 0.999])
def test_quantiles_agree_with_scipy_and_invert_the_tail(distribution: Distribution, probability: float) -> None:
    x = distribution.quantile(probability)
    assert x == pytest.approx(float(ORACLES[distribution].ppf(probability)), rel=1e-9, abs=1e-12)
    if probability <= 0.5:
        assert distribution.tail_probability(-x) == pytest.approx(probability, rel=1e-6)


@EVERY
def test_entropy_agrees_with_scipy(distribution: Distribution) -> None:
    assert distribution.entropy_bits == pytest.approx(float(ORACLES[distribution].entropy()) / math.log(2))


@EVERY
@given(ends=st.lists(st.floats(-20, 20), min_size=3, max_size=3).map(sorted))
def test_moments_of_neighbouring_intervals_add_up(distribution: Distribution, ends: list[float]) -> None:
    low, middle, high = ends
    parts = zip(distribution.moments(low, middle), distribution.moments(middle, high), strict=True)
    assert [a + b for a, b in parts] == pytest.approx(list(distribution.moments(low, high)), abs=1e-12)


@EVERY
@given(ends=st.lists(st.floats(-20, 20), min_size=2, max_size=2).map(sorted))
def test_moments_are_symmetric(distribution: Distribution, ends: list[float]) -> None:
    low, high = ends
    mass, first, second = distribution.moments(low, high)
    assert distribution.moments(-high, -low) == pytest.approx((mass, -first, second), abs=1e-15)


@EVERY
def test_a_far_tail_keeps_its_digits(distribution: Distribution) -> None:
    if distribution is UNIFORM:
        assert distribution.moments(2.0, 3.0) == (0.0, 0.0, 0.0)
        return
    mass = distribution.moments(12.0, math.inf).mass
    assert 0 < mass == pytest.approx(float(ORACLES[distribution].sf(12.0)), rel=1e-9)


@EVERY
@pytest.mark.parametrize("clip", [0.3, 1.0, 1.7, 2.5, 4.0])
def test_tails_of_samples(distribution: Distribution, clip: float) -> None:
    x = sample(distribution)
    assert_mean((x > clip).double(), distribution.tail_probability(clip))
    # The squared excess of three degrees of freedom has no variance, and its mean no standard error.
    if distribution is not STUDENT_T3:
        assert_mean((x - clip).clamp(min=0).square(), distribution.tail_mse(clip))


def test_wrong_arguments() -> None:
    for probability in (0.0, 1.0, math.nan):
        with pytest.raises(RecipeError, match="is outside"):
            GAUSSIAN.quantile(probability)
    with pytest.raises(RecipeError, match="have no variance"):
        student_t(2)
