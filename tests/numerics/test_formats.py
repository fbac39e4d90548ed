"""Conformance: every registered format inherits these checks."""

import pytest
import torch

from bitwright.errors import RecipeError, UnknownName
from bitwright.numerics.formats import FORMATS, Format
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import RANGE_METHODS, fit_grid

EVERY_FORMAT = pytest.mark.parametrize("format", [FORMATS[name] for name in FORMATS], ids=list(FORMATS))


def zero_points(format: Format) -> list[torch.Tensor | None]:
    if format.symmetric:
        return [None]
    return [torch.tensor(float(z)) for z in {format.min_value, format.max_value // 2, format.max_value}]


def all_codes(format: Format) -> torch.Tensor:
    info = torch.iinfo(format.code_dtype)
    every = torch.arange(info.min, info.max + 1).to(format.code_dtype)
    values = format.decode(every, None)
    return every[(values >= format.min_value) & (values <= format.max_value)]


@EVERY_FORMAT
def test_the_code_table_is_closed(format: Format) -> None:
    codes = all_codes(format)
    assert len(codes) == format.num_codes <= 2**format.bits
    for zero_point in zero_points(format):
        values = format.decode(codes, zero_point)
        assert len(values.unique()) == format.num_codes
        assert torch.equal(format.encode(values, zero_point), codes)
        assert torch.equal(format.snap(values, zero_point), values)


@EVERY_FORMAT
def test_zero_is_exact_and_far_values_saturate(format: Format) -> None:
    codes = all_codes(format)
    far = torch.tensor([-1e30, 1e30])
    for zero_point in zero_points(format):
        values = format.decode(codes, zero_point)
        assert (values == 0).any()
        assert torch.equal(format.snap(far, zero_point), torch.stack([values.min(), values.max()]))
        assert values.max() - values.min() == format.max_value - format.min_value


@EVERY_FORMAT
def test_snap_finds_the_nearest_value_and_equals_decode_of_encode(format: Format) -> None:
    scaled = torch.linspace(format.min_value * 1.5 - 1, format.max_value * 1.5 + 1, 4001)
    for zero_point in zero_points(format):
        table = format.decode(all_codes(format), zero_point)
        snapped = format.snap(scaled, zero_point)
        nearest = (scaled[:, None] - table[None]).abs().amin(1)
        assert torch.equal((scaled - snapped).abs(), nearest)
        codes = format.encode(scaled, zero_point)
        assert codes.dtype == format.code_dtype
        assert torch.equal(format.decode(codes, zero_point), snapped)


@EVERY_FORMAT
@pytest.mark.parametrize("method", list(RANGE_METHODS))
@pytest.mark.parametrize("kind", ["tensor", "channel", "group", "token"])
def test_every_method_and_granularity_gives_a_finite_idempotent_result(format: Format, method: str, kind: str) -> None:
    weight = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    granularity = Granularity(kind=kind, group_size=16 if kind == "group" else None)
    grid = fit_grid(weight, format, granularity, method=method, importance=torch.rand(37), scale_dtype=torch.float16)
    result = QTensor(codes=grid.quantize(weight), grid=grid)
    values = result.dequantize()
    assert values.isfinite().all()
    assert torch.equal(values[2], torch.zeros(37))
    assert torch.equal(grid.quantize(values), result.codes)
    assert format.bits < result.bits_per_weight <= format.bits + (16 + format.bits) * grid.scale.numel() / (5 * 37)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_ranges(bits: int) -> None:
    full = IntegerFormat(bits=bits, symmetric=True)
    restricted = IntegerFormat(bits=bits, symmetric=True, full_range=False)
    affine = IntegerFormat(bits=bits, symmetric=False)
    half = 2 ** (bits - 1)
    assert (full.qmin, full.qmax, full.num_codes, full.name) == (-half, half - 1, 2**bits, f"int{bits}")
    assert (restricted.qmin, restricted.qmax, restricted.num_codes) == (1 - half, half - 1, 2**bits - 1)
    assert (affine.qmin, affine.qmax, affine.num_codes, affine.name) == (0, 2**bits - 1, 2**bits, f"uint{bits}")
    assert FORMATS[full.name] == full
    assert FORMATS[affine.name] == affine


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits must be 2 to 8, not {bits}"):
        IntegerFormat(bits=bits, symmetric=True)


def test_asymmetric_has_no_restricted_range() -> None:
    with pytest.raises(RecipeError, match="asymmetric always uses every code"):
        IntegerFormat(bits=4, symmetric=False, full_range=False)


def test_unknown_format_is_suggested() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'int4'"):
        FORMATS["intt4"]


def test_a_tie_does_not_depend_on_the_zero_point() -> None:
    format = FORMATS["uint4"]
    for zero_point in (torch.tensor(7.0), torch.tensor(8.0)):
        assert format.snap(torch.tensor([0.5, -0.5, 1.5]), zero_point).tolist() == [0.0, 0.0, 2.0]
