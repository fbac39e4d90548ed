"""Conformance: every registered format inherits these checks."""

import math
from fractions import Fraction
from typing import cast

import pytest
import torch

from bitwright.errors import RecipeError, UnknownName
from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.formats import (
    FORMATS,
    Format,
    LevelFormat,
    has_float_zero,
    num_code_bits,
    num_zero_point_bits,
)
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import MIN_SCALE, FloatScale
from bitwright.numerics.ternary import TernaryFormat
from bitwright.numerics.trits import pack_trits, unpack_trits

EVERY_FORMAT = pytest.mark.parametrize("format", [FORMATS[name] for name in FORMATS], ids=list(FORMATS))
LEVEL_FORMATS = [cast(LevelFormat, FORMATS[name]) for name in FORMATS if not isinstance(FORMATS[name], CodebookFormat)]
EVERY_LEVEL_FORMAT = pytest.mark.parametrize("format", LEVEL_FORMATS, ids=lambda f: f.name)
COVERING_METHODS = ("minmax", "percentile", "mse")
KINDS = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="token"),
    Granularity(kind="group", group_size=16),
    Granularity(kind="block", group_size=16, block_rows=2),
    Granularity(kind="columns", group_size=16),
]


def zero_points(format: LevelFormat) -> list[torch.Tensor | None]:
    if format.symmetric:
        return [None]
    if has_float_zero(format):  # also outside the range; exact in float32
        return [torch.tensor(z) for z in (0.25, format.max_value / 2 + 0.125, format.max_value + 1.5, -2.75)]
    return [torch.tensor(float(z)) for z in {format.min_value, format.max_value // 2, format.max_value}]


def used_codes(format: LevelFormat, zero_point: torch.Tensor | None) -> torch.Tensor:
    """The codes that `encode` gives for the value of some code, ascending by value; not -0, NaN or a second zero."""
    every = torch.arange(format.min_code, format.min_code + 2 ** math.ceil(format.bits)).to(format.code_dtype)
    every = every[format.decode(every, zero_point).isfinite()]
    values = format.decode(every, zero_point)
    every = every[format.encode(values, zero_point) == every]
    return every[format.decode(every, zero_point).argsort()]


def has_zero(format: LevelFormat) -> bool:
    return float(format.snap(torch.zeros(1), zero_points(format)[0])) == 0


def test_which_formats_have_no_zero() -> None:
    without = {format.name for format in LEVEL_FORMATS if not has_zero(format)}
    named = {name for name in FORMATS if name.startswith("lloyd") or name.endswith("-floatzero")}
    assert without == {"binary", *named}


@EVERY_LEVEL_FORMAT
def test_the_code_table_is_closed(format: LevelFormat) -> None:
    for zero_point in zero_points(format):
        codes = used_codes(format, zero_point)
        values = format.decode(codes, zero_point)
        # Bitsandbytes' FP4 has a second code for 0, for numbers just above it; it is used, but no value needs it.
        assert len(codes) == len(values.unique()) == format.num_codes - (format.name == "fp4-bnb")
        assert values.dtype == torch.float32
        assert torch.equal(format.snap(values, zero_point), values)
        assert (int(codes[0]), int(codes[-1])) == format.end_codes
        shift = 0.0 if zero_point is None else float(zero_point)
        assert (float(values[0]), float(values[-1])) == (format.min_value - shift, format.max_value - shift)


@EVERY_FORMAT
def test_codes_fit_their_storage(format: Format) -> None:
    assert format.num_codes <= 2 ** math.ceil(format.bits)
    assert format.num_codes >= 2 ** (format.bits - 1), "else fewer bits would do"
    assert FORMATS[format.name] == format
    low, high = sorted(format.end_codes)
    info = torch.iinfo(format.code_dtype)
    assert info.min <= format.min_code <= low < high <= min(info.max, format.min_code + 2**8 - 1)
    # Stored codes count from 0 and survive being packed as their format says.
    codes = torch.arange(format.min_code, format.min_code + format.num_codes).to(format.code_dtype)
    stored = codes.to(torch.int32) - format.min_code
    if isinstance(format, TernaryFormat):
        assert torch.equal(unpack_trits(pack_trits(stored), 3).int(), stored)
    else:
        assert torch.equal(unpack(pack(stored, int(format.bits)), int(format.bits), len(stored)).int(), stored)


@EVERY_LEVEL_FORMAT
def test_far_values_saturate_and_zero_is_exact_where_there_is_one(format: LevelFormat) -> None:
    far = torch.tensor([-1e30, 1e30])
    for zero_point in zero_points(format):
        values = format.decode(used_codes(format, zero_point), zero_point)
        ends = torch.stack([values[0], values[-1]])
        assert torch.equal(format.snap(far, zero_point), ends)
        assert torch.equal(format.snap(far * torch.inf, zero_point), ends)
        snapped = format.snap(torch.tensor([0.0, -0.0]), zero_point)
        assert bool((values == 0).any()) == has_zero(format)
        assert torch.equal(snapped.abs(), values.abs().min().expand(2))


@EVERY_LEVEL_FORMAT
def test_snap_finds_the_nearest_value_and_equals_decode_of_encode(format: LevelFormat) -> None:
    # Shifted so that no number lies on a border, where float32 cannot tell which level is nearer.
    scaled = torch.linspace(format.min_value * 1.5 - 1, format.max_value * 1.5 + 1, 4001) + 1e-3
    for zero_point in zero_points(format):
        table = format.decode(used_codes(format, zero_point), zero_point).double()
        snapped = format.snap(scaled, zero_point)
        nearest = (scaled.double()[:, None] - table[None]).abs().amin(1)
        # A float32 border is off by half an ulp at most.
        slack = torch.finfo(torch.float32).eps * (1 + scaled.abs().double())
        assert bool(((scaled.double() - snapped.double()).abs() <= nearest + slack).all())
        codes = format.encode(scaled, zero_point)
        assert codes.dtype == format.code_dtype
        assert torch.equal(format.decode(codes, zero_point), snapped)


@EVERY_LEVEL_FORMAT
def test_shapes_are_kept_and_nothing_is_modified(format: LevelFormat) -> None:
    scaled = torch.randn(3, 4, 5)
    before = scaled.clone()
    zero_point = zero_points(format)[0]
    strided = scaled.transpose(0, 2)
    for given in (scaled, strided, scaled[:0]):
        codes = format.encode(given, zero_point)
        assert codes.shape == format.decode(codes, zero_point).shape == format.snap(given, zero_point).shape
        assert codes.shape == given.shape
    assert torch.equal(format.snap(strided, zero_point), format.snap(scaled, zero_point).transpose(0, 2))
    assert torch.equal(scaled, before)


@EVERY_LEVEL_FORMAT
@pytest.mark.parametrize("method", COVERING_METHODS)
@pytest.mark.parametrize("granularity", KINDS, ids=lambda g: g.kind)
def test_every_method_and_granularity_gives_a_finite_idempotent_result(
    format: LevelFormat, method: str, granularity: Granularity
) -> None:
    weight = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    weight[2:4] = 0
    scale = FloatScale(torch.float16)
    grid = fit_grid(weight, format, granularity, method=method, importance=torch.rand(37), scale=scale)
    result = QTensor(codes=grid.quantize(weight), grid=grid)
    values = result.dequantize()
    assert values.isfinite().all()
    assert torch.equal(grid.quantize(values), result.codes)
    if has_zero(format):
        assert torch.equal(values[2:4], torch.zeros(2, 37))
    elif not granularity.spans_rows:
        # The group of zeros has the smallest scale there is.
        reach = max(-format.min_value, format.max_value) * MIN_SCALE[torch.float16]
        assert float(values[2:4].abs().max()) <= reach
    zero_bits = 0 if format.symmetric else 16 if has_float_zero(format) else int(format.bits)
    assert num_zero_point_bits(format, 7) == 7 * zero_bits
    bits = num_code_bits(format, 5 * 37) + grid.scale.numel() * (16 + zero_bits)
    assert result.num_bits_total == bits


@EVERY_FORMAT
@pytest.mark.parametrize("num_codes", [1, 5, 6, 37, 15 * 7, 4096 * 4096])
def test_bits_of_codes_are_those_of_the_decimal_number(format: Format, num_codes: int) -> None:
    exact = Fraction(8, 5) if isinstance(format, TernaryFormat) else Fraction(int(format.bits))
    assert 0 <= num_code_bits(format, num_codes) - exact * num_codes < 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_ranges(bits: int) -> None:
    full = IntegerFormat(bits=bits, symmetric=True)
    restricted = IntegerFormat(bits=bits, symmetric=True, full_range=False)
    affine = IntegerFormat(bits=bits, symmetric=False)
    floating = IntegerFormat(bits=bits, symmetric=False, float_zero=True)
    half = 2 ** (bits - 1)
    assert (full.qmin, full.qmax, full.num_codes, full.name) == (-half, half - 1, 2**bits, f"int{bits}")
    assert (restricted.qmin, restricted.qmax, restricted.num_codes) == (1 - half, half - 1, 2**bits - 1)
    assert (affine.qmin, affine.qmax, affine.num_codes, affine.name) == (0, 2**bits - 1, 2**bits, f"uint{bits}")
    assert FORMATS[full.name] == full
    assert FORMATS[affine.name] == affine
    assert (floating.qmin, floating.qmax, floating.num_codes) == (affine.qmin, affine.qmax, affine.num_codes)
    assert floating.name == f"uint{bits}-floatzero"
    assert FORMATS[floating.name] == floating


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits must be 2 to 8, not {bits}"):
        IntegerFormat(bits=bits, symmetric=True)


def test_asymmetric_has_no_restricted_range() -> None:
    with pytest.raises(RecipeError, match="asymmetric always uses every code"):
        IntegerFormat(bits=4, symmetric=False, full_range=False)


def test_symmetric_has_no_float_zero() -> None:
    with pytest.raises(RecipeError, match="symmetric has no zero point"):
        IntegerFormat(bits=4, symmetric=True, float_zero=True)


def test_a_float_zero_point_shifts_every_level_by_a_fraction() -> None:
    format = IntegerFormat(bits=2, symmetric=False, float_zero=True)
    zero_point = torch.tensor(1.25)
    assert format.decode(torch.arange(4), zero_point).tolist() == [-1.25, -0.25, 0.75, 1.75]
    assert format.encode(torch.tensor([-0.76, -0.74, 0.24, 0.26, 9.0]), zero_point).tolist() == [0, 1, 1, 2, 3]


def test_unknown_format_is_suggested() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'int4'"):
        FORMATS["intt4"]


def test_a_tie_does_not_depend_on_the_zero_point() -> None:
    format = IntegerFormat(bits=4, symmetric=False)
    for zero_point in (torch.tensor(7.0), torch.tensor(8.0)):
        assert format.snap(torch.tensor([0.5, -0.5, 1.5]), zero_point).tolist() == [0.0, 0.0, 2.0]
