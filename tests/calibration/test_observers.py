"""Every registered observer against one list of promises, then each against a direct computation on all the data."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.calibration.observers import AVERAGE_WEIGHT, OBSERVERS, Observer, ObserverFactory, percentile
from bitwright.errors import DataError, RecipeError, ShapeError, UnknownName, VerificationError
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E4M3

NUM_CHANNELS = 20
TENSOR = Granularity(kind="tensor")
COLUMNS = Granularity(kind="columns", group_size=8)  # 8, 8 and 4 columns.
FORMATS: list[LevelFormat] = [
    IntegerFormat(bits=8, symmetric=True),
    IntegerFormat(bits=4, symmetric=False),
    E4M3,
]
INT8 = FORMATS[0]

EVERY_OBSERVER = pytest.mark.parametrize("name", list(OBSERVERS))
# All but the moving average, which weighs batches by their order.
EXACT = pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "average"])
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", [TENSOR, COLUMNS], ids=lambda g: g.kind)
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def activations(num_tokens: int = 600, seed: int = 0) -> Tensor:
    """Channels of very different sizes; some outliers; some one-sided channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, NUM_CHANNELS, generator=generator) * torch.logspace(-2, 2, NUM_CHANNELS)
    x[:, ::5] = torch.nn.functional.silu(x[:, ::5])
    x[torch.randint(num_tokens, (num_tokens // 20,), generator=generator)] *= 6
    return x


def make(name: str, granularity: Granularity = TENSOR, *batches: Tensor) -> Observer[Any]:
    return watch(OBSERVERS[name](num_channels=NUM_CHANNELS, granularity=granularity), *batches)


def watch(observer: Observer[Any], *batches: Tensor) -> Observer[Any]:
    for batch in batches:
        observer.observe(batch)
    return observer


def assert_same_range(first: Observer[Any], second: Observer[Any], format: LevelFormat = INT8) -> None:
    for one, other in zip(first.range(format), second.range(format), strict=True):
        assert torch.equal(one, other)


def assert_same_state(first: Observer[Any], second: Observer[Any]) -> None:
    one, other = first.to_tensors(), second.to_tensors()
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


@EVERY_OBSERVER
@EVERY_GRANULARITY
@EVERY_FORMAT
def test_ranges_include_zero_and_lie_inside_the_values(
    name: str, granularity: Granularity, format: LevelFormat
) -> None:
    x = activations()
    low, high = make(name, granularity, *x.split(100)).range(format)
    for end in (low, high):
        assert end.shape == (granularity.num_groups(NUM_CHANNELS),)
        assert end.dtype == torch.float64
        assert end.device.type == "cpu"
    for group, columns in enumerate(x.split(granularity.columns_per_group(NUM_CHANNELS), dim=1)):
        assert min(0.0, columns.min().item()) <= low[group].item() <= 0
        assert 0 <= high[group].item() <= max(0.0, columns.max().item())
        assert low[group] < high[group]


@EXACT
@EVERY_GRANULARITY
@EVERY_FORMAT
def test_order_batches_and_ranks_change_no_bit(name: str, granularity: Granularity, format: LevelFormat) -> None:
    x = activations()
    once = make(name, granularity, x)
    shuffled = make(name, granularity, *x[torch.randperm(len(x))].split(37))
    ranks = [make(name, granularity, *part.split(50)) for part in x.split(170)]
    merged = functools.reduce(lambda first, second: second.merge(first), ranks)
    for other in (shuffled, merged):
        assert_same_state(once, other)
        assert_same_range(once, other, format)


@EVERY_OBSERVER
@given(sizes=st.tuples(*[st.integers(0, 4)] * 3), seed=st.integers(0, 100))
def test_merging_is_associative(name: str, sizes: tuple[int, int, int], seed: int) -> None:
    a, b, c = (
        make(name, COLUMNS, *(activations(20, seed=10 * seed + 3 * index + batch) for batch in range(size)))
        for index, size in enumerate(sizes)
    )
    first, second = a.merge(b).merge(c).to_tensors(), a.merge(b.merge(c)).to_tensors()
    for key, tensor in first.items():
        if name == "average" and tensor.dtype == torch.float64:
            # A dozen products and sums in float64 of values of the size of the largest one.
            largest = max(1.0, tensor.abs().max().item(), second["first"].abs().max().item())
            assert (tensor - second[key]).abs().max() <= 24 * 2.0**-52 * largest
        else:
            assert torch.equal(tensor, second[key]), key


@EVERY_OBSERVER
@EVERY_GRANULARITY
def test_ranks_that_merge_in_order_equal_one_pass(name: str, granularity: Granularity) -> None:
    batches = activations().split(50)
    once = make(name, granularity, *batches)
    merged = make(name, granularity, *batches[:5]).merge(make(name, granularity, *batches[5:]))
    for one, other in zip(once.range(INT8), merged.range(INT8), strict=True):
        # The moving average composes maps in float64; the others are equal.
        allowed = 24 * 2.0**-52 * one.abs().max() if name == "average" else 0.0
        assert (one - other).abs().max() <= allowed


@EVERY_OBSERVER
def test_merging_modifies_neither_observer(name: str) -> None:
    x, y, z = activations(seed=1), activations(seed=2), activations(seed=3) * 1000
    first, second = make(name, TENSOR, x), make(name, TENSOR, y)
    first.merge(second).observe(z)
    make(name).merge(second).observe(z)
    first.merge(make(name)).observe(z)
    assert_same_state(first, make(name, TENSOR, x))
    assert_same_state(second, make(name, TENSOR, y))


@EVERY_OBSERVER
@EVERY_GRANULARITY
def test_state_survives_a_file_and_a_gather(name: str, granularity: Granularity, tmp_path: Path) -> None:
    x = activations()
    observer = make(name, granularity, x)
    empty = make(name, granularity)
    save_file(observer.to_tensors(), tmp_path / "state.safetensors")
    loaded = empty.from_tensors(load_file(tmp_path / "state.safetensors"))
    assert_same_state(observer, loaded)
    assert_same_range(observer, loaded)
    # Ranks gather tensors of equal shapes, whatever each has seen; reading them copies.
    assert {key: t.shape for key, t in empty.to_tensors().items()} == {
        key: t.shape for key, t in observer.to_tensors().items()
    }
    loaded.observe(1000 * x)
    assert_same_state(observer, make(name, granularity, x))
    with pytest.raises(ShapeError, match=r"^observer: state \{.*\} does not fit \{.*\}\. Save and load with one reci"):
        empty.from_tensors({})


@EVERY_OBSERVER
@EVERY_FORMAT
def test_groups_are_observers_of_their_own(name: str, format: LevelFormat) -> None:
    x = activations()
    low, high = make(name, COLUMNS, *x.split(100)).range(format)
    for group, columns in enumerate(x.split(8, dim=1)):
        alone = OBSERVERS[name](num_channels=columns.shape[1], granularity=TENSOR)
        alone_low, alone_high = watch(alone, *columns.split(100)).range(format)
        assert alone_low.item() == low[group].item()
        assert alone_high.item() == high[group].item()


@EVERY_OBSERVER
@EVERY_FORMAT
@pytest.mark.parametrize("exponent", [-30, 12])
def test_ranges_scale_with_the_activations(name: str, format: LevelFormat, exponent: int) -> None:
    """Exactly so for powers of two; nothing depends on the unit of the activations."""
    x = activations()
    factor = 2.0**exponent
    plain, scaled = make(name, COLUMNS, *x.split(100)), make(name, COLUMNS, *(x * factor).split(100))
    for one, other in zip(plain.range(format), scaled.range(format), strict=True):
        assert torch.equal(one * factor, other)


@EVERY_OBSERVER
def test_any_leading_dimensions_and_float_dtype(name: str) -> None:
    x = activations().bfloat16()
    flat = make(name, COLUMNS, x.float())
    assert_same_range(flat, make(name, COLUMNS, x.reshape(3, 200, NUM_CHANNELS)))
    assert_same_range(make(name, TENSOR, x[:1]), make(name, TENSOR, x[0]))
    # A graph would keep the activations alive.
    trained = make(name, COLUMNS, x.double().requires_grad_())
    assert_same_range(flat, trained)
    assert not any(tensor.requires_grad for tensor in trained.to_tensors().values())


@EVERY_OBSERVER
@EVERY_FORMAT
def test_zeros_have_the_range_from_zero_to_zero(name: str, format: LevelFormat) -> None:
    x = torch.cat([torch.zeros(5, 8), torch.ones(5, 12)], dim=1)
    low, high = make(name, COLUMNS, x).range(format)
    assert low.tolist() == [0, 0, 0]
    assert high[0].item() == 0
    assert (high[1:] > 0).all()


@EVERY_OBSERVER
@EVERY_FORMAT
def test_one_sided_activations_keep_zero(name: str, format: LevelFormat) -> None:
    x = activations().abs() + 0.5
    for sign in (1, -1):
        low, high = make(name, TENSOR, sign * x).range(format)
        assert (low if sign > 0 else high).item() == 0
        assert (high if sign > 0 else low).item() != 0


@EVERY_OBSERVER
def test_an_observer_that_saw_nothing_has_no_range(name: str) -> None:
    observer = make(name, TENSOR, torch.empty(0, NUM_CHANNELS))
    with pytest.raises(DataError) as error:
        observer.range(INT8)
    assert str(error.value) == (
        "observer: saw no activations, so that it has no range. Calibrate with text that reaches this site, or leave "
        "its inputs unquantized."
    )


@EVERY_OBSERVER
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(name: str, bad: float) -> None:
    x = activations()
    observer = make(name, COLUMNS, x)
    spoiled = x.clone()
    spoiled[17, 3] = bad
    with pytest.raises(VerificationError, match=r"^activations hold NaN or Inf, so that they have no range\. Run the "):
        observer.observe(spoiled)
    assert_same_state(observer, make(name, COLUMNS, x))


@EVERY_OBSERVER
def test_wrong_shapes_and_granularities_are_refused(name: str) -> None:
    with pytest.raises(ShapeError) as error:
        make(name).observe(torch.zeros(3, 7))
    assert str(error.value) == "observer: activations [3, 7] must be [..., 20]."
    with pytest.raises(ShapeError) as error:
        make(name).observe(torch.zeros(()))
    assert str(error.value) == "observer: activations [] must be [..., 20]."
    with pytest.raises(RecipeError) as recipe_error:
        make(name, Granularity(kind="token"))
    assert str(recipe_error.value) == (
        "observer: a range per token is not static, as rows are new at every call. Use tensor or columns."
    )


def test_observers_that_differ_do_not_merge() -> None:
    with pytest.raises(RecipeError) as error:
        make("minmax").merge(make("mse", COLUMNS))
    assert str(error.value) == (
        "observer: Ends over 20 channels per tensor and Histogram over 20 channels per columns of 8 do not merge. Make "
        "all from one recipe."
    )
    with pytest.raises(RecipeError):
        make("minmax").merge(make("minmax", COLUMNS))


def test_unknown_observers_suggest_a_name() -> None:
    with pytest.raises(UnknownName) as error:
        OBSERVERS["min-max"]
    assert str(error.value) == (
        "unknown observer 'min-max'. Did you mean 'minmax'? Known: average, entropy, minmax, mse, percentile."
    )


@EVERY_GRANULARITY
@EVERY_FORMAT
def test_minmax_is_the_exact_range(granularity: Granularity, format: LevelFormat) -> None:
    x = activations()
    low, high = make("minmax", granularity, *x.split(41)).range(format)
    parts = x.double().split(granularity.columns_per_group(NUM_CHANNELS), dim=1)
    assert low.tolist() == [min(0.0, part.min().item()) for part in parts]
    assert high.tolist() == [max(0.0, part.max().item()) for part in parts]


def test_average_follows_its_definition() -> None:
    batches = activations().split(20)
    low, high = make("average", TENSOR, *batches).range(INT8)
    ends = [[batch.double().min().item(), batch.double().max().item()] for batch in batches]
    average = ends[0]
    for newest in ends[1:]:
        average = [(1 - AVERAGE_WEIGHT) * old + AVERAGE_WEIGHT * new for old, new in zip(average, newest, strict=True)]
    # Two roundings per batch, relative to values that never exceed the largest one.
    allowed = 2 * len(batches) * 2.0**-52 * max(abs(end) for pair in ends for end in pair)
    assert abs(low.item() - average[0]) <= allowed
    assert abs(high.item() - average[1]) <= allowed


def test_average_depends_on_the_order_of_batches() -> None:
    small, large = torch.ones(1, NUM_CHANNELS), 3 * torch.ones(1, NUM_CHANNELS)
    first, second = make("average", TENSOR, small), make("average", TENSOR, large)
    assert first.merge(second).range(INT8)[1].item() == pytest.approx(1 + 2 * AVERAGE_WEIGHT, rel=2**-50)
    assert second.merge(first).range(INT8)[1].item() == pytest.approx(3 - 2 * AVERAGE_WEIGHT, rel=2**-50)


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99, 100.0])
@EVERY_GRANULARITY
def test_percentile_is_within_one_bin_of_the_quantile(percent: float, granularity: Granularity) -> None:
    x = activations()
    observer = percentile(percent)(num_channels=NUM_CHANNELS, granularity=granularity)
    low, high = watch(observer, *x.split(41)).range(INT8)
    for group, part in enumerate(x.double().split(granularity.columns_per_group(NUM_CHANNELS), dim=1)):
        values = part.numpy()
        width = observer.state.width[group].item()
        assert abs(low[group].item() - min(0.0, np.quantile(values, 1 - percent / 100))) <= width
        assert abs(high[group].item() - max(0.0, np.quantile(values, percent / 100))) <= width
        assert width <= np.abs(values).max() / 1024


def test_percentile_leaves_out_999_per_mille_unless_told_otherwise() -> None:
    x = activations()
    factory: ObserverFactory = percentile(99.9)
    same = watch(factory(num_channels=NUM_CHANNELS, granularity=TENSOR), x)
    assert_same_range(make("percentile", TENSOR, x), same)
    with pytest.raises(RecipeError) as error:
        percentile(0.999)
    assert str(error.value) == "percentile: 0.999 is outside (50, 100]. Use 99.9 or 99.99."


def test_only_searching_observers_ask_for_the_format() -> None:
    x = activations()
    four, eight = IntegerFormat(bits=4, symmetric=True), IntegerFormat(bits=8, symmetric=True)
    for name in OBSERVERS:
        observer = make(name, TENSOR, x)
        narrow, wide = observer.range(four)[1].item(), observer.range(eight)[1].item()
        assert (narrow < wide) if name in ("mse", "entropy") else (narrow == wide)
