"""Histograms against an exact one: whatever the batches, the order and the ranks, every bit agrees."""

import math
import random
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.calibration.histogram import HALF_BINS, MIN_EXPONENT, Histogram
from bitwright.errors import DataError, RecipeError, ShapeError, VerificationError

NOT_FINITE = (
    "activations hold NaN or Inf, so that they have no range. Run the model in bfloat16 or float32, as float16 ends at "
    "65504; if they persist, check the checkpoint."
)
SMALLEST, LARGEST = 2.0**-149, float(torch.finfo(torch.float32).max)

# Where rounding and exponents are delicate: powers of two and their neighbours, both signs, and the ends of float32.
POWERS = st.integers(-149, 127).map(lambda k: math.ldexp(1.0, k))
EDGES = st.one_of(POWERS, POWERS.map(lambda x: float(np.nextafter(np.float32(x), np.float32(0)))), st.just(LARGEST))
FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), EDGES, EDGES.map(lambda x: -x), st.just(-0.0)
)


def fits(values: np.ndarray, exponent: int) -> bool:
    bins = np.floor(np.ldexp(values, -exponent))
    return bool((bins >= -HALF_BINS).all() and (bins < HALF_BINS).all())


def exact(x: Sequence[float] | np.ndarray) -> Histogram:
    """The definition, with all values at once. Float64 holds every product of a float32 and the powers of two here."""
    values = np.asarray(x, dtype=np.float64).reshape(-1)
    exponent = next(k for k in range(MIN_EXPONENT, 128) if fits(values[[values.argmin(), values.argmax()]], k))
    bins = np.floor(np.ldexp(values, -exponent)).astype(np.int64) + HALF_BINS
    return Histogram(
        counts=torch.from_numpy(np.bincount(bins, minlength=2 * HALF_BINS)).reshape(1, -1),
        num_zeros=torch.tensor([int((values == 0).sum())]),
        exponent=torch.tensor([exponent]),
        low=torch.tensor([values.min() + 0.0]),
        high=torch.tensor([values.max() + 0.0]),
    )


def assert_identical(first: Histogram, second: Histogram) -> None:
    for field in fields(Histogram):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert one.dtype == other.dtype, field.name
        assert torch.equal(one.view(torch.int64), other.view(torch.int64)), field.name


def histogram(x: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Histogram:
    result = Histogram.empty(num_groups)
    result.update(x, groups)
    return result


def column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)


def merge_tree(parts: list[Histogram], generator: random.Random) -> Histogram:
    """Merge neighbours or strangers, in whatever order."""
    parts = list(parts)
    while len(parts) > 1:
        first = parts.pop(generator.randrange(len(parts)))
        second = parts.pop(generator.randrange(len(parts)))
        parts.append(first.merge(second))
    return parts[0]


def test_ten_million_values_in_random_batches_equal_the_exact_histogram() -> None:
    generator = random.Random(0)
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    x[torch.randint(x.numel(), (1000,))] *= 300
    sizes: list[int] = []
    while sum(sizes) < x.numel():
        sizes.append(min(int(10 ** generator.uniform(0, 6.3)), x.numel() - sum(sizes)))
    running = Histogram.empty(1)
    ranks = [Histogram.empty(1) for _ in range(3)]
    for batch in x.reshape(-1, 1).split(sizes):
        running.update(batch)
        ranks[generator.randrange(3)].update(batch)
    expected = exact(x.numpy())
    assert_identical(running, expected)
    assert_identical(merge_tree(ranks, generator), expected)


@given(st.lists(FLOATS, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_no_split_and_no_order_changes_a_bit(values: list[float], generator: random.Random) -> None:
    expected = exact(values)
    assert_identical(histogram(column(values)), expected)
    generator.shuffle(values)
    parts: list[Histogram] = []
    while values:
        size = generator.randint(1, len(values))
        part = Histogram.empty(1)
        for batch in column(values[:size]).split(generator.randint(1, size)):
            part.update(batch)
        parts.append(part)
        values = values[size:]
    parts.append(Histogram.empty(1))
    assert_identical(merge_tree(parts, generator), expected)


@given(*[st.lists(FLOATS, max_size=8)] * 3)
def test_merging_is_associative_and_commutative(first: list[float], second: list[float], third: list[float]) -> None:
    a, b, c = (histogram(column(values)) for values in (first, second, third))
    assert_identical(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_identical(a.merge(b), b.merge(a))
    assert_identical(a.merge(Histogram.empty(1)), a)


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_bins_are_as_fine_as_the_range_allows(values: list[float]) -> None:
    exponent = int(histogram(column(values)).exponent)
    as_numbers = column(values).double().numpy()
    assert fits(as_numbers, exponent)
    assert exponent == MIN_EXPONENT or not fits(as_numbers, exponent - 1)


def test_groups_are_histograms_of_their_own() -> None:
    x = torch.randn(50, 7) * torch.logspace(-6, 6, 7)
    groups = torch.tensor([0, 2, 1, 2, 0, 1, 1])
    together = Histogram.empty(3)
    for batch in x.split(13):
        together.update(batch, groups)
    for group in range(3):
        alone = histogram(x[:, groups == group])
        for field in fields(Histogram):
            assert torch.equal(getattr(together, field.name)[group : group + 1], getattr(alone, field.name)), field.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_counts_the_same_numbers(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 5) * 100).to(torch.bfloat16)
    extremes = torch.tensor([[60000.0, 2.0**-24, -(2.0**-24), 0.0, -60000.0]])
    assert_identical(histogram(x.to(dtype)), exact(x.double().numpy()))
    assert_identical(histogram(extremes.to(dtype)), exact(extremes.to(dtype).double().numpy()))


def test_strided_activations_are_counted_like_contiguous_ones() -> None:
    x = torch.randn(6, 64)
    groups = torch.arange(6) // 2
    assert_identical(histogram(x.T, groups, 3), histogram(x.T.contiguous(), groups, 3))
    assert_identical(histogram(x[:1].expand(9, 64)), histogram(x[:1].repeat(9, 1)))


def test_rows_in_several_chunks_are_all_counted() -> None:
    x = torch.randn(2500, 256)
    groups = torch.arange(256) // 128
    assert torch.equal(histogram(x, groups, 2).num_values, torch.tensor([2500 * 128, 2500 * 128]))
    assert_identical(histogram(x), exact(x.numpy()))


def test_zeros_only() -> None:
    zeros = histogram(torch.tensor([[0.0, -0.0, 0.0]]))
    assert_identical(zeros, exact([0.0, 0.0, 0.0]))
    assert int(zeros.num_zeros) == int(zeros.counts[0, HALF_BINS]) == 3
    assert zeros.quantile(0.3).item() == 0.0


@pytest.mark.parametrize("value", [3.7, -3.7, 2048.0, -2048.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST])
def test_a_single_value(value: float) -> None:
    value = float(np.float32(value))
    single = histogram(column([value]))
    assert_identical(single, exact([value]))
    left = single.edges[0, :-1][single.counts[0] > 0].item()
    assert left <= value < left + single.width.item()
    assert single.quantile(0.5).item() == value


def test_the_smallest_numbers_keep_their_order_beside_the_largest() -> None:
    """A tiny negative value is in bin -1 however wide the bins; where products underflow it would land in bin 0."""
    counts = histogram(column([LARGEST, -SMALLEST, SMALLEST])).counts[0]
    assert counts[HALF_BINS - 1] == counts[HALF_BINS] == 1


def test_edges_are_exact_multiples_of_the_width() -> None:
    both = histogram(torch.tensor([[1e-41, 1e30]]), torch.tensor([0, 1]), 2)
    for group, exponent in enumerate(both.exponent.tolist()):
        assert both.width[group].item() == math.ldexp(1.0, exponent)
        expected = [math.ldexp(float(i), exponent) for i in range(-HALF_BINS, HALF_BINS + 1)]
        assert both.edges[group].tolist() == expected


def test_an_empty_batch_changes_nothing() -> None:
    some = histogram(column([1.0, -2.0]))
    before = histogram(column([1.0, -2.0]))
    some.update(torch.empty(0, 1))
    assert_identical(some, before)
    assert Histogram.empty(2).is_empty
    assert not some.is_empty


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([[1.0, math.nan]]),
        torch.tensor([[1.0, math.inf]]),
        torch.tensor([[-math.inf, 1.0]], dtype=torch.float16),
        torch.tensor([[1.0, 1e300]], dtype=torch.float64),
    ],
)
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(bad: Tensor) -> None:
    some = histogram(column([1.0, -2.0]))
    with pytest.raises(VerificationError) as error:
        some.update(bad)
    assert str(error.value) == NOT_FINITE
    assert_identical(some, exact([1.0, -2.0]))


def test_merging_and_updating_leave_other_histograms_alone() -> None:
    first, second = histogram(column([1.0, 2.0])), histogram(column([300.0]))
    merged = first.merge(second)
    merged.update(column([5000.0]))
    first.merge(Histogram.empty(1)).update(column([7.0]))
    assert_identical(first, exact([1.0, 2.0]))
    assert_identical(second, exact([300.0]))
    assert_identical(merged, exact([1.0, 2.0, 300.0, 5000.0]))


@given(st.lists(FLOATS, min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_is_within_one_bin_of_the_exact_one(values: list[float], fraction: float) -> None:
    counted = histogram(column(values))
    expected = np.quantile(np.asarray(values, dtype=np.float64), fraction)
    # Interpolating between two order statistics, each within a bin; plus float64 roundoff of the larger of them.
    roundoff = 8 * 2.0**-52 * max(abs(value) for value in values)
    assert abs(counted.quantile(fraction).item() - expected) <= counted.width.item() + roundoff


def test_the_outermost_quantiles_are_exact() -> None:
    x = torch.randn(1000, 4)
    groups = torch.tensor([0, 0, 1, 1])
    counted = histogram(x, groups, 2)
    assert counted.quantile(0.0).tolist() == [x[:, :2].min().item(), x[:, 2:].min().item()]
    assert counted.quantile(1.0).tolist() == [x[:, :2].max().item(), x[:, 2:].max().item()]


def test_errors_name_the_fix() -> None:
    with pytest.raises(ShapeError) as error:
        Histogram.empty(1).update(torch.zeros(3))
    assert str(error.value) == "histogram: x [3] with groups None. Pass x [T, I] and groups [I]."
    with pytest.raises(ShapeError) as error:
        Histogram.empty(2).update(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert str(error.value) == "histogram: x [3, 4] with groups [3]. Pass x [T, I] and groups [I]."
    with pytest.raises(ShapeError) as error:
        Histogram.empty(2).merge(Histogram.empty(3))
    assert str(error.value) == "histogram: 2 and 3 groups do not merge. Use one granularity."
    with pytest.raises(DataError) as error:
        Histogram.empty(1).quantile(0.5)
    assert str(error.value) == "quantile: the histogram saw no values. Run calibration batches first."
    with pytest.raises(RecipeError) as error:
        histogram(column([1.0])).quantile(99.9)
    assert str(error.value) == "quantile: 99.9 is outside [0, 1]. Use 0.999 for the 99.9th percentile."
