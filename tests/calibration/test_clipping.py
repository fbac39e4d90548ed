"""Clipping searches against naive loops, exhaustive search, the raw values and the published algorithm."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.calibration.clipping import (
    FACTORS,
    divergence,
    entropy_range,
    grid_values,
    level_table,
    mse_range,
    squared_error,
)
from bitwright.calibration.histogram import HALF_BINS, Histogram
from bitwright.numerics.formats import FORMATS, LevelFormat, has_float_zero
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import static_grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M1, E4M3
from bitwright.numerics.ternary import BinaryFormat

Chooser = Callable[[Histogram, LevelFormat], tuple[Tensor, Tensor]]

TENSOR = Granularity(kind="tensor")
NUM_VALUES, MANY_VALUES = 20_000, 500_000
INTEGERS = [IntegerFormat(bits=bits, symmetric=symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
EVERY_FORMAT = pytest.mark.parametrize("format", [*INTEGERS, E2M1, E4M3], ids=lambda f: f.name)


def activations(name: str, num_values: int = NUM_VALUES) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(num_values, generator=generator)
    if name == "laplace":
        return torch.empty(num_values).exponential_(generator=generator) * normal.sign()
    if name == "outliers":
        normal[:10] *= 40
    if name == "cauchy-like":
        return normal / torch.randn(num_values, generator=generator).abs().add_(0.05)
    makers = {"relu": normal.relu(), "silu": torch.nn.functional.silu(2 * normal), "shifted": normal * 0.3 - 1}
    return makers.get(name, normal)


SHAPES = ("normal", "laplace", "relu", "silu", "shifted", "outliers", "cauchy-like")
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def histogram(x: Tensor) -> Histogram:
    result = Histogram.empty(1)
    result.update(x.reshape(-1, 1))
    return result


def level_formats() -> list[LevelFormat]:
    """Every registered format but those that fit their levels to the data."""
    return [format for format in map(FORMATS.__getitem__, FORMATS) if hasattr(format, "snap")]  # type: ignore[misc]


def grid_of(ends: tuple[Tensor, Tensor], format: LevelFormat) -> Grid:
    return static_grid(*ends, format, TENSOR, 1)


def rms(x: Tensor, ends: tuple[Tensor, Tensor], format: LevelFormat) -> float:
    """Root mean square rounding error of the values themselves, with the grid that a site would use."""
    quantized = grid_of(ends, format).fake_quantize(x.reshape(-1, 1)).reshape(-1)
    return float((quantized.double() - x.double()).square().mean().sqrt())


def naive_squared_error(counts: Tensor, values: list[float]) -> float:
    """Integrate over every piece of a bin that one value represents."""
    cuts = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    total = Fraction(0)
    for index in torch.nonzero(counts).flatten().tolist():
        left = float(index - HALF_BINS)
        inner = [cut for cut in cuts if left < cut < left + 1]
        for start, stop in itertools.pairwise([left, *inner, left + 1]):
            value = min(values, key=lambda v: abs(v - (start + stop) / 2))
            # Exact, as the difference of two cubes would lose what is compared.
            near, far = Fraction(start) - Fraction(value), Fraction(stop) - Fraction(value)
            total += int(counts[index]) * (far**3 - near**3) / 3
    return float(total)


def naive_divergence(counts: list[float], first: int, last: int, values: list[float]) -> float:
    """The algorithm in words: clip, quantize, spread over the bins in use, compare."""
    kept = counts[first : last + 1]
    reference = list(kept)
    reference[0] += sum(counts[:first])
    reference[-1] += sum(counts[last + 1 :])
    if len(kept) < len(values) and sum(kept) < sum(counts):
        return math.inf
    # A bin goes to the nearest value, a tie to the upper one.
    owner = [min(range(len(values)), key=lambda v: (abs(values[v] - (first + i + 0.5)), -v)) for i in range(len(kept))]
    mass, users = [0.0] * len(values), [0] * len(values)
    for i, value in enumerate(owner):
        mass[value] += kept[i]
        users[value] += reference[i] > 0
    result = 0.0
    for i, value in enumerate(owner):
        if reference[i] > 0:
            p, q = reference[i] / sum(counts), mass[value] / users[value] / max(1.0, sum(kept))
            result += p * math.log(p / q) if q > 0 else math.inf
    return result


def published_divergence(magnitudes: np.ndarray, num_levels: int, num_bins: int) -> float:
    """Migacz, GTC 2017: equal levels, and a quantized distribution that knows nothing of what was clipped."""
    kept = magnitudes[:num_bins].astype(np.float64)
    reference = kept.copy()
    reference[-1] += magnitudes[num_bins:].sum()
    level = np.arange(num_bins) * num_levels // num_bins
    mass = np.bincount(level, weights=kept, minlength=num_levels)
    users = np.bincount(level, weights=(kept > 0).astype(np.float64), minlength=num_levels)
    quantized = np.where(kept > 0, (mass / np.maximum(users, 1))[level], 0.0)
    p, q = reference / reference.sum(), quantized / quantized.sum()
    if (q[p > 0] == 0).any():
        return math.inf
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("format", level_formats(), ids=lambda f: f.name)
def test_level_tables_hold_exactly_what_a_format_represents(format: LevelFormat) -> None:
    levels = level_table(format)
    assert levels[0] == format.min_value
    assert levels[-1] == format.max_value
    zero_point = None if format.symmetric else torch.zeros(())
    assert torch.equal(format.snap(levels.float(), zero_point).double(), levels)
    between = torch.cat([torch.linspace(-2, 2, 4001) * format.max_value, torch.logspace(-8, 0, 801)])
    assert torch.isin(format.snap(between, zero_point).double(), levels).all()


# Inputs have integer zero points, as engines do: a float one belongs to weights alone.
@pytest.mark.parametrize("format", [f for f in level_formats() if not has_float_zero(f)], ids=lambda f: f.name)
@pytest.mark.parametrize("ends", [(-3.0, 5.0), (-5.0, 3.0), (0.0, 0.7), (-1e-3, 0.0), (-0.3, 8.0)], ids=str)
def test_simulated_grids_are_those_of_static_ranges(format: LevelFormat, ends: tuple[float, float]) -> None:
    low, high = (torch.tensor([end], dtype=torch.float64) for end in ends)
    values = grid_values(low, high, level_table(format), symmetric=format.symmetric)[0]
    assert (values.diff() > 0).all()
    x = torch.linspace(1.2 * ends[0] - 0.1, 1.2 * ends[1] + 0.1, 999).reshape(-1, 1)
    error = (grid_of((low, high), format).fake_quantize(x).double() - x.double()).abs()
    nearest = (x.double() - values).abs().min(1, keepdim=True).values
    # Scale, quotient and product are rounded to float32: a few units of roundoff of the largest number involved.
    assert (error - nearest).abs().max() <= 8 * 2.0**-24 * max(float(values.abs().max()), float(x.abs().max()))


@given(
    st.dictionaries(st.integers(0, 2 * HALF_BINS - 1), st.integers(1, 10**6), min_size=1, max_size=12),
    st.lists(st.floats(-2200, 2200, width=32), min_size=2, max_size=9, unique=True),
)
def test_squared_error_integrates_over_cells(filled: dict[int, int], values: list[float]) -> None:
    counts = torch.zeros(2 * HALF_BINS, dtype=torch.float64)
    for index, count in filled.items():
        counts[index] = count
    values = sorted(values)
    found = squared_error(counts, torch.tensor([values], dtype=torch.float64)).item()
    # Differences of cumulative second moments: float64 roundoff of the largest square times the number of values.
    roundoff = 64 * 2.0**-52 * float(counts.sum()) * 2200**2
    assert abs(found - naive_squared_error(counts, values)) <= roundoff


@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 1000)), min_size=6, max_size=40).filter(any),
    st.lists(st.integers(-40, 400).map(lambda tenths: tenths / 8), min_size=2, max_size=9, unique=True),
    st.data(),
)
def test_divergence_equals_naive_loops(counts: list[int], values: list[float], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(counts) - 1))
    last = data.draw(st.integers(first, len(counts) - 1))
    values = sorted(values)
    if first == last and sum(counts[first : last + 1]) < sum(counts):
        values = [*values, 1e3]  # One bin for several levels is never a candidate.
    found = divergence(
        torch.tensor(counts, dtype=torch.float64),
        torch.tensor([first + 0.3], dtype=torch.float64),
        torch.tensor([last + 0.6], dtype=torch.float64),
        torch.tensor([values], dtype=torch.float64),
    ).item()
    expected = naive_divergence([float(count) for count in counts], first, last, values)
    # Sums of up to 40 terms of the size of log(total).
    assert found == expected or abs(found - expected) <= 200 * 2.0**-52 * math.log(40_000)


@EVERY_SHAPE
@EVERY_FORMAT
def test_mse_is_within_the_bins_of_exhaustive_search_on_the_values(shape: str, format: LevelFormat) -> None:
    """Moving a value by one bin changes its error by at most one bin, hence also the root mean square of all."""
    x = activations(shape)
    counted = histogram(x)
    low, high = counted.low.clamp(max=0), counted.high.clamp(min=0)
    if format.symmetric:
        reach = torch.maximum(-low, high)
        candidates = [(torch.maximum(low, -reach * f), torch.minimum(high, reach * f)) for f in FACTORS]
    else:
        few = FACTORS[::10]
        candidates = [(low * one, high * other) for one in (few if float(low) < 0 else (1.0,)) for other in few]
    best = min(rms(x, candidate, format) for candidate in candidates)
    assert rms(x, mse_range(counted, format), format) <= best + 2 * float(counted.width)


@EVERY_SHAPE
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_searching_the_ends_in_turn_comes_near_all_pairs(shape: str, bits: int) -> None:
    format = IntegerFormat(bits=bits, symmetric=False)
    counted = histogram(activations(shape))
    counts = counted.counts[0].double()
    levels, factors = level_table(format), torch.tensor(FACTORS[::2], dtype=torch.float64)

    def mean_error(low: Tensor, high: Tensor) -> Tensor:
        total = squared_error(counts, grid_values(low / counted.width, high / counted.width, levels, symmetric=False))
        return (total / counts.sum()).sqrt()

    pairs = torch.cartesian_prod(factors * counted.low.clamp(max=0), factors * counted.high.clamp(min=0))
    best = mean_error(pairs[:, 0], pairs[:, 1]).min()
    low, high = mse_range(counted, format)
    # In bins: what the histogram does not know about the values anyway.
    assert mean_error(low, high) <= best + 1
    # The end searched last is the best one for the other end.
    lows = torch.tensor(FACTORS, dtype=torch.float64) * counted.low.clamp(max=0)
    assert (mean_error(low, high) <= mean_error(lows, high.expand_as(lows))).all()


@EVERY_SHAPE
@EVERY_FORMAT
def test_mse_beats_no_clipping_and_entropy_on_the_values(shape: str, format: LevelFormat) -> None:
    x = activations(shape)
    counted = histogram(x)
    best = rms(x, mse_range(counted, format), format) - 2 * float(counted.width)
    assert best <= rms(x, (counted.low.clamp(max=0), counted.high.clamp(min=0)), format)
    assert best <= rms(x, entropy_range(counted, format), format)


@EVERY_SHAPE
@pytest.mark.parametrize("format", [IntegerFormat(bits=4, symmetric=True), E2M1], ids=lambda f: f.name)
def test_entropy_picks_what_naive_loops_over_all_candidates_pick(shape: str, format: LevelFormat) -> None:
    counted = histogram(activations(shape)[:4000])
    signed = counted.counts[0].clone()
    signed[HALF_BINS] -= counted.num_zeros[0]
    magnitudes = (signed[HALF_BINS:] + signed[:HALF_BINS].flip(0)).double()
    largest = float(torch.maximum(-counted.low, counted.high)) / float(counted.width)
    levels = [float(level) / format.max_value for level in level_table(format) if level >= 0]
    # A third of the candidates, as naive loops are slow, and the one that was picked.
    low, high = entropy_range(counted, format)
    picked = max(-float(low), float(high)) / float(counted.width)
    costs = {}
    for reach in [*(largest * factor for factor in FACTORS[::3]), picked]:
        last = min(int(reach), HALF_BINS - 1)
        inside = torch.nonzero(magnitudes[: last + 1]).flatten()
        if len(inside) and int(inside[-1]) < last:
            last = int(inside[-1])
            reach = last + 0.5
        costs[reach] = naive_divergence(magnitudes.tolist(), 0, last, [reach * level for level in levels])
    assert picked in costs
    # Sums of 2048 terms of the size of log(4000).
    assert costs[picked] <= min(costs.values()) + 2048 * 2.0**-52 * math.log(4000)


@pytest.mark.parametrize(
    ("shape", "bits"), [("normal", 4), ("laplace", 4), ("relu", 4), ("outliers", 8), ("cauchy-like", 8)]
)
def test_entropy_is_near_the_optimum_of_the_published_algorithm(shape: str, bits: int) -> None:
    """Its own divergence at our threshold is nearer to its best than to that of no clipping.

    With many values, as it depends on which bins of the tails happen to be empty.
    """
    counted = histogram(activations(shape, MANY_VALUES))
    signed = counted.counts[0].numpy().copy()
    signed[HALF_BINS] -= int(counted.num_zeros[0])
    magnitudes = signed[HALF_BINS:] + signed[:HALF_BINS][::-1]
    num_levels, num_used = 2 ** (bits - 1), int(np.flatnonzero(magnitudes)[-1]) + 1
    low, high = entropy_range(counted, IntegerFormat(bits=bits, symmetric=True, full_range=False))
    ours = int(max(-float(low), float(high)) / float(counted.width)) + 1
    best = min(published_divergence(magnitudes, num_levels, bins) for bins in range(128, num_used + 1, 4))
    unclipped = published_divergence(magnitudes, num_levels, num_used)
    assert published_divergence(magnitudes, num_levels, ours) - best < (unclipped - best) / 2


@pytest.mark.parametrize("choose", [mse_range, entropy_range], ids=["mse", "entropy"])
@EVERY_FORMAT
def test_exact_zeros_do_not_move_the_range(choose: Chooser, format: LevelFormat) -> None:
    x = activations("relu")
    dense = x[x > 0]
    for low, high in zip(choose(histogram(dense), format), choose(histogram(x), format), strict=True):
        assert torch.equal(low, high)


def test_zeros_count_where_zero_is_no_level() -> None:
    """Binary turns a zero into ±a: with many of them, a small a is best."""
    x = activations("relu")
    (_, dense), (_, sparse) = (mse_range(histogram(values), BinaryFormat()) for values in (x[x > 0], x))
    assert sparse < dense


@pytest.mark.parametrize("choose", [mse_range, entropy_range], ids=["mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fewer_bits_clip_more_and_heavy_tails_clip_more(choose: Chooser, symmetric: bool) -> None:
    def kept(shape: str, bits: int) -> float:
        counted = histogram(activations(shape))
        low, high = choose(counted, IntegerFormat(bits=bits, symmetric=symmetric))
        return float((high - low) / (counted.high - counted.low))

    assert kept("normal", 4) < kept("normal", 8)
    assert kept("laplace", 4) < kept("laplace", 8)
    assert kept("laplace", 4) < kept("normal", 4)
    assert kept("outliers", 4) < kept("laplace", 4)


def test_one_sided_activations_keep_their_short_end() -> None:
    counted = histogram(activations("silu", MANY_VALUES))
    low, high = mse_range(counted, IntegerFormat(bits=8, symmetric=False))
    step = float(high - low) / 255
    assert float(low) <= float(counted.low) + step
    assert float(high) < float(counted.high)
    low, high = mse_range(histogram(activations("relu")), IntegerFormat(bits=4, symmetric=False))
    assert float(low) == 0
    assert float(high) > 0
