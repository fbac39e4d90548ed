import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.formats import FORMATS, Format
from bitwright.numerics.granularity import Granularity, Kind
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid

FAMILIES = [{"symmetric": True}, {"symmetric": True, "full_range": False}, {"symmetric": False}]
INTEGERS = [IntegerFormat(bits=bits, **family) for bits in range(2, 9) for family in FAMILIES]
EVERY_INTEGER = pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
PER_TENSOR, PER_CHANNEL = Granularity(kind="tensor"), Granularity(kind="channel")


def by_group(size: int) -> Granularity:
    return Granularity(kind="group", group_size=size)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def grid_of(scale: torch.Tensor, format: Format, granularity: Granularity, in_features: int, zero: int = 0) -> Grid:
    zero_point = None if format.symmetric else torch.full(scale.shape, zero, dtype=torch.int32)
    return Grid(format=format, granularity=granularity, in_features=in_features, scale=scale, zero_point=zero_point)


def expanded(values: torch.Tensor, granularity: Granularity, shape: torch.Size) -> torch.Tensor:
    """Scale or zero point as a full [O, I] tensor, element by element: the slow and obvious way."""
    columns = [j // granularity.columns_per_group(shape[1]) for j in range(shape[1])]
    return values.float()[:, columns].expand(shape)


@EVERY_INTEGER
@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_CHANNEL, by_group(8), by_group(64)], ids=lambda g: g.kind)
def test_error_is_at_most_half_a_step_inside_the_range(format: IntegerFormat, granularity: Granularity) -> None:
    weight = normal(6, 29)
    grid = fit_grid(weight, format, granularity)
    scale = expanded(grid.scale, granularity, weight.shape)
    zero = torch.zeros(6, 29) if grid.zero_point is None else expanded(grid.zero_point, granularity, weight.shape)
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
)
def test_quantize_undoes_dequantize_for_every_code(
    format: IntegerFormat, scale: float, negative: bool, zero: int
) -> None:
    codes = torch.arange(format.qmin, format.qmax + 1).to(format.code_dtype).unsqueeze(0)
    scale_tensor = torch.tensor([[-scale if negative else scale]])
    grid = grid_of(scale_tensor, format, PER_CHANNEL, codes.shape[1], zero % (format.qmax + 1))
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


@EVERY_INTEGER
def test_zero_is_exact(format: IntegerFormat) -> None:
    weight = normal(4, 16).abs() + 1
    weight[:, 3] = 0
    for sign in (1, -1):
        assert torch.equal(fit_grid(sign * weight, format, by_group(8)).fake_quantize(weight)[:, 3], torch.zeros(4))


@EVERY_INTEGER
@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_CHANNEL, by_group(8)], ids=lambda g: g.kind)
def test_columns_round_as_the_whole_does(format: IntegerFormat, granularity: Granularity) -> None:
    weight = normal(5, 21)
    grid = fit_grid(weight, format, granularity)
    codes, values = grid.quantize(weight), grid.fake_quantize(weight)
    for j in range(21):
        column_codes, column_values = grid.round_column(weight[:, j], j)
        assert torch.equal(column_codes, codes[:, j])
        assert torch.equal(column_values, values[:, j])
        scale, zero = grid.column(j)
        assert torch.equal((scale * (codes[:, j].float() - zero)).expand(5), values[:, j])


@pytest.mark.parametrize("name", ["int3", "uint3"])
def test_a_sub_grid_rounds_its_columns_as_the_grid_does(name: str) -> None:
    weight = normal(4, 21)
    grid = fit_grid(weight, FORMATS[name], by_group(8))
    for start, stop in [(0, 8), (8, 21), (16, 21), (0, 21)]:
        part = grid.columns(start, stop)
        assert torch.equal(part.quantize(weight[:, start:stop]), grid.quantize(weight)[:, start:stop])
    with pytest.raises(ShapeError, match=r"columns 4\.\.8 cut a group of 8"):
        grid.columns(4, 8)
    channel = fit_grid(weight, FORMATS[name], PER_CHANNEL)
    assert torch.equal(channel.columns(3, 5).quantize(weight[:, 3:5]), channel.quantize(weight)[:, 3:5])


def test_many_rows_are_worked_on_in_chunks_without_a_seam() -> None:
    weight = normal(1300, 500)
    for granularity in (PER_TENSOR, PER_CHANNEL, by_group(64)):
        grid = fit_grid(weight, FORMATS["uint4"], granularity)
        codes = grid.quantize(weight)
        scale, zero = (expanded(x, granularity, weight.shape) for x in (grid.scale, grid.zero_point))
        assert torch.equal(codes, (torch.round(weight / scale) + zero).clamp(0, 15).to(torch.uint8))
        assert torch.equal(grid.dequantize(codes), scale * (codes.float() - zero))


def test_a_negative_scale_gives_the_extra_code_to_the_positive_side() -> None:
    grid = grid_of(torch.tensor([[-0.5]]), FORMATS["int4"], PER_CHANNEL, 3)
    assert grid.fake_quantize(torch.tensor([[9.0, -9.0, 1.0]])).tolist() == [[4.0, -3.5, 1.0]]


def test_dequantize_computes_in_float32_and_then_casts() -> None:
    scale = torch.tensor([[0.3]])
    grid = grid_of(scale, FORMATS["int8"], PER_CHANNEL, 1)
    codes = torch.tensor([[101]], dtype=torch.int8)
    assert grid.dequantize(codes, torch.bfloat16).item() == torch.tensor(0.3 * 101).bfloat16().item()
    assert grid.dequantize(codes, torch.bfloat16).item() != (scale.bfloat16() * codes).item()


def test_fake_quantize_keeps_the_dtype() -> None:
    weight = normal(2, 8).bfloat16()
    assert fit_grid(weight, FORMATS["int4"], PER_CHANNEL).fake_quantize(weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "name", "scale_dtype", "expected"),
    [
        ("group", "int4", torch.float16, 4 + 16 / 32),
        ("group", "uint4", torch.float16, 4 + (16 + 4) / 32),
        ("group", "uint3", torch.float32, 3 + (32 + 3) / 32),
        ("channel", "int8", torch.bfloat16, 8 + 16 / 96),
        ("tensor", "uint2", torch.float32, 2 + (32 + 2) / (4 * 96)),
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(
    kind: Kind, name: str, scale_dtype: torch.dtype, expected: float
) -> None:
    weight = normal(4, 96)
    granularity = Granularity(kind=kind, group_size=32 if kind == "group" else None)
    grid = fit_grid(weight, FORMATS[name], granularity, scale_dtype=scale_dtype)
    result = QTensor(codes=grid.quantize(weight), grid=grid)
    assert grid.scale.dtype == scale_dtype
    assert result.bits_per_weight == pytest.approx(expected)
    assert result.num_bits_total == round(expected * 4 * 96)
    assert result.shape == (4, 96)
    assert torch.equal(result.dequantize(), grid.fake_quantize(weight))


def test_saturated_fraction_counts_both_ends() -> None:
    grid = grid_of(torch.ones(1, 1), FORMATS["int3"], PER_CHANNEL, 8)
    codes = torch.tensor([[-4, -4, 3, 0, 1, 2, -3, -1]], dtype=torch.int8)
    assert QTensor(codes=codes, grid=grid).saturated_fraction == 3 / 8
    shifted = grid_of(torch.ones(1, 1), FORMATS["uint2"], PER_CHANNEL, 4, zero=2)
    assert QTensor(codes=torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), grid=shifted).saturated_fraction == 0.5


def test_moving_keeps_everything() -> None:
    grid = fit_grid(normal(2, 8), FORMATS["uint4"], by_group(4))
    moved = grid.to("cpu")
    assert torch.equal(moved.scale, grid.scale)
    assert torch.equal(moved.zero_point, grid.zero_point)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_scale_that_cannot_divide_is_refused(value: float) -> None:
    with pytest.raises(VerificationError, match="a scale is 0 or not finite"):
        grid_of(torch.tensor([[1.0], [value]]), FORMATS["int4"], PER_CHANNEL, 8)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"must be \[rows, groups\]"):
        grid_of(torch.ones(3), FORMATS["int4"], PER_CHANNEL, 8)
    with pytest.raises(ShapeError, match=r"expected \[2, 3\]"):
        grid_of(torch.ones(2, 2), FORMATS["int4"], by_group(4), 9)
    with pytest.raises(ShapeError, match="format uint4 takes a zero point"):
        Grid(format=FORMATS["uint4"], granularity=PER_CHANNEL, in_features=8, scale=torch.ones(2, 1), zero_point=None)
    with pytest.raises(ShapeError, match="differ"):
        Grid(
            format=FORMATS["uint4"],
            granularity=PER_CHANNEL,
            in_features=8,
            scale=torch.ones(2, 1),
            zero_point=torch.zeros(1, 1, dtype=torch.int32),
        )


def test_weights_and_codes_that_do_not_fit_are_refused() -> None:
    grid = grid_of(torch.ones(2, 1), FORMATS["int4"], PER_CHANNEL, 8)
    for shape in [(2, 7), (3, 8), (16,)]:
        with pytest.raises(ShapeError, match="does not fit this grid"):
            grid.quantize(torch.ones(shape))
    with pytest.raises(ShapeError, match="do not fit a grid"):
        QTensor(codes=torch.ones(3, 8, dtype=torch.int8), grid=grid)
    with pytest.raises(ShapeError, match="do not fit a grid"):
        QTensor(codes=torch.ones(2, 8, dtype=torch.uint8), grid=grid)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    grid = grid_of(torch.ones(2, 1), FORMATS["int4"], PER_CHANNEL, 2)
    with pytest.raises(VerificationError, match="NaN or Inf"):
        grid.quantize(torch.tensor([[1.0, 2.0], [value, 0.0]]))
