import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.formats import FORMATS, LevelFormat, has_float_zero
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.outliers import SparseOutliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.table import NF4, TableFormat

FAMILIES = [
    {"symmetric": True},
    {"symmetric": True, "full_range": False},
    {"symmetric": False},
    {"symmetric": False, "float_zero": True},
]
INTEGERS = [IntegerFormat(bits=bits, **family) for bits in range(2, 9) for family in FAMILIES]
EVERY_INTEGER = pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
LEVELS = {name: cast(LevelFormat, FORMATS[name]) for name in FORMATS if not isinstance(FORMATS[name], CodebookFormat)}
EVERY_FORMAT = pytest.mark.parametrize("format", list(LEVELS.values()), ids=list(LEVELS))
PER_TENSOR, PER_CHANNEL = Granularity(kind="tensor"), Granularity(kind="channel")
TILES, COLUMNS = Granularity(kind="block", block_rows=2, group_size=8), Granularity(kind="columns", group_size=8)


def by_group(size: int) -> Granularity:
    return Granularity(kind="group", group_size=size)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


EVERY_KIND = pytest.mark.parametrize(
    "granularity", [PER_TENSOR, PER_CHANNEL, by_group(8), by_group(64), TILES, COLUMNS], ids=lambda g: g.kind
)


def grid_of(
    scale: torch.Tensor, format: LevelFormat, granularity: Granularity, in_features: int, zero: float = 0
) -> Grid:
    dtype = torch.float16 if has_float_zero(format) else torch.int32
    zero_point = None if format.symmetric else torch.full(scale.shape, zero).to(dtype)
    return Grid(format=format, granularity=granularity, in_features=in_features, scale=scale, zero_point=zero_point)


def expanded(values: torch.Tensor, granularity: Granularity, shape: torch.Size) -> torch.Tensor:
    """Scale or zero point as a full [O, I] tensor, element by element: the slow and obvious way."""
    columns = [j // granularity.columns_per_group(shape[1]) for j in range(shape[1])]
    height = math.inf if granularity.spans_rows else granularity.block_rows or 1
    return values.float()[[int(i // height) for i in range(shape[0])]][:, columns]


@EVERY_INTEGER
@EVERY_KIND
def test_error_is_at_most_half_a_step_inside_the_range(format: IntegerFormat, granularity: Granularity) -> None:
    weight = normal(5, 29)
    grid = fit_grid(weight, format, granularity)
    scale = expanded(grid.scale, granularity, weight.shape)
    zero = torch.zeros(5, 29) if grid.zero_point is None else expanded(grid.zero_point, granularity, weight.shape)
    ends = torch.stack([scale * (format.qmin - zero), scale * (format.qmax - zero)])
    error = (grid.fake_quantize(weight) - weight).abs()
    outside = torch.relu(torch.maximum(ends.amin(0) - weight, weight - ends.amax(0)))
    # Quotient and product each round once: 2 units of roundoff of a value of at most 2^bits steps.
    slack = scale.abs() * 2.0 ** (format.bits - 23)
    assert (error <= torch.maximum(scale.abs() / 2, outside) + slack).all()
    # Min-max leaves nothing further outside than the rounding of the zero point: half a step.
    assert (outside <= scale.abs() / 2 + slack).all()


@settings(deadline=None, max_examples=60)
@given(
    format=st.sampled_from(INTEGERS),
    scale=st.floats(2.0**-120, 2.0**100, width=32),
    negative=st.booleans(),
    zero=st.integers(0, 255),
    fraction=st.floats(-300, 300, width=16),
)
def test_quantize_undoes_dequantize_for_every_code(
    format: IntegerFormat, scale: float, negative: bool, zero: int, fraction: float
) -> None:
    codes = torch.arange(format.qmin, format.qmax + 1).to(format.code_dtype).unsqueeze(0)
    scale_tensor = torch.tensor([[-scale if negative else scale]])
    inside = fraction if format.float_zero else zero % (format.qmax + 1)
    grid = grid_of(scale_tensor, format, PER_CHANNEL, codes.shape[1], inside)
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize("format", [each for each in INTEGERS if not each.float_zero], ids=lambda f: f.name)
def test_zero_is_exact(format: IntegerFormat) -> None:
    weight = normal(4, 16).abs() + 1
    weight[:, 3] = 0
    for sign in (1, -1):
        assert torch.equal(fit_grid(sign * weight, format, by_group(8)).fake_quantize(weight)[:, 3], torch.zeros(4))


@EVERY_FORMAT
@EVERY_KIND
def test_columns_round_as_the_whole_does(format: LevelFormat, granularity: Granularity) -> None:
    weight = normal(5, 21)
    weight[1] = 0
    grid = fit_grid(weight, format, granularity)
    codes, values = grid.quantize(weight), grid.fake_quantize(weight)
    for j in range(21):
        column_codes, column_values = grid.rounder(j, len(weight))(weight[:, j])
        assert torch.equal(column_codes, codes[:, j])
        assert torch.equal(column_values, values[:, j])
        scale, zero = grid.column(j, 5)
        assert torch.equal((scale * format.decode(codes[:, j], zero)).expand(5), values[:, j])


@EVERY_FORMAT
@EVERY_KIND
def test_dequantize_multiplies_each_code_by_its_own_scale(format: LevelFormat, granularity: Granularity) -> None:
    weight = normal(5, 29)
    grid = fit_grid(weight, format, granularity)
    codes = grid.quantize(weight)
    zero = None if grid.zero_point is None else expanded(grid.zero_point, granularity, weight.shape)
    scale = expanded(grid.scale, granularity, weight.shape)
    assert torch.equal(grid.dequantize(codes), scale * format.decode(codes, zero))


def scale_formats_for(format: LevelFormat) -> list[ScaleFormat]:
    """Those without a level above, which belongs to a whole weight, and that a format with a zero point can have."""
    return [
        SCALE_FORMATS[name] for name in SCALE_FORMATS if name not in ("nested", *([] if format.symmetric else ["e4m3"]))
    ]


@EVERY_KIND
@pytest.mark.parametrize("name", ["int3", "uint3", "nf4", "fp8-e4m3", "ternary"])
def test_a_sub_grid_rounds_as_the_grid_does(name: str, granularity: Granularity) -> None:
    weight = normal(5, 21)
    for scale in scale_formats_for(LEVELS[name]):
        grid = fit_grid(weight, LEVELS[name], granularity, scale=scale)
        codes, values = grid.quantize(weight), grid.fake_quantize(weight)
        width = granularity.columns_per_group(21) if granularity.group_size else 1
        for start, stop in [(0, 8), (8, 21), (16, 21), (0, 21)]:
            if start % width or (stop % width and stop != 21):
                continue
            part = grid.columns(start, stop)
            assert torch.equal(part.quantize(weight[:, start:stop]), codes[:, start:stop])
            assert torch.equal(part.dequantize(codes[:, start:stop]), values[:, start:stop])
            assert part.stored is None or torch.equal(part.stored.values(), part.scale)
        for start, stop in [(0, 2), (2, 5), (4, 5), (0, 5)]:
            part = grid.rows(start, stop)
            assert torch.equal(part.quantize(weight[start:stop]), codes[start:stop])
            assert torch.equal(part.dequantize(codes[start:stop]), values[start:stop])
            assert part.stored is None or torch.equal(part.stored.values(), part.scale)


def test_a_sub_grid_does_not_cut_what_shares_a_scale() -> None:
    weight = normal(5, 21)
    for granularity in (by_group(8), TILES, COLUMNS):
        grid = fit_grid(weight, LEVELS["int3"], granularity)
        for start, stop in [(4, 8), (0, 12), (0, 20)]:
            with pytest.raises(ShapeError, match=rf"columns {start}\.\.{stop} cut a group of 8"):
                grid.columns(start, stop)
    tiles = fit_grid(weight, LEVELS["int3"], TILES)
    for start, stop in [(1, 4), (0, 3)]:
        with pytest.raises(ShapeError, match=rf"rows {start}\.\.{stop} cut a tile of 2"):
            tiles.rows(start, stop)
    spanning = fit_grid(weight, LEVELS["int3"], COLUMNS)
    assert spanning.rows(1, 3) is spanning


def test_many_rows_are_worked_on_in_chunks_without_a_seam() -> None:
    weight = normal(1300, 500)
    tiles = Granularity(kind="block", group_size=64, block_rows=7)  # a chunk holds 524 rows, which is no multiple
    for granularity in (PER_TENSOR, PER_CHANNEL, by_group(64), tiles, COLUMNS):
        grid = fit_grid(weight, LEVELS["uint4"], granularity)
        codes = grid.quantize(weight)
        scale, zero = (expanded(x, granularity, weight.shape) for x in (grid.scale, grid.zero_point))
        assert torch.equal(codes, (torch.round(weight / scale) + zero).clamp(0, 15).to(torch.uint8))
        assert torch.equal(grid.dequantize(codes), scale * (codes.float() - zero))


def test_a_negative_scale_gives_the_extra_code_to_the_positive_side() -> None:
    grid = grid_of(torch.tensor([[-0.5]]), LEVELS["int4"], PER_CHANNEL, 3)
    assert grid.fake_quantize(torch.tensor([[9.0, -9.0, 1.0]])).tolist() == [[4.0, -3.5, 1.0]]


def test_dequantize_computes_in_float32_and_then_casts() -> None:
    scale = torch.tensor([[0.3]])
    grid = grid_of(scale, LEVELS["int8"], PER_CHANNEL, 1)
    codes = torch.tensor([[101]], dtype=torch.int8)
    assert grid.dequantize(codes, torch.bfloat16).item() == torch.tensor(0.3 * 101).bfloat16().item()
    assert grid.dequantize(codes, torch.bfloat16).item() != (scale.bfloat16() * codes).item()


def test_fake_quantize_keeps_the_dtype() -> None:
    weight = normal(2, 8).bfloat16()
    assert fit_grid(weight, LEVELS["int4"], PER_CHANNEL).fake_quantize(weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("granularity", "name", "scale", "expected"),
    [
        (by_group(32), "int4", "float16", 4 + 16 / 32),
        (by_group(32), "uint4", "float16", 4 + (16 + 4) / 32),
        (by_group(32), "uint4-floatzero", "float16", 4 + (16 + 16) / 32),
        (by_group(32), "uint3", "float32", 3 + (32 + 3) / 32),
        (PER_CHANNEL, "int8", "bfloat16", 8 + 16 / 96),
        (PER_TENSOR, "uint2", "float32", 2 + (32 + 2) / (4 * 96)),
        (Granularity(kind="block", block_rows=3, group_size=64), "fp8-e4m3", "float32", 8 + 2 * 2 * 32 / (4 * 96)),
        (Granularity(kind="columns", group_size=32), "int8", "float32", 8 + 3 * 32 / (4 * 96)),
        (by_group(32), "fp4-e2m1", "e8m0", 4 + 8 / 32),
        (by_group(32), "uint8", "e8m0", 8 + (8 + 8) / 32),
        (by_group(16), "fp4-e2m1", "e4m3", 4 + 8 / 16 + 32 / (4 * 96)),
        (by_group(32), "ternary", "float16", (615 + 16 * 12) / (4 * 96)),  # 4 · 96 codes at 1.6 bits are 614.4
        (by_group(32), "nf4", "float16", 4 + 16 / 32),
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(
    granularity: Granularity, name: str, scale: str, expected: float
) -> None:
    weight = normal(4, 96)
    grid = fit_grid(weight, LEVELS[name], granularity, scale=SCALE_FORMATS[scale])
    result = QTensor(codes=grid.quantize(weight), grid=grid)
    assert result.bits_per_weight == pytest.approx(expected)
    assert result.num_bits_total == round(expected * 4 * 96)
    assert result.shape == (4, 96)
    assert torch.equal(result.dequantize(), grid.fake_quantize(weight))


def test_a_learned_table_is_stored_and_counted_and_a_known_one_is_not() -> None:
    weight = normal(4, 96)
    grid = fit_grid(weight, NF4, by_group(32))
    learned = replace(grid, format=TableFormat(name="lut4", values=NF4.values))
    assert learned.num_metadata_bits == grid.num_metadata_bits + 16 * 32


def test_a_quantized_weight_moves_and_is_cut_with_its_outliers() -> None:
    weight = normal(4, 16)
    grid = fit_grid(weight, LEVELS["int4"], PER_CHANNEL)
    index, value = torch.tensor([3, 16, 63], dtype=torch.int32), torch.tensor([9.0, -8.0, 7.0])
    outliers = SparseOutliers(index=index, value=value, shape=(4, 16))
    result = QTensor(codes=grid.quantize(weight), grid=grid, outliers=outliers).to("cpu")
    dense = result.dequantize()
    assert (dense[0, 3], dense[1, 0], dense[3, 15]) == (9, -8, 7)
    assert int((dense != grid.fake_quantize(weight)).sum()) == 3
    assert torch.equal(result.rows(1, 3).dequantize(), dense[1:3])
    assert result.num_bits_total == 4 * 64 + 4 * 32 + outliers.num_bits


def test_saturated_fraction_counts_both_ends() -> None:
    grid = grid_of(torch.ones(1, 1), LEVELS["int3"], PER_CHANNEL, 8)
    codes = torch.tensor([[-4, -4, 3, 0, 1, 2, -3, -1]], dtype=torch.int8)
    assert QTensor(codes=codes, grid=grid).saturated_fraction == 3 / 8
    shifted = grid_of(torch.ones(1, 1), LEVELS["uint2"], PER_CHANNEL, 4, zero=2)
    assert QTensor(codes=torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), grid=shifted).saturated_fraction == 0.5
    # The ends of a float are not the smallest and the largest code, which are +0 and the most negative number.
    floats = grid_of(torch.ones(1, 1), LEVELS["fp4-e2m1"], PER_CHANNEL, 4)
    codes = floats.quantize(torch.tensor([[-6.0, 0.0, 6.0, 9.0]]))
    assert codes.tolist() == [[15, 0, 7, 7]]
    assert QTensor(codes=codes, grid=floats).saturated_fraction == 3 / 4


def test_moving_keeps_everything() -> None:
    for name, scale in (("uint4", FloatScale(torch.float16)), ("fp4-e2m1", SCALE_FORMATS["e4m3"])):
        grid = fit_grid(normal(2, 8), LEVELS[name], by_group(4), scale=scale)
        moved = grid.to("cpu")
        assert moved.device == torch.device("cpu")
        assert torch.equal(moved.scale, grid.scale)
        assert grid.zero_point is None or torch.equal(moved.zero_point, grid.zero_point)
        assert grid.stored is None or torch.equal(moved.stored.values(), grid.scale)


@EVERY_FORMAT
def test_weights_far_outside_saturate(format: LevelFormat) -> None:
    """Even where the number of steps exceeds float32."""
    grid = fit_grid(torch.tensor([[-1.0, 1.0]]) * 2.0**-100, format, PER_CHANNEL)
    far = torch.tensor([[-1.0, 1.0]]) * 2.0**100
    assert torch.equal(grid.fake_quantize(far), grid.fake_quantize(far * 2.0**-100 * 2.0**-80))
    assert set(grid.quantize(far).flatten().tolist()) == set(format.end_codes)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_scale_that_cannot_divide_is_refused(value: float) -> None:
    with pytest.raises(VerificationError, match="a scale is 0 or not finite"):
        grid_of(torch.tensor([[1.0], [value]]), LEVELS["int4"], PER_CHANNEL, 8)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_zero_point_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(VerificationError, match="a zero point is not finite"):
        grid_of(torch.ones(2, 1), LEVELS["uint4-floatzero"], PER_CHANNEL, 8, value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("uint4", torch.float16),
        ("uint4", torch.float32),
        ("uint4-floatzero", torch.int32),
        ("uint4-floatzero", torch.float32),
    ],
)
def test_zero_points_of_the_other_kind_are_refused(name: str, dtype: torch.dtype) -> None:
    zero_point = torch.zeros(2, 1, dtype=dtype)
    with pytest.raises(ShapeError, match=f"format {name} has no {dtype} zero points"):
        Grid(format=LEVELS[name], granularity=PER_CHANNEL, in_features=8, scale=torch.ones(2, 1), zero_point=zero_point)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"must be \[rows, groups\]"):
        grid_of(torch.ones(3), LEVELS["int4"], PER_CHANNEL, 8)
    with pytest.raises(ShapeError, match=r"expected \[2, 3\]"):
        grid_of(torch.ones(2, 2), LEVELS["int4"], by_group(4), 9)
    with pytest.raises(ShapeError, match="format uint4 takes a zero point"):
        Grid(format=LEVELS["uint4"], granularity=PER_CHANNEL, in_features=8, scale=torch.ones(2, 1), zero_point=None)
    with pytest.raises(ShapeError, match="differ"):
        Grid(
            format=LEVELS["uint4"],
            granularity=PER_CHANNEL,
            in_features=8,
            scale=torch.ones(2, 1),
            zero_point=torch.zeros(1, 1, dtype=torch.int32),
        )


def test_weights_and_codes_that_do_not_fit_are_refused() -> None:
    grid = grid_of(torch.ones(2, 1), LEVELS["int4"], PER_CHANNEL, 8)
    for shape in [(2, 7), (3, 8), (16,)]:
        with pytest.raises(ShapeError, match="does not fit this grid"):
            grid.quantize(torch.ones(shape))
    with pytest.raises(ShapeError, match="do not fit a grid"):
        QTensor(codes=torch.ones(3, 8, dtype=torch.int8), grid=grid)
    with pytest.raises(ShapeError, match="do not fit a grid"):
        QTensor(codes=torch.ones(2, 8, dtype=torch.uint8), grid=grid)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    grid = grid_of(torch.ones(2, 1), LEVELS["int4"], PER_CHANNEL, 2)
    with pytest.raises(VerificationError, match="NaN or Inf"):
        grid.quantize(torch.tensor([[1.0, 2.0], [value, 0.0]]))
