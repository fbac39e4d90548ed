"""Predicted and measured error side by side. Tolerances are five standard errors of the measured mean."""

import math

import pytest
import torch

from bitwright.errors import RecipeError
from bitwright.numerics import theory
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.theory import GAUSSIAN, LAPLACE, UNIFORM, Distribution

NUM_SAMPLES = 2**20
DISTRIBUTIONS = pytest.mark.parametrize("distribution", [UNIFORM, GAUSSIAN, LAPLACE], ids=lambda d: d.name)


def sample(distribution: Distribution) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    if distribution is UNIFORM:
        return (2 * uniform - 1) * math.sqrt(3)
    if distribution is GAUSSIAN:
        return torch.randn(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(NUM_SAMPLES, generator=generator) < 0.5, -1.0, 1.0)
    return sign * -torch.log1p(-uniform) / math.sqrt(2)


def assert_mean(samples: torch.Tensor, expected: float, model_error: float = 0.0) -> None:
    tolerance = 5 * samples.std().item() / math.sqrt(samples.numel()) + model_error
    assert samples.mean().item() == pytest.approx(expected, abs=tolerance)


@DISTRIBUTIONS
@pytest.mark.parametrize("clip", [0.3, 1.0, 1.7, 2.5, 4.0])
def test_closed_forms_of_the_tails(distribution: Distribution, clip: float) -> None:
    x = sample(distribution)
    assert_mean((x > clip).double(), distribution.tail_probability(clip))
    assert_mean((x - clip).clamp(min=0).square(), distribution.tail_mse(clip))
    assert_mean((x - x.clamp(-clip, clip)).square(), theory.clipping_mse(distribution, lower=-clip, upper=clip))


@DISTRIBUTIONS
def test_the_variance_is_one(distribution: Distribution) -> None:
    assert 2 * distribution.tail_mse(0.0) == pytest.approx(1.0)
    assert distribution.tail_probability(0.0) == pytest.approx(0.5)


@DISTRIBUTIONS
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("relative_clip", [0.6, 1.0])
def test_total_error_of_a_grid_between_plus_and_minus_clip(
    distribution: Distribution, bits: int, relative_clip: float
) -> None:
    clip = relative_clip * theory.optimal_clip(distribution, bits=bits)
    x, step = sample(distribution), 2 * clip / (2**bits - 1)
    measured = (torch.round((x + clip) / step).clamp(0, 2**bits - 1) * step - clip - x).square()
    # Bennett's flat density errs by order s²: relative to the rounding error at most s²/6 for these three.
    model_error = theory.rounding_mse(step) * step * step / 6
    assert_mean(measured, theory.total_mse(distribution, bits=bits, clip=clip), model_error)


@DISTRIBUTIONS
@pytest.mark.parametrize("full_range", [True, False])
def test_the_grids_of_this_package_have_the_predicted_error(distribution: Distribution, full_range: bool) -> None:
    # The edge of the uniform distribution falls on the border of a cell, as the theory asks for.
    format, step = IntegerFormat(bits=5, symmetric=True, full_range=full_range), math.sqrt(3) / 8.5
    grid = Grid(
        format=format,
        granularity=Granularity(kind="tensor"),
        in_features=1024,
        scale=torch.tensor([[step]]),
        zero_point=None,
    )
    x = sample(distribution).float().reshape(-1, 1024)
    predicted = theory.grid_mse(distribution, lower=format.qmin * step, upper=format.qmax * step, step=step)
    assert_mean((x - grid.fake_quantize(x)).double().square(), predicted, theory.rounding_mse(step) * step * step / 6)


@pytest.mark.parametrize(("bits", "value"), [(2, 1.4935), (3, 2.0513), (4, 2.5139), (5, 2.9160), (8, 3.9216)])
def test_optimal_clip_of_the_gaussian(bits: int, value: float) -> None:
    clip = theory.optimal_clip(GAUSSIAN, bits=bits)
    assert clip == pytest.approx(value, abs=6e-3)
    best = theory.total_mse(GAUSSIAN, bits=bits, clip=clip)
    assert best < theory.total_mse(GAUSSIAN, bits=bits, clip=clip * 1.01)
    assert best < theory.total_mse(GAUSSIAN, bits=bits, clip=clip / 1.01)


def test_optimal_clip_agrees_with_the_published_uniform_quantizer_of_16_levels() -> None:
    # Max (1960): step 0.3352 and mean squared error 0.01154 for N(0, 1).
    clip = theory.optimal_clip(GAUSSIAN, bits=4)
    assert 2 * clip / 15 == pytest.approx(0.3352, abs=2e-4)
    assert theory.total_mse(GAUSSIAN, bits=4, clip=clip) == pytest.approx(0.01154, rel=5e-3)


@DISTRIBUTIONS
def test_measured_error_is_least_at_the_predicted_clip(distribution: Distribution) -> None:
    x, clip = sample(distribution), theory.optimal_clip(distribution, bits=4)

    def measured(c: float) -> float:
        step = 2 * c / 15
        return (torch.round((x + c) / step).clamp(0, 15) * step - c - x).square().mean().item()

    assert measured(clip) < min(measured(clip * 1.1), measured(clip * 0.9))


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_inputs_gain_six_decibels_per_bit(bits: int) -> None:
    # The best grid leaves half a step beyond its last value: cells tile the support and the error is s²/12 exactly.
    clip = math.sqrt(3) * (1 - 2.0**-bits)
    assert theory.optimal_clip(UNIFORM, bits=bits) == pytest.approx(clip, abs=1e-5)
    assert theory.predicted_sqnr_db(UNIFORM, bits=bits, clip=clip) == pytest.approx(20 * math.log10(2) * bits)


def test_heavier_tails_clip_wider_and_gain_less_per_bit() -> None:
    for bits in range(2, 9):
        clips = [theory.optimal_clip(d, bits=bits) for d in (UNIFORM, GAUSSIAN, LAPLACE)]
        assert clips == sorted(clips)
        assert clips[2] > clips[1]

    def best(d: Distribution, bits: int) -> float:
        return theory.predicted_sqnr_db(d, bits=bits, clip=theory.optimal_clip(d, bits=bits))

    gains = [best(d, 8) - best(d, 7) for d in (UNIFORM, GAUSSIAN, LAPLACE)]
    assert gains[0] == pytest.approx(20 * math.log10(2))
    assert gains[0] > gains[1] > gains[2] > 4


def test_wrong_arguments() -> None:
    with pytest.raises(RecipeError, match="needs bits >= 1 and clip > 0"):
        theory.total_mse(GAUSSIAN, bits=0, clip=1.0)
    with pytest.raises(RecipeError, match="needs bits >= 1 and clip > 0"):
        theory.total_mse(GAUSSIAN, bits=4, clip=0.0)
