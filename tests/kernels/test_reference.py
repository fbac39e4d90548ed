"""Products on codes against integers in 64 bits and floats in 64 bits."""

from itertools import product as combinations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import ShapeError, VerificationError
from bitwright.kernels import reference
from bitwright.kernels.reference import linear, product
from bitwright.numerics.block_scales import Fp8Scale, MxInputScale
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import FORMATS, Format, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite, static_grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M1, E4M3, E5M2
from bitwright.numerics.outliers import split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale, ScaleFormat

FLOAT32 = FloatScale(torch.float32)
TENSOR, TOKEN, CHANNEL = Granularity(kind="tensor"), Granularity(kind="token"), Granularity(kind="channel")
NUM_TOKENS, NUM_OUT = 5, 6
LONG = 3000
"""Columns. 1032 products of int8 reach 2^24, so that float32 alone could not add this many."""
ROUNDOFF = 2.0**-24


def group(size: int) -> Granularity:
    return Granularity(kind="group", group_size=size)


def integers(bits: int, symmetric: bool) -> IntegerFormat:
    return IntegerFormat(bits=bits, symmetric=symmetric, full_range=not symmetric)


def quantized(
    weight: Tensor, format: Format, granularity: Granularity, scale: ScaleFormat = FLOAT32, *, method: str = "minmax"
) -> QTensor:
    grid = fit(weight, format, granularity, method=method, importance=None, scale=scale)
    return QTensor(codes=grid.quantize(weight), grid=grid)


def inputs_of(x: Tensor, format: LevelFormat, granularity: Granularity) -> InputQuantizer:
    if granularity.kind == "columns":
        groups = granularity.split(x.double())[0]
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        static = static_grid(low, high, format, granularity, x.shape[1])
        return InputQuantizer(format=format, granularity=granularity, static=static)
    return InputQuantizer(format=format, granularity=granularity)


def activations(num_columns: int) -> Tensor:
    """All of one sign in places, so that sums grow and do not cancel."""
    return torch.randn(NUM_TOKENS, num_columns) + 1.5


def by_definition(x: QTensor, weight: QTensor) -> Tensor:
    """The formula of the module, with sums in int64: every column's product, summed per pair of groups."""
    assert isinstance(x.grid, Grid)
    assert isinstance(weight.grid, Grid)
    width = x.shape[1]
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    groups: dict[tuple[int, int], list[int]] = {}
    for j in range(width):
        key = tuple(j // m.grid.granularity.columns_per_group(width) for m in (x, weight))
        groups.setdefault((key[0], key[1]), []).append(j)
    for columns in groups.values():
        sides: list[tuple[Tensor, Tensor]] = []
        for matrix in (x, weight):
            assert isinstance(matrix.grid, Grid)
            scale, zero = matrix.grid.column(columns[0], matrix.shape[0])
            values = matrix.codes[:, columns].long()
            zeros = torch.zeros(1, dtype=torch.long) if zero is None else zero.long()
            sides.append((values - zeros[:, None], scale.double()[:, None]))
        (x_values, x_scale), (weight_values, weight_scale) = sides
        total += (x_values @ weight_values.T).double() * (x_scale * weight_scale.T)
    return total.float()


INTEGER_CASES = [
    pytest.param(integers(bits, x_symmetric), granularity, FORMATS[name], weight_granularity, id=str(number))
    for number, (bits, x_symmetric, granularity, name, weight_granularity) in enumerate(
        combinations(
            (8, 4),
            (True, False),
            (TOKEN, TENSOR, group(96), Granularity(kind="columns", group_size=700)),
            ("int8", "uint8", "int4", "uint4", "int2"),
            (CHANNEL, TENSOR, group(128), Granularity(kind="block", group_size=256, block_rows=4)),
        )
    )
    # Every pair of the five occurs; all together are five times as many.
    if number % 5 in (0, 3)
]


@pytest.mark.parametrize(("format", "granularity", "weight_format", "weight_granularity"), INTEGER_CASES)
def test_integer_sums_are_exact(
    format: IntegerFormat, granularity: Granularity, weight_format: LevelFormat, weight_granularity: Granularity
) -> None:
    x, weight = activations(LONG), torch.randn(NUM_OUT, LONG) + 1.0
    codes, weight_codes = (
        inputs_of(x, format, granularity).quantize(x),
        quantized(weight, weight_format, weight_granularity),
    )
    assert torch.equal(product(codes, weight_codes), by_definition(codes, weight_codes))


def test_float32_alone_would_not_be_exact() -> None:
    """The largest codes everywhere: the sum needs more than 24 bits, and odd numbers that float32 does not have."""
    x = torch.full((1, LONG), 127.0)
    x[0, 1::2] = 126.0
    weight = torch.full((1, LONG), 127.0)
    unit = Grid(format=FORMATS["int8"], granularity=TENSOR, in_features=LONG, scale=torch.ones(1, 1), zero_point=None)  # type: ignore[arg-type]
    codes = [QTensor(codes=each.to(torch.int8), grid=unit) for each in (x, weight)]
    exact = int((x.long() * weight.long()).sum())
    assert exact > 2**24
    odd = codes[1].codes.clone()
    odd[0, -1] = 1
    single = QTensor(codes=odd, grid=unit)
    expected = exact - 126 * 126
    assert product(codes[0], codes[1]).item() == torch.tensor(exact).float().item()
    assert product(codes[0], single).item() == torch.tensor(expected).float().item()
    assert reference.EXACT_FLOAT32 == 2**24 == int(torch.tensor(2**24 + 1).float())


@pytest.mark.parametrize(
    ("format", "value", "zero"),
    [
        (IntegerFormat(bits=8, symmetric=True), -128, None),
        (IntegerFormat(bits=8, symmetric=True), 127, None),
        (IntegerFormat(bits=8, symmetric=False), 255, 0),
        (IntegerFormat(bits=8, symmetric=False), -255, 255),
    ],
)
def test_a_single_one_survives_sums_beyond_float32(format: LevelFormat, value: int, zero: int | None) -> None:
    """Two groups of the largest products there are, of opposite scales, and a single 1 in the first."""
    width = 4097
    unit = value // abs(value)
    largest = torch.full((width - 1,), value)
    # Even and beyond 2^24, so that with the 1 it is no float32 any more.
    assert (width - 1) * value**2 > reference.EXACT_FLOAT32

    def codes_of(last: tuple[int, int], granularity: Granularity, scale: list[float]) -> QTensor:
        values = torch.cat([largest, torch.tensor(last[:1]), largest, torch.tensor(last[1:])])
        zero_point = None if zero is None else torch.full((1, len(scale)), zero, dtype=torch.int32)
        scales = torch.tensor([scale])
        grid = Grid(format=format, granularity=granularity, in_features=2 * width, scale=scales, zero_point=zero_point)
        return QTensor(codes=(values + (zero or 0)).to(format.code_dtype)[None], grid=grid)

    weight = codes_of((unit, unit), group(width), [1.0, -1.0])
    assert product(codes_of((unit, 0), TENSOR, [1.0]), weight).item() == 1.0


@pytest.mark.parametrize("num_columns", [1, 2, 1031, 1032, 1033, 2064, 2065])
def test_runs_end_where_they_should(num_columns: int) -> None:
    x, weight = torch.ones(2, num_columns), -torch.ones(3, num_columns)
    codes = quantized(x, integers(8, True), TOKEN), quantized(weight, FORMATS["int8"], CHANNEL)
    assert torch.equal(product(*codes), by_definition(*codes))
    torch.testing.assert_close(product(*codes), torch.full((2, 3), -float(num_columns)), rtol=2.0**-20, atol=0)


# Other codes


def accumulation_bound(x: QTensor, weight: QTensor) -> Tensor:
    """Float32 sums of n products in any order, of factors that rounded once each: (n + 3) units of Σ |x w|."""
    a, b = x.dequantize().double().abs(), weight.dequantize().double().abs()
    return (x.shape[1] + 3) * ROUNDOFF * (a @ b.T) * (1 + 2.0**-10)


def exact_values(matrix: QTensor) -> Tensor:
    """The levels times the scales, in float64; with the outliers."""
    if not isinstance(matrix.grid, Grid):
        return matrix.dequantize().double()
    grid = matrix.grid
    zero = None
    columns = [grid.column(j, matrix.shape[0])[0].double().expand(matrix.shape[0]) for j in range(matrix.shape[1])]
    if grid.zero_point is not None:
        zeros = [grid.column(j, matrix.shape[0])[1] for j in range(matrix.shape[1])]
        zero = torch.stack([each.expand(matrix.shape[0]) for each in zeros if each is not None], dim=1)
    values = grid.format.decode(matrix.codes, zero).double() * torch.stack(columns, dim=1)
    return values if matrix.outliers is None else matrix.outliers.add_to(values)


FLOAT_CASES = {
    "fp8": (E4M3, TOKEN, FLOAT32, "fp8-e4m3", CHANNEL, FLOAT32),
    "fp8-block": (
        E4M3,
        group(64),
        FLOAT32,
        "fp8-e4m3",
        Granularity(kind="block", group_size=64, block_rows=4),
        FLOAT32,
    ),
    "fp8-e5m2": (E5M2, TENSOR, FLOAT32, "fp8-e5m2", TENSOR, FLOAT32),
    "nvfp4": (E2M1, group(16), Fp8Scale(), "fp4-e2m1", group(16), Fp8Scale()),
    "mxfp4": (E2M1, group(32), MxInputScale(element=E2M1), "fp4-e2m1", group(32), SCALE_FORMATS["e8m0"]),
    "mxfp8": (E4M3, group(32), MxInputScale(element=E4M3), "fp8-e4m3", group(32), SCALE_FORMATS["e8m0"]),
    "int8-nf4": (integers(8, True), TOKEN, FLOAT32, "nf4", group(64), FLOAT32),
    "int8-kmeans": (integers(8, False), TOKEN, FLOAT32, "kmeans3", CHANNEL, FLOAT32),
    "int8-lut": (integers(8, True), TOKEN, FLOAT32, "lut3", group(50), FLOAT32),
    "fp8-int4": (E4M3, TOKEN, FLOAT32, "uint4", group(50), FLOAT32),
    "int8-ternary": (integers(8, True), TOKEN, FLOAT32, "ternary", group(50), FLOAT32),
    "int8-binary": (integers(8, True), TOKEN, FLOAT32, "binary", CHANNEL, FLOAT32),
}


@pytest.mark.parametrize("case", list(FLOAT_CASES))
def test_other_codes_are_summed_in_float32(case: str) -> None:
    format, granularity, scale, name, weight_granularity, weight_scale = FLOAT_CASES[case]
    x, weight = activations(300), torch.randn(NUM_OUT, 300)
    codes = InputQuantizer(format=format, granularity=granularity, scale=scale).quantize(x)
    weight_codes = quantized(weight, FORMATS[name], weight_granularity, weight_scale, method="mse")
    expected = exact_values(codes) @ exact_values(weight_codes).T
    found = product(codes, weight_codes)
    assert found.dtype == torch.float32
    assert ((found.double() - expected).abs() <= accumulation_bound(codes, weight_codes)).all()
    assert not torch.equal(found, x @ weight.T), "inputs and weight are quantized"


@pytest.mark.parametrize("name", ["kmeans4", "int4"])
def test_outliers_take_part(name: str) -> None:
    x, weight = activations(200), torch.randn(NUM_OUT, 200)
    weight[2, 77] = 40.0
    rest, outliers = split_outliers(weight, 0.01)
    plain = quantized(rest, FORMATS[name], CHANNEL)
    kept = QTensor(codes=plain.codes, grid=plain.grid, outliers=outliers)
    codes = quantized(x, integers(8, True), TOKEN)
    found = product(codes, kept)
    expected = exact_values(codes) @ exact_values(kept).T
    assert ((found.double() - expected).abs() <= accumulation_bound(codes, kept)).all()
    assert not torch.allclose(found[:, 2], product(codes, plain)[:, 2])


def test_mixed_integer_widths_with_power_of_two_scales_are_exact() -> None:
    """MXINT8: the scales are no floats, but the codes are integers all the same."""
    x, weight = activations(256), torch.randn(NUM_OUT, 256)
    scale = SCALE_FORMATS["e8m0-int8"]
    codes = InputQuantizer(format=FORMATS["int8"], granularity=group(32), scale=scale).quantize(x)  # type: ignore[arg-type]
    weight_codes = quantized(weight, FORMATS["int8"], group(32), scale)
    assert torch.equal(product(codes, weight_codes), by_definition(codes, weight_codes))


# The linear layer


def site_of(weight: Tensor, inputs: InputQuantizer | None) -> QuantizedSite:
    return QuantizedSite(weight=quantized(weight, FORMATS["int4"], group(32)), inputs=inputs)


W8A8 = InputQuantizer(format=integers(8, True), granularity=TOKEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_linear_is_the_product_with_bias_in_the_dtype_of_its_inputs(
    dtype: torch.dtype, with_bias: bool, batch: tuple[int, ...]
) -> None:
    x = torch.randn(*batch, 64).to(dtype)
    bias = torch.randn(NUM_OUT).to(dtype) if with_bias else None
    site = site_of(torch.randn(NUM_OUT, 64), W8A8)
    found = linear(x, site, bias)
    assert (found.shape, found.dtype) == ((*batch, NUM_OUT), dtype)
    rows = product(W8A8.quantize(x.reshape(-1, 64)), site.weight)
    # The bias is added before the one rounding to the dtype of the inputs.
    expected = (rows if bias is None else rows + bias.float()).to(dtype).reshape(found.shape)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_not_quantized_meet_the_dequantized_weight(dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 3, 64).to(dtype), torch.randn(NUM_OUT).to(dtype)
    site = site_of(torch.randn(NUM_OUT, 64), None)
    assert torch.equal(linear(x, site, bias), functional.linear(x, site.weight.dequantize(dtype), bias))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens_at_all(shape: tuple[int, ...]) -> None:
    """An expert that the router sends nothing to."""
    site = site_of(torch.randn(NUM_OUT, 64), W8A8)
    assert linear(torch.empty(shape), site, torch.zeros(NUM_OUT)).shape == (*shape[:-1], NUM_OUT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = value
    static = inputs_of(torch.randn(3, 64), integers(8, True), Granularity(kind="columns", group_size=32))
    for inputs in (W8A8, static):
        with pytest.raises(VerificationError, match="NaN or Inf"):
            linear(x, site_of(torch.randn(NUM_OUT, 64), inputs))


def test_inputs_of_another_width_are_refused() -> None:
    site = site_of(torch.randn(NUM_OUT, 64), W8A8)
    for inputs in (W8A8, None):
        with pytest.raises(ShapeError, match=r"linear: inputs \[3, 65\] must be \[\.\.\., 64\]"):
            linear(torch.randn(3, 65), QuantizedSite(weight=site.weight, inputs=inputs))
    with pytest.raises(ShapeError, match=r"product: inputs \[3, 65\] and weight \[6, 64\] must have as many columns"):
        product(W8A8.quantize(torch.randn(3, 65)), site.weight)


def test_finer_codes_come_closer_to_the_product_of_floats() -> None:
    x, weight = torch.randn(64, 256), torch.randn(32, 256)
    errors = [
        float(
            (
                product(quantized(x, integers(bits, True), TOKEN), quantized(weight, FORMATS["int8"], CHANNEL))
                - x @ weight.T
            )
            .square()
            .mean()
        )
        for bits in (3, 4, 6, 8)
    ]
    # Each bit of the inputs quarters their part of the error; at 8 bits half of it is the weight's.
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3] > 0
