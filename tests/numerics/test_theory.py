"""Predicted and measured error side by side, quadrature as the oracle of closed forms, and published constants."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from bitwright.errors import RecipeError
from bitwright.numerics import theory
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, UNIFORM, Distribution
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M1, E4M3, E5M2, MinifloatFormat

NUM_SAMPLES = 2**20
DISTRIBUTIONS = pytest.mark.parametrize("distribution", [UNIFORM, GAUSSIAN, LAPLACE], ids=lambda d: d.name)
TAILED = pytest.mark.parametrize("distribution", [GAUSSIAN, LAPLACE], ids=lambda d: d.name)


@cache
def sample(distribution: Distribution, *, stratified: bool = False) -> torch.Tensor:
    """Values of a distribution. Stratified, each of 2^20 equal slices of probability holds one at a random place."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(NUM_SAMPLES, generator=generator, dtype=torch.float64)
    if stratified:
        uniform = (uniform + torch.arange(NUM_SAMPLES)) / NUM_SAMPLES
    if distribution is UNIFORM:
        return (2 * uniform - 1) * math.sqrt(3)
    if distribution is GAUSSIAN:
        return torch.special.ndtri(uniform)
    magnitude = -torch.log(2 * torch.minimum(uniform, 1 - uniform)) / math.sqrt(2)
    return torch.where(uniform < 0.5, -magnitude, magnitude)


def squared_error(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """The error of 2^bits values from -clip to clip, by arithmetic that knows no cells."""
    last = 2**bits - 1
    step = 2 * clip / last
    return (torch.round((x + clip) / step).clamp(0, last) * step - clip - x).square()


def assert_mean(samples: torch.Tensor, expected: float) -> None:
    # Rounding of the grid itself in float64 is below 1e-15.
    tolerance = 5 * samples.std().item() / math.sqrt(samples.numel()) + 1e-15
    assert samples.mean().item() == pytest.approx(expected, abs=tolerance)


@TAILED
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip", [1.0, 1.7, 2.4, 3.2])
def test_rounding_and_clipping_are_within_five_percent(distribution: Distribution, bits: int, clip: float) -> None:
    x = sample(distribution, stratified=True)
    error, inside = squared_error(x, bits, clip), x.abs() <= clip
    rounding, clipping = (error * inside).mean().item(), (error * ~inside).mean().item()
    predicted = theory.levels_error(distribution, theory.uniform_levels(bits, clip))
    assert predicted.rounding == pytest.approx(rounding, rel=0.05)
    assert predicted.clipping == pytest.approx(clipping, rel=0.05)
    assert predicted.total == pytest.approx(rounding + clipping, rel=0.05)


@DISTRIBUTIONS
@pytest.mark.parametrize("bits", range(2, 9))
def test_total_error_at_the_best_clip_is_within_five_percent(distribution: Distribution, bits: int) -> None:
    clip = theory.optimal_clip(distribution, bits=bits)
    measured = squared_error(sample(distribution, stratified=True), bits, clip).mean().item()
    assert theory.total_mse(distribution, bits=bits, clip=clip) == pytest.approx(measured, rel=0.05)


@DISTRIBUTIONS
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("relative_clip", [0.3, 0.6, 1.0, 2.0])
def test_independent_samples_agree_within_their_standard_error(
    distribution: Distribution, bits: int, relative_clip: float
) -> None:
    clip = relative_clip * theory.optimal_clip(distribution, bits=bits)
    x = sample(distribution)
    error, inside = squared_error(x, bits, clip), x.abs() <= clip
    predicted = theory.levels_error(distribution, theory.uniform_levels(bits, clip))
    assert_mean(error * inside, predicted.rounding)
    # A handful of clipped values has no usable standard error.
    if int((~inside).sum()) > 1000:
        assert_mean(error * ~inside, predicted.clipping)


@DISTRIBUTIONS
@pytest.mark.parametrize("full_range", [True, False])
def test_the_grids_of_this_package_have_the_predicted_error(distribution: Distribution, full_range: bool) -> None:
    format, step = IntegerFormat(bits=5, symmetric=True, full_range=full_range), 0.21
    grid = Grid(
        format=format,
        granularity=Granularity(kind="tensor"),
        in_features=1024,
        scale=torch.tensor([[step]]),
        zero_point=None,
    )
    x = sample(distribution).float().reshape(-1, 1024)
    predicted = theory.levels_mse(distribution, range(format.qmin, format.qmax + 1), scale=step)
    assert_mean((x - grid.fake_quantize(x)).double().square().flatten(), predicted)


@DISTRIBUTIONS
@given(
    levels=st.lists(st.floats(-3, 3), min_size=1, max_size=6, unique=True).map(sorted),
    shifts=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    scale=st.floats(0.2, 2),
)
def test_any_levels_and_thresholds_against_quadrature(
    distribution: Distribution, levels: list[float], shifts: list[float], scale: float
) -> None:
    thresholds = [min(b, a + shift * (b - a)) for (a, b), shift in zip(pairwise(levels), shifts, strict=False)]
    end = min(distribution.support, 30.0)
    borders = [-end, *(max(-end, min(end, scale * t)) for t in thresholds), end]
    expected = [0.0, 0.0]
    for level, (low, high) in zip(levels, pairwise(borders), strict=True):
        # Also cut at the outermost levels, which separate rounding from clipping, and at the kink of Laplace.
        cuts = sorted({low, high, *(c for c in (scale * levels[0], 0.0, scale * levels[-1]) if low < c < high)})
        for a, b in pairwise(cuts):
            if b - a < 1e-12:  # too narrow to count, and quad warns of rounding
                continue
            integral = quad(lambda x, v=scale * level: (x - v) ** 2 * distribution.density(abs(x)), a, b, limit=200)[0]
            expected[not scale * levels[0] <= (a + b) / 2 <= scale * levels[-1]] += integral
    error = theory.levels_error(distribution, levels, thresholds, scale=scale)
    assert (error.rounding, error.clipping) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert theory.levels_mse(distribution, levels, thresholds, scale=scale) == pytest.approx(error.total)


@DISTRIBUTIONS
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8, unique=True), st.floats(0.05, 1))
def test_no_thresholds_beat_the_nearest_level(distribution: Distribution, levels: list[int], scale: float) -> None:
    values = sorted(levels)
    nearest = theory.levels_mse(distribution, levels, scale=scale)
    assert nearest == theory.levels_mse(distribution, values, theory.midpoints(values), scale=scale)
    for shift in (-0.3, 0.2):
        shifted = [t + shift for t in theory.midpoints(values)]
        assert nearest <= theory.levels_mse(distribution, values, shifted, scale=scale) + 1e-12


@DISTRIBUTIONS
@pytest.mark.parametrize("clip", [0.3, 1.0, 1.7])
def test_clipping_is_what_clamping_does(distribution: Distribution, clip: float) -> None:
    exact = theory.levels_error(distribution, theory.uniform_levels(4, clip)).clipping
    assert theory.clipping_mse(distribution, lower=-clip, upper=clip) == pytest.approx(exact)
    rule = theory.high_resolution_mse(distribution, lower=-clip, upper=clip, step=2 * clip / 15)
    assert rule.clipping == pytest.approx(exact)


def test_the_rule_of_thumb_is_good_for_narrow_cells_and_wrong_for_wide_ones() -> None:
    def ratio(distribution: Distribution, bits: int, clip: float) -> float:
        rule = theory.high_resolution_mse(distribution, lower=-clip, upper=clip, step=2 * clip / (2**bits - 1))
        return rule.rounding / theory.levels_error(distribution, theory.uniform_levels(bits, clip)).rounding

    for distribution in (GAUSSIAN, LAPLACE):
        for bits in (4, 5, 6, 8):
            assert ratio(distribution, bits, theory.optimal_clip(distribution, bits=bits)) == pytest.approx(1, rel=0.05)
        # A range that covers an outlier of 6 standard deviations has the 2-bit levels ±2 and ±6: far from most values.
        assert ratio(distribution, 2, 6.0) < 0.8
    assert ratio(LAPLACE, 2, theory.optimal_clip(LAPLACE, bits=2)) < 0.95


@pytest.mark.parametrize(
    ("bits", "step", "mse"), [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154), (5, 0.1881, 0.003495)]
)
def test_the_uniform_quantizers_of_max(bits: int, step: float, mse: float) -> None:
    # Max (1960), table II, to its last digit.
    clip = theory.optimal_clip(GAUSSIAN, bits=bits)
    assert 2 * clip / (2**bits - 1) == pytest.approx(step, abs=1e-4)
    assert theory.total_mse(GAUSSIAN, bits=bits, clip=clip) == pytest.approx(mse, rel=1e-3)


@DISTRIBUTIONS
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_best_clip_is_a_minimum(distribution: Distribution, bits: int) -> None:
    clip = theory.optimal_clip(distribution, bits=bits)
    best = theory.total_mse(distribution, bits=bits, clip=clip)
    assert best < theory.total_mse(distribution, bits=bits, clip=clip * 1.01)
    assert best < theory.total_mse(distribution, bits=bits, clip=clip / 1.01)


@DISTRIBUTIONS
def test_measured_error_is_least_at_the_predicted_clip(distribution: Distribution) -> None:
    x, clip = sample(distribution), theory.optimal_clip(distribution, bits=4)
    measured = [squared_error(x, 4, factor * clip).mean().item() for factor in (0.9, 1.0, 1.1)]
    assert measured[1] < min(measured[0], measured[2])


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_inputs_gain_six_decibels_per_bit(bits: int) -> None:
    # The best grid leaves half a step beyond its last value: cells tile the support and the error is s²/12 exactly.
    clip = math.sqrt(3) * (1 - 2.0**-bits)
    assert theory.optimal_clip(UNIFORM, bits=bits) == pytest.approx(clip, abs=1e-5)
    assert theory.total_mse(UNIFORM, bits=bits, clip=clip) == pytest.approx(
        theory.rounding_mse(2 * clip / (2**bits - 1))
    )
    assert theory.predicted_sqnr_db(UNIFORM, bits=bits, clip=clip) == pytest.approx(theory.DB_PER_BIT * bits)


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


def test_binary_and_ternary_scales() -> None:
    # Binary: E|x| and 1 - E|x|². Ternary Laplace: a cell that starts at c has its mean at c + 1/√2, which is 2c here.
    for distribution, mean in (
        (GAUSSIAN, math.sqrt(2 / math.pi)),
        (LAPLACE, math.sqrt(0.5)),
        (UNIFORM, math.sqrt(0.75)),
    ):
        assert theory.optimal_scale(distribution, (-1, 1)) == pytest.approx(mean, abs=1e-5)
        assert theory.levels_mse(distribution, (-1, 1), scale=mean) == pytest.approx(1 - mean**2)
    assert theory.optimal_scale(LAPLACE, (-1, 0, 1)) == pytest.approx(math.sqrt(2), abs=1e-5)
    assert theory.levels_mse(LAPLACE, (-1, 0, 1), scale=math.sqrt(2)) == pytest.approx(1 - 2 * math.exp(-1))
    # The three-level quantizer of Max (1960): levels ±1.224, error 0.1902.
    scale = theory.optimal_scale(GAUSSIAN, (-1, 0, 1))
    assert scale == pytest.approx(1.224, abs=1e-4)
    assert theory.levels_mse(GAUSSIAN, (-1, 0, 1), scale=scale) == pytest.approx(0.1902, abs=5e-5)


@DISTRIBUTIONS
def test_the_best_ternary_scale_is_the_mean_beyond_half_of_it(distribution: Distribution) -> None:
    scale = theory.optimal_scale(distribution, (-1, 0, 1))
    mass, first, _ = distribution.tail(scale / 2)
    assert first / mass == pytest.approx(scale, rel=1e-5)


def test_probabilities_and_entropy() -> None:
    levels = theory.uniform_levels(2, 1.5)
    probabilities = theory.code_probabilities(GAUSSIAN, levels)
    inner, outer = math.erf(1 / math.sqrt(2)) / 2, math.erfc(1 / math.sqrt(2)) / 2
    assert probabilities == pytest.approx((outer, inner, inner, outer))
    assert theory.grid_entropy(GAUSSIAN, levels) == pytest.approx(-2 * sum(p * math.log2(p) for p in (inner, outer)))
    tiling = [math.sqrt(3) * (2 * i - 7) / 8 for i in range(8)]
    assert theory.grid_entropy(UNIFORM, tiling) == pytest.approx(3.0)
    assert theory.entropy_bits([1.0, 0.0]) == 0
    # Fine steps: h - log2(step).
    fine = [0.01 * code for code in range(-1000, 1001)]
    assert theory.grid_entropy(GAUSSIAN, fine) == pytest.approx(GAUSSIAN.entropy_bits - math.log2(0.01), abs=1e-4)


def test_share_that_rounds_to_zero() -> None:
    x = sample(GAUSSIAN)
    for step in (0.2, 1.0, 3.0):
        assert_mean((torch.round(x / step) == 0).double(), theory.zeroed_share(GAUSSIAN, step=step))


@TAILED
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_float_formats_are_flat_over_magnitude(distribution: Distribution, format: MinifloatFormat) -> None:
    positive = format.decode(torch.arange(format.max_code + 1, dtype=torch.uint8), None).tolist()
    levels = [*(-value for value in positive), *positive]
    # Small values fall below the normals even where σ does not: they cost a few hundredths of a dB at most.
    expected = theory.float_sqnr_db(format.mantissa_bits)
    for octave in (0, 1, 2, 3):
        predictions = [
            theory.sqnr_db(theory.levels_mse(distribution, levels, scale=2.0 ** -(octave + phase / 8)))
            for phase in range(8)
        ]
        assert sum(predictions) / len(predictions) == pytest.approx(expected, abs=0.1)


def test_tables_match_a_measurement() -> None:
    values = E2M1.decode(torch.arange(16, dtype=torch.uint8), None)
    x, scale = sample(GAUSSIAN), 0.47
    error = (x - scale * E2M1.snap((x / scale).float(), None).double()).square()
    assert_mean(error, theory.levels_mse(GAUSSIAN, values.tolist(), scale=scale))


def test_a_wider_range_costs_its_ratio() -> None:
    # At 8 bits rounding is all there is: a range four times as wide costs two bits.
    narrow, wide = (theory.predicted_sqnr_db(GAUSSIAN, bits=8, clip=clip) for clip in (6.0, 24.0))
    assert narrow - wide == pytest.approx(theory.range_loss_db(4.0), abs=0.02)
    assert theory.range_loss_db(4.0) == pytest.approx(2 * theory.DB_PER_BIT)


def test_wrong_arguments() -> None:
    with pytest.raises(RecipeError, match="needs bits >= 1 and clip > 0"):
        theory.total_mse(GAUSSIAN, bits=0, clip=1.0)
    with pytest.raises(RecipeError, match="needs bits >= 1 and clip > 0"):
        theory.total_mse(GAUSSIAN, bits=4, clip=0.0)
    with pytest.raises(RecipeError, match="at least one level"):
        theory.levels_error(GAUSSIAN, ())
    with pytest.raises(RecipeError, match="a positive scale"):
        theory.levels_mse(GAUSSIAN, (0.0, 1.0), scale=-1.0)
    with pytest.raises(RecipeError, match="2 ascending thresholds"):
        theory.levels_error(GAUSSIAN, (0, 1, 2), (0.5,))
    with pytest.raises(RecipeError, match="2 ascending thresholds"):
        theory.levels_error(GAUSSIAN, (0, 1, 2), (1.5, 0.5))
    with pytest.raises(RecipeError, match="lower <= 0 <= upper"):
        theory.high_resolution_mse(GAUSSIAN, lower=0.5, upper=1.0, step=0.1)
    with pytest.raises(RecipeError, match="no level but 0"):
        theory.optimal_scale(GAUSSIAN, (0.0,))
