"""The order of the bounds, closed forms, and limits at high rate."""

import math

import pytest
import torch

from bitwright.errors import RecipeError
from bitwright.numerics import bounds, theory
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, UNIFORM, Distribution, student_t
from bitwright.numerics.entropy import gaussian_distortion
from bitwright.numerics.lloyd_max import optimal_levels

DISTRIBUTIONS = pytest.mark.parametrize("distribution", [UNIFORM, GAUSSIAN, LAPLACE], ids=lambda d: d.name)
TAILED = pytest.mark.parametrize("distribution", [GAUSSIAN, LAPLACE], ids=lambda d: d.name)


@pytest.mark.parametrize("bits", [0.5, 1, 4])
def test_shannons_bound_for_the_gaussian_is_its_rate_distortion_function(bits: float) -> None:
    assert bounds.shannon_mse(GAUSSIAN, bits=bits) == pytest.approx(gaussian_distortion(1.0, bits))


def test_shannons_bound_is_the_entropy_power() -> None:
    # 2^(2h) = (2e²) for Laplace of variance 1 and 12 for the uniform.
    assert bounds.shannon_mse(LAPLACE, bits=0) == pytest.approx(math.e / math.pi)
    assert bounds.shannon_mse(UNIFORM, bits=0) == pytest.approx(6 / (math.pi * math.e))


def test_panter_dite_in_closed_form() -> None:
    assert bounds.panter_dite_mse(GAUSSIAN, bits=3) == pytest.approx(math.sqrt(3) * math.pi / 2 / 64)
    assert bounds.panter_dite_mse(LAPLACE, bits=3) == pytest.approx(4.5 / 64)
    assert bounds.panter_dite_mse(UNIFORM, bits=3) == pytest.approx(1 / 64)


@TAILED
def test_lloyd_max_approaches_panter_dite(distribution: Distribution) -> None:
    def ratio(bits: int) -> float:
        return optimal_levels(distribution, bits).mse / bounds.panter_dite_mse(distribution, bits=bits)

    assert abs(ratio(5) - 1) < abs(ratio(3) - 1)
    assert ratio(5) == pytest.approx(1, abs=0.1)


@DISTRIBUTIONS
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_scalar_quantizer_beats_the_next_better_one(distribution: Distribution, bits: int) -> None:
    equal = theory.levels_mse(distribution, *bounds.equal_occupation(distribution, 2**bits))
    uniform = theory.total_mse(distribution, bits=bits, clip=theory.optimal_clip(distribution, bits=bits))
    lloyd = optimal_levels(distribution, bits).mse
    shannon = bounds.shannon_mse(distribution, bits=bits)
    # The uniform distribution has one best table, which all three find.
    assert shannon < lloyd <= uniform * (1 + 1e-9)
    assert lloyd <= equal * (1 + 1e-9)
    if distribution is not UNIFORM:
        assert lloyd < uniform < equal


@DISTRIBUTIONS
def test_equal_occupation(distribution: Distribution) -> None:
    levels, thresholds = bounds.equal_occupation(distribution, 8)
    assert theory.code_probabilities(distribution, levels, thresholds) == pytest.approx([1 / 8] * 8)
    assert theory.grid_entropy(distribution, levels, thresholds) == pytest.approx(3.0)
    # Each level is the best for its cell.
    best = theory.levels_mse(distribution, levels, thresholds)
    for index in range(8):
        for shift in (-0.01, 0.01):
            moved = [level + shift * (i == index) for i, level in enumerate(levels)]
            assert theory.levels_mse(distribution, moved, thresholds) > best


@DISTRIBUTIONS
@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0, 6.0])
def test_entropy_coded_grids_against_a_measurement(distribution: Distribution, bits: float) -> None:
    coded = bounds.entropy_coded(distribution, bits=bits)
    assert coded.bits == pytest.approx(bits, abs=1e-9)
    num_samples = 2**18
    uniform = (torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples
    x = torch.tensor([distribution.quantile(u) for u in uniform.tolist()], dtype=torch.float64)
    codes = torch.round(x / coded.step)
    assert (x - coded.step * codes).square().mean().item() == pytest.approx(coded.mse, rel=0.01)
    shares = torch.unique(codes, return_counts=True)[1].double() / num_samples
    assert theory.entropy_bits(shares.tolist()) == pytest.approx(bits, abs=0.01)


@TAILED
def test_the_gap_of_entropy_coding_is_a_quarter_of_a_bit_at_high_rate(distribution: Distribution) -> None:
    gaps = [
        10 * math.log10(bounds.entropy_coded(distribution, bits=bits).mse / bounds.shannon_mse(distribution, bits=bits))
        for bits in (4, 6, 8)
    ]
    gap_bits = bounds.HIGH_RATE_GAP_DB / theory.DB_PER_BIT
    assert gap_bits == pytest.approx(0.2546, abs=1e-4)
    assert gaps[-1] == pytest.approx(bounds.HIGH_RATE_GAP_DB, abs=1e-3)
    assert abs(gaps[2] - gaps[1]) < abs(gaps[1] - gaps[0])


@TAILED
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_entropy_coding_beats_every_table(distribution: Distribution, bits: int) -> None:
    assert bounds.entropy_coded(distribution, bits=bits).mse < optimal_levels(distribution, bits).mse


def test_wrong_arguments() -> None:
    with pytest.raises(RecipeError, match="positive number of bits"):
        bounds.entropy_coded(GAUSSIAN, bits=0)
    with pytest.raises(RecipeError, match="too many codes"):
        bounds.entropy_coded(student_t(3), bits=8)
    with pytest.raises(RecipeError, match="at least one level"):
        bounds.equal_occupation(GAUSSIAN, 0)
