from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError, ShapeError, UnknownName, VerificationError
from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.formats import FORMATS, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.ranges import SHRINK_FACTORS, centred, fit_grid, percentile
from bitwright.numerics.scales import MIN_SCALE, FloatScale

FAMILIES = [
    {"symmetric": True},
    {"symmetric": True, "full_range": False},
    {"symmetric": False},
    {"symmetric": False, "float_zero": True},
]
INTEGERS = [IntegerFormat(bits=bits, **family) for bits in (2, 3, 4, 8) for family in FAMILIES]
EVERY_INTEGER = pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
LEVELS = {name: cast(LevelFormat, FORMATS[name]) for name in FORMATS if not isinstance(FORMATS[name], CodebookFormat)}
COVERING = ["minmax", "mse", "percentile"]
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=24),
    Granularity(kind="block", group_size=24, block_rows=2),
    Granularity(kind="columns", group_size=24),
]
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
EVERY_SCALE_DTYPE = pytest.mark.parametrize("scale_dtype", list(MIN_SCALE), ids=str)
CHANNEL = Granularity(kind="channel")

# Errors are summed in float32 along a group: relative roundoff of a few hundred terms.
SUM_ROUNDOFF = 512 * 2.0**-24


def heavy(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Rows with outliers, of different sizes and with different means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_columns, generator=generator)
    x = x * x.abs() * torch.logspace(-3, 1, num_rows).unsqueeze(1)
    return x + 0.3 * x.std(1, keepdim=True)


def importance_of(num_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_columns, generator=torch.Generator().manual_seed(seed)) ** 6 * 50


def loss(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error per group in float64, by the definition."""
    squares = (weight.double() - grid.fake_quantize(weight.float()).double()).square()
    if importance is not None:
        squares = squares * importance.double()
    return grid.granularity.split(squares).sum(-1)


def assert_no_worse(first: torch.Tensor, second: torch.Tensor) -> None:
    assert (first <= second * (1 + SUM_ROUNDOFF)).all()


@EVERY_INTEGER
@EVERY_GRANULARITY
@EVERY_SCALE_DTYPE
def test_search_is_never_worse_than_minmax(
    format: IntegerFormat, granularity: Granularity, scale_dtype: torch.dtype
) -> None:
    weight, importance = heavy(5, 100), importance_of(100)
    grids = {
        name: fit_grid(weight, format, granularity, method=method, importance=given, scale=FloatScale(scale_dtype))
        for name, method, given in [("minmax", "minmax", None), ("mse", "mse", None), ("weighted", "mse", importance)]
    }
    assert_no_worse(loss(weight, grids["mse"]), loss(weight, grids["minmax"]))
    assert_no_worse(loss(weight, grids["mse"]), loss(weight, grids["weighted"]))
    assert_no_worse(loss(weight, grids["weighted"], importance), loss(weight, grids["minmax"], importance))
    assert_no_worse(loss(weight, grids["weighted"], importance), loss(weight, grids["mse"], importance))
    if format.bits <= 4:
        assert (loss(weight, grids["mse"]) < 0.98 * loss(weight, grids["minmax"])).any()
        assert (loss(weight, grids["weighted"], importance) < 0.99 * loss(weight, grids["mse"], importance)).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("given_importance", [False, True])
def test_the_full_range_is_never_worse_than_the_restricted_one(bits: int, given_importance: bool) -> None:
    weight, importance = heavy(40, 64), importance_of(64) if given_importance else None
    for granularity in GRANULARITIES:
        full, restricted = (
            fit_grid(
                weight,
                IntegerFormat(bits=bits, symmetric=True, full_range=full_range),
                granularity,
                method="mse",
                importance=importance,
            )
            for full_range in (True, False)
        )
        assert_no_worse(loss(weight, full, importance), loss(weight, restricted, importance))
    assert loss(weight, full, importance).sum() < loss(weight, restricted, importance).sum()


@EVERY_INTEGER
def test_search_finds_the_best_of_its_candidates(format: IntegerFormat) -> None:
    weight, importance = heavy(3, 40), importance_of(40)
    found = loss(weight, fit_grid(weight, format, CHANNEL, method="mse", importance=importance), importance)
    for factor in SHRINK_FACTORS[::8]:
        for sign in (1, -1):
            if format.symmetric:
                reach = weight.abs().amax(1, keepdim=True) / format.qmax
                scale, zero_point = sign * factor * reach, None
            else:
                shrunk = fit_grid(weight * factor, format, CHANNEL)
                scale, zero_point = shrunk.scale, shrunk.zero_point
            grid = Grid(format=format, granularity=CHANNEL, in_features=40, scale=scale, zero_point=zero_point)
            assert_no_worse(found, loss(weight, grid, importance))


def test_both_signs_of_the_scale_are_used() -> None:
    weight = torch.tensor([[8.0, -6.0, 1.0, 0.0], [-8.0, 6.0, 1.0, 0.0]])
    for method in ("minmax", "mse"):
        grid = fit_grid(weight, LEVELS["int4"], CHANNEL, method=method)
        assert grid.scale.flatten().tolist() == [-1.0, 1.0]
        assert torch.equal(grid.fake_quantize(weight), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("given_importance", [False, True])
@EVERY_GRANULARITY
def test_float_zero_points_are_never_worse_than_integers(
    bits: int, given_importance: bool, granularity: Granularity
) -> None:
    weight, importance = heavy(40, 64), importance_of(64) if given_importance else None
    formats = [IntegerFormat(bits=bits, symmetric=False, float_zero=is_float) for is_float in (True, False)]
    floats, integers = (
        fit_grid(weight, format, granularity, method="mse", importance=importance) for format in formats
    )
    assert_no_worse(loss(weight, floats, importance), loss(weight, integers, importance))
    if granularity.kind == "group":
        assert loss(weight, floats, importance).sum() < loss(weight, integers, importance).sum()


def test_a_float_zero_point_puts_the_ends_of_the_range_on_levels() -> None:
    weight = torch.linspace(-0.45, 1.05, 16).unsqueeze(0)  # steps of 0.1, and 0 between two of them
    grid = fit_grid(weight, LEVELS["uint4-floatzero"], CHANNEL)
    assert grid.zero_point is not None
    assert (grid.zero_point.dtype, grid.zero_point.item()) == (torch.float16, 4.5)
    assert grid.quantize(weight).tolist() == [list(range(16))]
    torch.testing.assert_close(grid.fake_quantize(weight), weight)


def test_search_moves_the_zero_point_to_clip_one_side_only() -> None:
    # One positive outlier: values -3, -2, -1, 0 need z = 3, where the whole range asks for z = 1.
    weight = torch.tensor([[-3.0, -2.0, -1.0, 0.0, 2.9] + [-3.0, -2.0, -1.0] * 20])
    minmax, found = (fit_grid(weight, LEVELS["uint2"], CHANNEL, method=method) for method in ("minmax", "mse"))
    assert found.zero_point is not None
    assert minmax.zero_point is not None
    assert found.zero_point.item() == minmax.zero_point.item() + 1
    assert loss(weight, found).item() < 0.5 * loss(weight, minmax).item()


@pytest.mark.parametrize("name", ["int2", "int4", "int8"])
def test_minmax_covers_the_range_with_the_smallest_step(name: str) -> None:
    weight, format = heavy(6, 50), LEVELS[name]
    full = fit_grid(weight, format, CHANNEL).scale.abs().flatten()
    covering = torch.minimum(
        torch.maximum(weight.amax(1) / format.max_value, weight.amin(1) / format.min_value),
        torch.maximum(weight.amax(1) / -format.min_value, -weight.amin(1) / format.max_value),
    )
    torch.testing.assert_close(full, covering)
    assert (full <= weight.abs().amax(1) / format.max_value).all()


def test_importance_of_one_changes_nothing_and_scale_does_not_matter() -> None:
    weight = heavy(4, 64)
    for granularity in GRANULARITIES:
        grids = [
            fit_grid(weight, LEVELS["uint3"], granularity, method="mse", importance=importance)
            for importance in (None, torch.ones(64), torch.full((64,), 1e-30), torch.zeros(64))
        ]
        assert all(torch.equal(grid.scale, grids[0].scale) for grid in grids)
        assert all(torch.equal(grid.zero_point, grids[0].zero_point) for grid in grids)


def test_unimportant_columns_do_not_count() -> None:
    weight = heavy(4, 64)
    weight[:, 5] = 3 * weight.abs().amax(1)
    importance = torch.ones(64)
    importance[5] = 0
    grid = fit_grid(weight, LEVELS["int4"], CHANNEL, method="mse", importance=importance)
    minmax = fit_grid(weight, LEVELS["int4"], CHANNEL)
    assert (loss(weight, grid, importance) < 0.9 * loss(weight, minmax, importance)).all()
    assert (grid.scale.abs() < 0.5 * minmax.scale.abs()).all()


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
def test_percentile_is_the_interpolated_quantile_of_each_side(percent: float, granularity: Granularity) -> None:
    weight = heavy(4, 72) - 0.1
    format = LEVELS["uint8"]
    grid = fit_grid(weight, format, granularity, method=percentile(percent))
    groups = granularity.split(weight)
    high = torch.quantile(groups.clamp(min=0), percent / 100, dim=-1)
    low = -torch.quantile((-groups).clamp(min=0), percent / 100, dim=-1)
    torch.testing.assert_close(grid.scale, (high - low) / 255, rtol=1e-4, atol=0)


def test_percentile_counts_the_weights_of_a_ragged_tail_only() -> None:
    weight = heavy(3, 130)
    granularity = Granularity(kind="group", group_size=100)
    grid = fit_grid(weight, LEVELS["int8"], granularity, method=percentile(90))
    tail = fit_grid(weight[:, 100:], LEVELS["int8"], granularity, method=percentile(90))
    torch.testing.assert_close(grid.scale[:, 1:], tail.scale, rtol=1e-5, atol=0)
    assert (grid.scale.abs() < fit_grid(weight, LEVELS["int8"], granularity).scale.abs()).all()


@EVERY_GRANULARITY
@pytest.mark.parametrize("method", COVERING)
def test_chunks_leave_no_seam(granularity: Granularity, method: str) -> None:
    weight = heavy(600, 1000)
    importance = importance_of(1000)
    grid = fit_grid(weight, LEVELS["uint4"], granularity, method=method, importance=importance)
    if granularity.spans_rows:
        # A permutation of whole rows changes no choice, though it changes the pieces.
        other = fit_grid(weight.flip(0), LEVELS["uint4"], granularity, method=method, importance=importance)
        assert torch.equal(grid.scale, other.scale)
        assert torch.equal(grid.zero_point, other.zero_point)
        return
    for rows in (slice(0, 4), slice(260, 264), slice(596, 600)):
        part = fit_grid(weight[rows], LEVELS["uint4"], granularity, method=method, importance=importance)
        assert torch.equal(part.scale, grid.scale[granularity.scale_rows(rows)])
        assert torch.equal(part.zero_point, grid.zero_point[granularity.scale_rows(rows)])


@EVERY_INTEGER
@EVERY_SCALE_DTYPE
@pytest.mark.parametrize("method", COVERING)
def test_scales_are_representable_and_errors_bounded(
    format: IntegerFormat, scale_dtype: torch.dtype, method: str
) -> None:
    weight = heavy(6, 48)
    grid = fit_grid(weight, format, CHANNEL, method=method, scale=FloatScale(scale_dtype))
    assert grid.scale.dtype == scale_dtype
    if method == "minmax":
        # The rounding of the scale moves the end of the range by at most 2^bits steps times half an ulp.
        steps = 0.5 + 2**format.bits * torch.finfo(scale_dtype).eps / 2
        error = (grid.fake_quantize(weight) - weight).abs()
        assert (error <= grid.scale.float().abs() * (steps + 2.0 ** (format.bits - 23))).all()


@EVERY_INTEGER
@EVERY_GRANULARITY
@pytest.mark.parametrize("shape", [(3, 1), (1, 50), (4, 25)])
def test_zero_and_constant_weights(format: IntegerFormat, granularity: Granularity, shape: tuple[int, int]) -> None:
    for method, scale_dtype in zip(COVERING, MIN_SCALE, strict=True):
        for constant in (0.0, 0.37, -0.37):
            weight = torch.full(shape, constant)
            values = fit_grid(weight, format, granularity, method=method, scale=FloatScale(scale_dtype)).fake_quantize(
                weight
            )
            # An end of the range is the constant itself, up to the rounding of the scale; zero is exact.
            torch.testing.assert_close(values, weight, rtol=torch.finfo(scale_dtype).eps, atol=0)


@EVERY_INTEGER
@EVERY_SCALE_DTYPE
def test_tiny_weights_never_divide_by_zero(format: IntegerFormat, scale_dtype: torch.dtype) -> None:
    for magnitude in (1e-45, 1e-40, 1e-37, 1e-9, 1e-6):
        weight = torch.tensor([[magnitude, -magnitude, 0.0, magnitude / 2]])
        grid = fit_grid(weight, format, CHANNEL, method="mse", scale=FloatScale(scale_dtype))
        error = (grid.fake_quantize(weight) - weight).abs()
        assert (grid.scale.float().abs() >= MIN_SCALE[scale_dtype]).all()
        assert (error <= max(abs(weight).max().item(), grid.scale.float().abs().item() / 2)).all()
        assert format.float_zero or grid.fake_quantize(weight)[0, 2] == 0


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
    format=st.sampled_from(INTEGERS),
    method=st.sampled_from(COVERING),
)
def test_any_finite_weight_is_rounded_no_further_than_its_group_is_large(
    values: list[float], format: IntegerFormat, method: str
) -> None:
    weight = torch.tensor([values])
    grid = fit_grid(weight, format, Granularity(kind="group", group_size=5), method=method)
    result = grid.fake_quantize(weight)
    assert result.isfinite().all()
    error, largest = (result - weight).abs(), weight.abs().max()
    assert (error <= torch.maximum(2 * largest, grid.scale.abs().max())).all()
    assert torch.equal(grid.fake_quantize(result), result)


def test_float16_scales_that_overflow_are_refused() -> None:
    weight = torch.tensor([[1.0, 1e7]])
    with pytest.raises(RecipeError, match="a scale exceeds 65504"):
        fit_grid(weight, LEVELS["int4"], CHANNEL, method="mse", scale=FloatScale(torch.float16))
    assert fit_grid(weight, LEVELS["int4"], CHANNEL, scale=FloatScale(torch.bfloat16)).scale.isfinite().all()


@pytest.mark.parametrize("name", ["int2", "int4", "uint4", "int8", "uint8"])
def test_weights_at_the_end_of_float32(name: str) -> None:
    largest = torch.finfo(torch.float32).max
    weight = torch.tensor([[largest, -largest]])
    with pytest.raises(VerificationError, match="overflows float32"):
        fit_grid(weight, LEVELS[name], CHANNEL, method="mse")
    grid = fit_grid(weight / 4, LEVELS[name], CHANNEL, method="mse")
    assert grid.fake_quantize(weight / 4).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", COVERING)
@EVERY_GRANULARITY
def test_non_finite_weights_are_refused(value: float, method: str, granularity: Granularity) -> None:
    weight = heavy(4, 60)
    weight[2, 33] = value
    with pytest.raises(VerificationError, match="the weight holds NaN or Inf"):
        fit_grid(weight, LEVELS["int4"], granularity, method=method)


def test_bad_arguments() -> None:
    weight, format = torch.ones(2, 4), LEVELS["int4"]
    with pytest.raises(ShapeError, match="must be \\[O, I\\] and not empty"):
        fit_grid(torch.ones(4), format, CHANNEL)
    with pytest.raises(ShapeError, match="must be \\[O, I\\] and not empty"):
        fit_grid(torch.ones(0, 4), format, CHANNEL)
    with pytest.raises(RecipeError, match="float32, float16 or bfloat16"):
        fit_grid(weight, format, CHANNEL, scale=FloatScale(torch.float64))
    with pytest.raises(UnknownName, match="Did you mean 'minmax'"):
        fit_grid(weight, format, CHANNEL, method="min-max")
    with pytest.raises(ShapeError, match=r"importance \[3\] must be \[4\]"):
        fit_grid(weight, format, CHANNEL, importance=torch.ones(3))
    for value in (-1.0, torch.nan, torch.inf):
        with pytest.raises(VerificationError, match="importance has NaN, Inf or negative"):
            fit_grid(weight, format, CHANNEL, importance=torch.tensor([1, 1, 1, value]))
    with pytest.raises(RecipeError, match=r"percentile: 0.999 is outside \(50, 100\]"):
        percentile(0.999)


def test_the_weight_is_not_modified_and_half_precision_weights_work() -> None:
    weight = heavy(3, 50)
    before = weight.clone()
    for method in COVERING:
        for granularity in GRANULARITIES:
            fit_grid(weight, LEVELS["uint4"], granularity, method=method, importance=importance_of(50))
            half = fit_grid(weight.bfloat16(), LEVELS["uint4"], granularity, method=method)
            exact = fit_grid(weight.bfloat16().float(), LEVELS["uint4"], granularity, method=method)
            assert torch.equal(half.scale, exact.scale)
    assert torch.equal(weight, before)


def test_centred_reaches_the_largest_magnitude_with_half_of_the_levels() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(5))
    rows = Granularity(kind="channel")
    full = fit_grid(weight, IntegerFormat(bits=2, symmetric=True), rows, method=centred)
    torch.testing.assert_close(full.scale.flatten(), weight.abs().amax(1) / 1.5)
    asymmetric = IntegerFormat(bits=2, symmetric=False)
    assert torch.equal(
        fit_grid(weight, asymmetric, rows, method=centred).scale, fit_grid(weight, asymmetric, rows).scale
    )
