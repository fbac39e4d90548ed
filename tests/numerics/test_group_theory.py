"""Predicted errors of groups against the package's own grids, closed forms of extremes, and samples."""

import math
from functools import cache

import pytest
import torch
from scipy.integrate import quad

from bitwright.errors import RecipeError
from bitwright.numerics import group_theory, theory
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, UNIFORM, Distribution, student_t
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.group_theory import MinMax, Rounding
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M1
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.table import NF4

NUM_SAMPLES = 2**20
TAILED = pytest.mark.parametrize("distribution", [GAUSSIAN, LAPLACE], ids=lambda d: d.name)
FP4 = sorted(set(E2M1.decode(torch.arange(16, dtype=torch.uint8), None).tolist()))


@cache
def sample(distribution: Distribution) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if distribution is GAUSSIAN:
        return torch.randn(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    uniform = torch.rand(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    magnitude = -torch.log(2 * torch.minimum(uniform, 1 - uniform)) / math.sqrt(2)
    return torch.where(uniform < 0.5, -magnitude, magnitude)


def nearest(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    table = torch.tensor(levels, dtype=torch.float64)
    return table[torch.bucketize(x, (table[1:] + table[:-1]) / 2)]


def assert_group_means(errors: torch.Tensor, expected: float, model_error: float = 0.002) -> None:
    """Compare the mean of per-group errors: 5 standard errors, the quadrature's error, and float64's."""
    tolerance = 5 * errors.std().item() / math.sqrt(errors.numel()) + model_error * expected + 1e-15
    assert errors.mean().item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("num_samples", [1, 2, 16, 128, 4096, 10**7])
def test_expected_extremes_in_closed_form(num_samples: int) -> None:
    root3 = math.sqrt(3)
    assert group_theory.expected_absmax(UNIFORM, num_samples) == pytest.approx(root3 * num_samples / (num_samples + 1))
    # The largest of n exponentials is the sum of n independent ones with rates n, n-1, ..., 1.
    if num_samples <= 4096:
        mean = sum(1 / k for k in range(1, num_samples + 1)) / math.sqrt(2)
        variance = sum(1 / k**2 for k in range(1, num_samples + 1)) / 2
        assert group_theory.expected_absmax(LAPLACE, num_samples) == pytest.approx(mean)
        assert group_theory.expected_absmax(LAPLACE, num_samples, power=2) == pytest.approx(variance + mean**2)


@pytest.mark.parametrize("distribution", [GAUSSIAN, LAPLACE, student_t(5)], ids=lambda d: d.name)
@pytest.mark.parametrize("num_samples", [1, 2, 5, 64])
def test_expected_absmax_by_the_density_of_the_largest_magnitude(distribution: Distribution, num_samples: int) -> None:
    def integrand(m: float) -> float:
        inside = 1 - 2 * distribution.tail_probability(m)
        return num_samples * m * 2 * distribution.density(m) * inside ** (num_samples - 1)

    expected = quad(integrand, 0, 4)[0] + quad(integrand, 4, math.inf)[0]
    assert group_theory.expected_absmax(distribution, num_samples) == pytest.approx(expected)
    assert group_theory.expected_absmax(distribution, 1, power=2) == pytest.approx(1.0)


def test_expected_absmax_of_two_gaussians() -> None:
    assert group_theory.expected_absmax(GAUSSIAN, 2) == pytest.approx(2 / math.sqrt(math.pi))


@TAILED
@pytest.mark.parametrize("group_size", [32, 128])
def test_expected_absmax_of_samples(distribution: Distribution, group_size: int) -> None:
    largest = sample(distribution).reshape(-1, group_size).abs().amax(1)
    assert_group_means(largest, group_theory.expected_absmax(distribution, group_size), 0)
    assert_group_means(largest.square(), group_theory.expected_absmax(distribution, group_size, power=2), 0)


@TAILED
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (2, 128), (3, 128), (4, 32), (4, 128), (6, 128)])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "restricted"])
def test_min_max_rounding_of_this_package(distribution: Distribution, bits: int, group_size: int, kind: MinMax) -> None:
    x = sample(distribution).float().reshape(-1, 4096)
    format = IntegerFormat(bits=bits, symmetric=kind != "asymmetric", full_range=kind != "restricted")
    grid = fit_grid(x, format, Granularity(kind="group", group_size=group_size), method="minmax")
    errors = (x - grid.fake_quantize(x)).double().square().reshape(-1, group_size).mean(1)
    predicted = group_theory.minmax_mse(distribution, bits=bits, group_size=group_size, kind=kind)
    assert_group_means(errors, predicted, 0.01)


@TAILED
@pytest.mark.parametrize("group_size", [1, 16, 64])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_tables_scaled_by_the_largest_weight(distribution: Distribution, group_size: int, table: str) -> None:
    levels = list(NF4.levels) if table == "nf4" else FP4
    groups = sample(distribution).reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / max(levels)
    values = nearest(groups / scale, levels)
    errors = (groups - scale * values).square().mean(1)
    assert_group_means(errors, group_theory.absmax_mse(distribution, levels, group_size))
    predicted = group_theory.absmax_code_probabilities(distribution, levels, group_size)
    assert sum(predicted) == pytest.approx(1.0, abs=1e-4)
    for level, share in zip(sorted(levels), predicted, strict=True):
        assert_group_means((values == level).double().mean(1), share, 0.005)


@TAILED
def test_the_best_table_of_a_group_size_beats_the_others(distribution: Distribution) -> None:
    best = group_theory.absmax_optimal_levels(distribution, 16, 64)
    assert [-level for level in reversed(best)] == pytest.approx(best, abs=1e-4)
    groups = sample(distribution).reshape(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)

    def measured(levels: list[float]) -> float:
        return (groups - scale * nearest(groups / scale, levels)).square().mean().item()

    least = measured(list(best))
    assert least < measured(list(NF4.levels))
    for factor in (0.97, 1.03):
        assert least < measured([factor * level for level in best])
        bent = [math.copysign(abs(level) ** factor, level) for level in best]
        assert least < measured(bent)


@TAILED
@pytest.mark.parametrize(
    ("mantissa_bits", "divisor", "rounding"),
    [(0, 4.0, "down"), (0, 6.0, "up"), (0, 6.0, "nearest"), (3, 6.0, "nearest"), (0, 6.0, "best")],
)
def test_block_scales(distribution: Distribution, mantissa_bits: int, divisor: float, rounding: Rounding) -> None:
    groups = sample(distribution)[: 2**18].reshape(-1, 32)
    largest = groups.abs().amax(1, keepdim=True)
    # Averaged over the size of the weights, as the prediction is; in exact powers of two per phase.
    errors = torch.zeros(groups.shape[0], dtype=torch.float64)
    for phase in range(8):
        size = 2.0 ** (phase / 8)
        step = largest * size / divisor
        unit = torch.exp2(torch.floor(torch.log2(step)) - mantissa_bits)
        rounded = {
            "down": [torch.floor],
            "up": [torch.ceil],
            "nearest": [torch.round],
            "best": [torch.floor, torch.ceil],
        }
        candidates = [
            (groups - nearest(groups * size / scale, FP4) * scale / size).square().mean(1)
            for scale in (unit * rule(step / unit) for rule in rounded[rounding])
        ]
        errors += torch.stack(candidates).amin(0) / 8
    predicted = group_theory.microscaling_mse(
        distribution, FP4, group_size=32, mantissa_bits=mantissa_bits, rounding=rounding, divisor=divisor
    )
    assert_group_means(errors, predicted, 0.01)


def test_block_scales_of_many_bits_are_exact_scales() -> None:
    exact = group_theory.absmax_mse(GAUSSIAN, FP4, 32)
    for rounding in ("up", "down", "nearest"):
        fine = group_theory.microscaling_mse(GAUSSIAN, FP4, group_size=32, mantissa_bits=12, rounding=rounding)
        assert fine == pytest.approx(exact, rel=1e-3)


def test_smaller_groups_have_smaller_errors() -> None:
    for kind in ("asymmetric", "symmetric", "restricted"):
        errors = [group_theory.minmax_mse(LAPLACE, bits=4, group_size=g, kind=kind) for g in (16, 64, 256, 4096)]
        assert errors == sorted(errors)
    # At many bits the error is s²/12 of the largest weight: the gain is the ratio of the squared extremes.
    ratio = group_theory.expected_absmax(GAUSSIAN, 1024, power=2) / group_theory.expected_absmax(GAUSSIAN, 64, power=2)
    small, large = (group_theory.minmax_mse(GAUSSIAN, bits=8, group_size=g, kind="restricted") for g in (64, 1024))
    # The largest weight of a group has no error at all.
    assert large / small == pytest.approx(ratio * (1023 / 1024) / (63 / 64), rel=2e-3)


def test_wrong_arguments() -> None:
    with pytest.raises(RecipeError, match="at least 1 weights"):
        group_theory.expected_absmax(GAUSSIAN, 0)
    with pytest.raises(RecipeError, match="at least 2 weights"):
        group_theory.minmax_mse(GAUSSIAN, bits=4, group_size=1, kind="symmetric")
    with pytest.raises(RecipeError, match="at least 2 bits"):
        group_theory.minmax_mse(GAUSSIAN, bits=1, group_size=32, kind="restricted")
    with pytest.raises(RecipeError, match="a level besides 0"):
        group_theory.absmax_mse(GAUSSIAN, [0.0], 32)
    with pytest.raises(RecipeError, match="at least two levels"):
        group_theory.absmax_optimal_levels(GAUSSIAN, 1, 32)


def test_the_min_max_range_of_a_tensor_is_set_by_its_extreme() -> None:
    # 2^24 weights: half the range is beyond 5 standard deviations, where almost nothing lies.
    mse = group_theory.minmax_mse(GAUSSIAN, bits=8, group_size=2**24, kind="restricted")
    step = group_theory.expected_absmax(GAUSSIAN, 2**24) / 127
    assert mse == pytest.approx(theory.rounding_mse(step), rel=0.01)
