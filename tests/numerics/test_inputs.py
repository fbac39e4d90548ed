"""Quantized inputs: which of them share a scale, when it is found, and what happens beyond the calibrated range."""

import pytest
import torch
from torch import Tensor

from bitwright.calibration.observers import OBSERVERS
from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.block_scales import E8M0Scale, FixedFp8Scale, Fp8Scale, MxInputScale
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite, static_grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M1, E4M3
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid

INT8 = IntegerFormat(bits=8, symmetric=True, full_range=False)
UINT8 = IntegerFormat(bits=8, symmetric=False)
INT4 = IntegerFormat(bits=4, symmetric=True, full_range=False)
FORMATS: list[LevelFormat] = [INT8, UINT8, INT4, E4M3]
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
TENSOR, TOKEN = Granularity(kind="tensor"), Granularity(kind="token")
COLUMNS = Granularity(kind="columns", group_size=8)
DYNAMIC = [TENSOR, TOKEN, Granularity(kind="group", group_size=8)]
NUM_TOKENS, WIDTH = 7, 21  # the last group is ragged


def activations(num_tokens: int = NUM_TOKENS) -> Tensor:
    """Tokens of different sizes, with a channel that is much larger and a shift."""
    x = torch.randn(num_tokens, WIDTH) * torch.logspace(-1, 1, num_tokens).unsqueeze(1) + 0.5
    x[:, 3] *= 20
    return x


def step_bound(format: LevelFormat, scale: Tensor, values: Tensor) -> Tensor:
    """Half a step: of integers the scale, of E4M3 2^-3 of the power of two below a value (2^-9 at least)."""
    if isinstance(format, IntegerFormat):
        # The zero point rounds too, so that a range may end half a step early; the rest is float32 roundoff.
        return scale * ((0.5 if format.symmetric else 1.0) + 2.0**-14)
    return torch.maximum(values.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)


def grid_of(quantized: QTensor) -> Grid:
    assert isinstance(quantized.grid, Grid)
    return quantized.grid


@EVERY_FORMAT
@pytest.mark.parametrize("granularity", DYNAMIC, ids=lambda g: g.kind)
def test_dynamic_scales_cover_what_they_are_found_from(format: LevelFormat, granularity: Granularity) -> None:
    x = activations()
    before = x.clone()
    result = InputQuantizer(format=format, granularity=granularity).quantize(x)
    assert result.grid.granularity == granularity
    assert result.grid.format == format
    assert torch.equal(grid_of(result).scale, fit_grid(x, format, granularity).scale)
    groups = granularity.split(x)
    scale = granularity.join(grid_of(result).scale.unsqueeze(-1).expand_as(groups), NUM_TOKENS, WIDTH)
    assert ((result.dequantize() - x).abs() <= step_bound(format, scale, x)).all()
    assert torch.equal(x, before)


@EVERY_FORMAT
def test_per_token_and_per_group_scales_do_not_see_other_tokens(format: LevelFormat) -> None:
    x = activations()
    for granularity in (TOKEN, Granularity(kind="group", group_size=8)):
        quantizer = InputQuantizer(format=format, granularity=granularity)
        whole = quantizer.quantize(x)
        for start, stop in ((0, 1), (2, 5), (6, 7)):
            part = quantizer.quantize(x[start:stop])
            assert torch.equal(part.codes, whole.codes[start:stop])
            assert torch.equal(part.dequantize(), whole.dequantize()[start:stop])
    tensor = InputQuantizer(format=format, granularity=TENSOR)
    assert not torch.equal(tensor.quantize(x[:2]).dequantize(), tensor.quantize(x).dequantize()[:2])


def shared(x: Tensor, granularity: Granularity) -> list[tuple[tuple[int, int], Tensor]]:
    """The position [R, G] of each scale, and the inputs it serves; spelled out, not by `split`."""
    rows = [x] if granularity.kind in ("tensor", "columns") else [row[None] for row in x]
    borders = [(0, 8), (8, 16), (16, WIDTH)] if granularity.group_size else [(0, WIDTH)]
    return [((r, g), row[:, start:end]) for r, row in enumerate(rows) for g, (start, end) in enumerate(borders)]


@pytest.mark.parametrize("granularity", [*DYNAMIC, COLUMNS], ids=lambda g: g.kind)
def test_dynamic_symmetric_scales_are_absmax_over_the_largest_code(granularity: Granularity) -> None:
    x = activations()
    scale = grid_of(InputQuantizer(format=INT8, granularity=granularity).quantize(x)).scale
    assert tuple(scale.shape) == granularity.scale_shape(*x.shape)
    for position, values in shared(x, granularity):
        assert scale[position] == (values.abs().max().double() / 127).float()


@pytest.mark.parametrize("granularity", [*DYNAMIC, COLUMNS], ids=lambda g: g.kind)
def test_dynamic_asymmetric_grids_reach_from_end_to_end(granularity: Granularity) -> None:
    x = activations()
    for format in (UINT8, IntegerFormat(bits=4, symmetric=False)):
        grid = grid_of(InputQuantizer(format=format, granularity=granularity).quantize(x))
        assert grid.zero_point is not None
        for position, values in shared(x, granularity):
            low, high = values.min().double().clamp(max=0), values.max().double().clamp(min=0)
            scale = ((high - low) / format.qmax).float()
            assert grid.scale[position] == scale
            assert grid.zero_point[position] == int(torch.round(-low / scale.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_quantized_as_its_float32_value(dtype: torch.dtype) -> None:
    x = activations().to(dtype)
    for granularity in DYNAMIC:
        quantizer = InputQuantizer(format=UINT8, granularity=granularity)
        assert torch.equal(quantizer.quantize(x).codes, quantizer.quantize(x.float()).codes)


def test_tokens_of_zeros_stay_zeros() -> None:
    x = activations()
    x[2] = 0
    for format in FORMATS:
        assert torch.equal(
            InputQuantizer(format=format, granularity=TOKEN).quantize(x).dequantize()[2], torch.zeros(WIDTH)
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = activations()
    static = InputQuantizer(format=INT8, granularity=TENSOR, static=static_grid(*ends(x, TENSOR), INT8, TENSOR, WIDTH))
    x[4, 4] = value
    for quantizer in (*(InputQuantizer(format=INT8, granularity=each) for each in DYNAMIC), static):
        with pytest.raises(VerificationError, match="NaN or Inf"):
            quantizer.quantize(x)


# Calibrated ranges


def ends(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest input per group of columns, 0 included: [G] each, in float64."""
    groups = granularity.split(x.double()).clamp(max=0).amin(-1), granularity.split(x.double()).clamp(min=0).amax(-1)
    return groups[0][0], groups[1][0]


@EVERY_FORMAT
@pytest.mark.parametrize("granularity", [TENSOR, COLUMNS], ids=lambda g: g.kind)
def test_a_static_grid_is_the_minmax_grid_of_its_range(format: LevelFormat, granularity: Granularity) -> None:
    x = activations()
    grid = static_grid(*ends(x, granularity), format, granularity, WIDTH)
    expected = fit_grid(x, format, granularity)
    assert grid.scale.shape == granularity.scale_shape(NUM_TOKENS, WIDTH)
    assert torch.equal(grid.scale, expected.scale)
    if grid.zero_point is not None:
        assert expected.zero_point is not None
        assert torch.equal(grid.zero_point, expected.zero_point)
    quantizer = InputQuantizer(format=format, granularity=granularity, static=grid)
    assert torch.equal(quantizer.quantize(x).codes, expected.quantize(x))


@EVERY_FORMAT
@pytest.mark.parametrize("granularity", [TENSOR, COLUMNS], ids=lambda g: g.kind)
def test_static_scales_stay_as_they_are_and_inputs_beyond_them_saturate(
    format: LevelFormat, granularity: Granularity
) -> None:
    x = activations()
    low, high = ends(x, granularity)
    static = static_grid(low, high, format, granularity, WIDTH)
    quantizer = InputQuantizer(format=format, granularity=granularity, static=static)
    for tokens in (x, x * 1000, x[:1] / 1000, x[:0]):
        result = quantizer.quantize(tokens)
        assert result.grid is static
        assert result.shape == tokens.shape
    width = granularity.columns_per_group(WIDTH)
    columns = torch.arange(WIDTH) // width
    far = quantizer.quantize(torch.full((2, WIDTH), 1e6) * torch.tensor([[-1.0], [1.0]])).dequantize()
    # A symmetric format reaches as far on either side, whichever side was seen there.
    reach = torch.maximum(-low, high) if format.symmetric else None
    slack = 0.0 if format.symmetric else 1.0  # the zero point rounds
    steps = slack * static.scale[0, columns].double() + 1e-5 * (high - low)[columns]
    assert ((far[0].double() - (low if reach is None else -reach)[columns]).abs() <= steps).all()
    assert ((far[1].double() - (high if reach is None else reach)[columns]).abs() <= steps).all()


def test_a_shifted_range_needs_a_zero_point() -> None:
    x = activations() + 10
    error = {
        format.symmetric: float(
            (InputQuantizer(format=format, granularity=TOKEN).quantize(x).dequantize() - x).square().sum()
        )
        for format in (IntegerFormat(bits=8, symmetric=True, full_range=False), UINT8)
    }
    assert error[False] < 0.5 * error[True]
    positive = torch.rand(NUM_TOKENS, WIDTH)
    codes = InputQuantizer(format=UINT8, granularity=TOKEN).quantize(positive).codes
    assert int(codes.max()) == 255
    assert int(InputQuantizer(format=INT8, granularity=TOKEN).quantize(positive).codes.min()) >= 0


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("granularity", [TENSOR, COLUMNS], ids=lambda g: g.kind)
@pytest.mark.parametrize("format", [INT8, UINT8, E4M3], ids=lambda f: f.name)
def test_a_static_grid_reaches_exactly_as_far_as_the_observer_says(
    observer: str, granularity: Granularity, format: LevelFormat
) -> None:
    watcher = OBSERVERS[observer](num_channels=WIDTH, granularity=granularity)
    for batch in activations(400).split(100):
        watcher.observe(batch)
    low, high = watcher.range(format)
    grid = static_grid(low, high, format, granularity, WIDTH)
    if format.symmetric:
        torch.testing.assert_close(
            grid.scale[0].double() * format.max_value, torch.maximum(-low, high), rtol=2.0**-22, atol=0
        )
        return
    assert grid.zero_point is not None
    torch.testing.assert_close(grid.scale[0].double() * 255, high - low, rtol=2.0**-22, atol=0)
    bottom = -grid.scale[0].double() * grid.zero_point[0]
    assert ((bottom - low).abs() <= grid.scale[0] * (0.5 + 2.0**-12)).all()


@EVERY_FORMAT
@pytest.mark.parametrize("granularity", [TENSOR, COLUMNS], ids=lambda g: g.kind)
def test_static_grid_of_observed_ends_is_the_minmax_grid_of_all_inputs(
    format: LevelFormat, granularity: Granularity
) -> None:
    x = activations(64)
    observer = OBSERVERS["minmax"](num_channels=WIDTH, granularity=granularity)
    for batch in x.split(10):
        observer.observe(batch)
    grid = static_grid(*observer.range(format), format, granularity, WIDTH)
    expected = fit_grid(x, format, granularity)
    assert torch.equal(grid.scale, expected.scale)
    assert (grid.zero_point is None) == (expected.zero_point is None)
    if grid.zero_point is not None and expected.zero_point is not None:
        assert torch.equal(grid.zero_point, expected.zero_point)
    assert grid.in_features == WIDTH


def test_a_group_that_saw_only_zeros_has_a_scale() -> None:
    low, high = torch.tensor([-1.0, 0.0, 0.0]).double(), torch.tensor([1.0, 0.0, 2.0]).double()
    for format in FORMATS:
        grid = static_grid(low, high, format, COLUMNS, WIDTH)
        x = torch.zeros(1, WIDTH)
        assert torch.equal(grid.fake_quantize(x), x)


@pytest.mark.parametrize("num_ends", [1, 2, 4])
def test_static_grid_refuses_ends_of_other_groups(num_ends: int) -> None:
    with pytest.raises(ShapeError, match=rf"\[{num_ends}\].*\[3\]"):
        static_grid(-torch.ones(num_ends), torch.ones(num_ends), INT8, COLUMNS, WIDTH)


@pytest.mark.parametrize("granularity", [TOKEN, *DYNAMIC[1:], Granularity(kind="channel")], ids=lambda g: g.kind)
def test_a_static_scale_per_row_is_refused(granularity: Granularity) -> None:
    zero = torch.zeros(1).double()
    with pytest.raises(RecipeError, match=f"a static scale cannot be per {granularity.kind}"):
        static_grid(zero, zero, INT8, granularity, WIDTH)


def test_static_scales_of_other_columns_are_refused() -> None:
    x = activations()
    static = static_grid(*ends(x, COLUMNS), INT8, COLUMNS, WIDTH)
    with pytest.raises(ShapeError, match="does not fit this grid"):
        InputQuantizer(format=INT8, granularity=COLUMNS, static=static).quantize(x[:, :20])


# Rounded scales


@pytest.mark.parametrize("scale", [E8M0Scale(), MxInputScale(element=E2M1), Fp8Scale()], ids=lambda s: type(s).__name__)
def test_run_time_scales_are_rounded_before_codes_are_chosen(
    scale: E8M0Scale | MxInputScale | Fp8Scale,
) -> None:
    granularity = Granularity(kind="group", group_size=8)
    x = activations()
    result = InputQuantizer(format=E2M1, granularity=granularity, scale=scale).quantize(x)
    grid = result.grid
    bound = scale.bind((x.abs().max() / 6).double())
    expected = bound.round(granularity.split(x.abs()).amax(-1).double() / 6)
    assert torch.equal(fit_grid(x, E2M1, granularity, scale=scale).scale, expected)
    assert torch.equal(result.dequantize(), grid.dequantize(result.codes))
    assert torch.equal(result.codes, grid.quantize(x))


def test_a_fixed_level_above_fp8_scales_saturates_beyond_calibration() -> None:
    granularity = Granularity(kind="group", group_size=8)
    x = activations()
    seen = x.abs().max()
    quantizer = InputQuantizer(
        format=E2M1, granularity=granularity, scale=FixedFp8Scale.for_largest((seen / 6).double())
    )
    free = InputQuantizer(format=E2M1, granularity=granularity, scale=Fp8Scale())
    assert torch.equal(quantizer.quantize(x).dequantize(), free.quantize(x).dequantize())
    beyond = quantizer.quantize(x * 4).dequantize()
    # The largest FP8 times the largest FP4 stands for the largest input seen.
    torch.testing.assert_close(beyond.abs().max(), seen, rtol=2.0**-20, atol=0)
    small = x / 1e6  # below the smallest FP8 scale of the level, which was made for larger inputs
    assert not torch.equal(quantizer.quantize(small).dequantize(), free.quantize(small).dequantize())


def test_moving_keeps_everything() -> None:
    x = activations()
    static = static_grid(*ends(x, COLUMNS), UINT8, COLUMNS, WIDTH)
    weight_grid = fit_grid(torch.randn(4, WIDTH), INT4, TOKEN)
    weight = QTensor(codes=weight_grid.quantize(torch.randn(4, WIDTH)), grid=weight_grid)
    for inputs in (None, InputQuantizer(format=UINT8, granularity=COLUMNS, static=static)):
        moved = QuantizedSite(weight=weight, inputs=inputs).to("cpu")
        assert torch.equal(moved.weight.dequantize(), weight.dequantize())
        if inputs is None:
            assert moved.inputs is None
        else:
            assert moved.inputs is not None
            assert torch.equal(moved.inputs.quantize(x).codes, inputs.quantize(x).codes)
    dynamic = InputQuantizer(format=INT8, granularity=TOKEN)
    assert dynamic.to("cpu") is dynamic
