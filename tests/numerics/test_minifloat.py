import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import RecipeError
from bitwright.numerics.minifloat import E2M1, E2M3, E4M3, E5M2, MINIFLOATS, MinifloatFormat

E3M4 = MinifloatFormat(name="fp8-e3m4", exponent_bits=3, mantissa_bits=4)
E2M2 = MinifloatFormat(name="fp5-e2m2", exponent_bits=2, mantissa_bits=2, specials="nan")
EVERY_FORMAT = pytest.mark.parametrize("format", [*MINIFLOATS, E3M4, E2M2], ids=lambda f: f.name)
EVERY_NATIVE = pytest.mark.parametrize(
    ("format", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)

# Exponent bits, mantissa bits, largest, smallest normal, smallest subnormal: tables 1 and 2 of OCP OFP8, 1 to 5 of MX.
SPECIFICATION = {
    "fp8-e4m3": (4, 3, 448.0, 2.0**-6, 2.0**-9),
    "fp8-e5m2": (5, 2, 57344.0, 2.0**-14, 2.0**-16),
    "fp6-e2m3": (2, 3, 7.5, 1.0, 0.125),
    "fp6-e3m2": (3, 2, 28.0, 0.25, 0.0625),
    "fp4-e2m1": (2, 1, 6.0, 1.0, 0.5),
}


def every_code(format: MinifloatFormat) -> torch.Tensor:
    return torch.arange(2**format.bits, dtype=torch.int32).to(torch.uint8)


def used_codes(format: MinifloatFormat) -> torch.Tensor:
    """Every code but Inf, NaN and -0."""
    codes = every_code(format)
    return codes[(codes == 0) | (format.decode(codes, None).isfinite() & (format.decode(codes, None) != 0))]


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit dtype, float32."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return patterns[patterns.isfinite()]


def hard_values(format: MinifloatFormat) -> torch.Tensor:
    """Levels, midpoints of neighbours and the float32 numbers next to both; random float32 of every exponent."""
    levels = format.decode(used_codes(format), None).double().sort().values
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2]).float()
    infinity = torch.tensor(torch.inf)
    near = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    uniform = (torch.rand(50_000) * 2 - 1) * format.max_value * 1.1
    return torch.cat([near, bits[bits.isfinite()], uniform])


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


def nearest_codes(x: torch.Tensor, format: MinifloatFormat) -> torch.Tensor:
    """The code of the nearest level in float64, ties to the even code; by the definition."""
    codes = used_codes(format)
    levels, order = format.decode(codes, None).double().sort()
    codes = codes[order]
    x = x.double().clamp(format.min_value, format.max_value)
    above = torch.searchsorted(levels, x).clamp(1, len(levels) - 1)
    to_lower, to_upper = (x - levels[above - 1]).abs(), (levels[above] - x).abs()
    even_upper = codes[above] % 2 == 0
    return torch.where((to_upper < to_lower) | ((to_upper == to_lower) & even_upper), codes[above], codes[above - 1])


@pytest.mark.parametrize("format", MINIFLOATS, ids=lambda f: f.name)
def test_limits_are_those_of_the_specification(format: MinifloatFormat) -> None:
    exponent_bits, mantissa_bits, largest, min_normal, smallest = SPECIFICATION[format.name]
    assert (format.exponent_bits, format.mantissa_bits) == (exponent_bits, mantissa_bits)
    assert (format.max_value, format.min_value, format.min_normal) == (largest, -largest, min_normal)
    assert format.decode(torch.tensor([1], dtype=torch.uint8), None).item() == smallest
    assert (format.bits, format.symmetric, format.min_code) == (1 + exponent_bits + mantissa_bits, True, 0)
    low, high = format.decode(torch.tensor(format.end_codes, dtype=torch.uint8), None).tolist()
    assert (low, high) == (-largest, largest)


def test_the_whole_fp4_table() -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    decoded = E2M1.decode(every_code(E2M1), None)
    assert decoded.tolist() == values + [-value for value in values]
    assert math.copysign(1, decoded[8].item()) == -1


@EVERY_FORMAT
def test_every_code_has_the_value_of_its_fields(format: MinifloatFormat) -> None:
    for code, value in enumerate(format.decode(every_code(format), None).tolist()):
        text = f"{code:0{format.bits}b}"
        sign, exponent, mantissa = text[0], text[1 : 1 + format.exponent_bits], text[1 + format.exponent_bits :]
        if format.specials == "nan" and "0" not in text[1:]:
            assert math.isnan(value)
        elif format.specials == "ieee" and "0" not in exponent:
            assert math.isnan(value) if "1" in mantissa else math.isinf(value) and (value < 0) == (sign == "1")
        else:
            fraction = int(mantissa, 2) / 2 ** len(mantissa)
            power = max(int(exponent, 2), 1) - (2 ** (format.exponent_bits - 1) - 1)
            magnitude = (fraction + (1 if "1" in exponent else 0)) * 2.0**power
            assert struct.pack("f", value) == struct.pack("f", -magnitude if sign == "1" else magnitude)


@EVERY_FORMAT
def test_the_used_codes_are_closed_and_without_special_values(format: MinifloatFormat) -> None:
    codes = used_codes(format)
    values = format.decode(codes, None)
    assert len(codes) == format.num_codes == len(values.unique())
    assert torch.equal(format.encode(values, None), codes)
    assert same_bits(format.snap(values, None), values)
    assert torch.isin(format.encode(hard_values(format), None), codes).all()


@EVERY_NATIVE
def test_decode_equals_the_native_dtype(format: MinifloatFormat, dtype: torch.dtype) -> None:
    codes = every_code(format)
    ours, native = format.decode(codes, None), codes.view(dtype).float()
    assert torch.equal(ours.isnan(), native.isnan())
    assert same_bits(ours.nan_to_num(nan=0.0), native.nan_to_num(nan=0.0))


@EVERY_NATIVE
def test_encode_and_snap_equal_the_native_cast(format: MinifloatFormat, dtype: torch.dtype) -> None:
    for x in (every_finite(torch.float16), every_finite(torch.bfloat16), hard_values(format)):
        native = x.clamp(format.min_value, format.max_value).to(dtype)
        codes = native.view(torch.uint8).clone()
        codes[codes == 0x80] = 0  # torch keeps -0.
        assert torch.equal(format.encode(x, None), codes)
        assert torch.equal(format.snap(x, None), native.float())


@EVERY_FORMAT
def test_encode_finds_the_nearest_level_and_ties_go_to_even(format: MinifloatFormat) -> None:
    for x in (every_finite(torch.float16), every_finite(torch.bfloat16), hard_values(format)):
        assert torch.equal(format.encode(x, None), nearest_codes(x, format))


@EVERY_FORMAT
def test_snap_equals_decode_of_encode_bitwise(format: MinifloatFormat) -> None:
    for x in (every_finite(torch.float16), every_finite(torch.bfloat16), hard_values(format)):
        assert same_bits(format.snap(x, None), format.decode(format.encode(x, None), None))


@EVERY_FORMAT
def test_values_beyond_the_range_saturate(format: MinifloatFormat) -> None:
    far = torch.tensor([math.inf, 3e38, format.max_value * (1 + 2.0**-20)])
    assert format.snap(far, None).tolist() == [format.max_value] * 3
    assert format.encode(-far, None).tolist() == [format.end_codes[0]] * 3


@EVERY_FORMAT
def test_small_values_become_plus_zero(format: MinifloatFormat) -> None:
    smallest = format.decode(torch.tensor([1], dtype=torch.uint8), None)
    # 1e-45 is subnormal in float32; half of the smallest level is a tie, and 0 is even.
    small = torch.cat([torch.tensor([0.0, 1e-45, 1e-30]), smallest / 2])
    for x in (small, -small):
        assert format.encode(x, None).tolist() == [0, 0, 0, 0]
        assert same_bits(format.snap(x, None), torch.zeros(4))
    assert format.encode(torch.nextafter(smallest / 2, smallest), None).item() == 1


@EVERY_FORMAT
def test_nan_stays_visible_in_snap(format: MinifloatFormat) -> None:
    assert format.snap(torch.tensor([math.nan, 1.0]), None).isnan().tolist() == [True, False]


@EVERY_FORMAT
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (3, 5, 2)], ids=str)
def test_any_shape_and_layout_is_left_unmodified(format: MinifloatFormat, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, 4) * 3
    view = x.transpose(0, -1)[1] if shape else x[1]  # Not contiguous, where there is more than one dimension.
    before = x.clone()
    codes = format.encode(view, None)
    assert codes.shape == view.shape
    assert codes.dtype == format.code_dtype
    assert torch.equal(codes.flatten(), format.encode(view.flatten(), None))
    column = torch.stack([codes, codes], dim=-1)[..., 0]
    assert same_bits(format.decode(column, None), format.snap(view, None))
    assert torch.equal(x, before)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_give_float32(format: MinifloatFormat, dtype: torch.dtype) -> None:
    x = (torch.randn(100) * 3).to(dtype)
    assert same_bits(format.snap(x, None), format.snap(x.float(), None))
    assert torch.equal(format.encode(x, None), format.encode(x.float(), None))


@given(format=st.sampled_from(MINIFLOATS), values=st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_properties_for_any_float32(format: MinifloatFormat, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32).sort().values
    snapped = format.snap(x, None)
    assert same_bits(format.snap(snapped, None), snapped)
    assert (snapped.diff() >= 0).all()
    assert torch.equal(format.snap(-x, None), -snapped)
    inside = x[x.abs() <= format.max_value].double()
    levels = format.decode(used_codes(format), None).double().sort().values
    upper = torch.searchsorted(levels, inside).clamp(1, len(levels) - 1)
    gap = levels[upper] - levels[upper - 1]
    assert ((format.snap(inside.float(), None).double() - inside).abs() <= gap / 2).all()


@given(format=st.sampled_from(MINIFLOATS), fraction=st.floats(0, 1), sign=st.sampled_from([-1.0, 1.0]))
def test_relative_error_of_normal_values(format: MinifloatFormat, fraction: float, sign: float) -> None:
    """At most half a unit in the last place: 2^-(M + 1) of the power of two below the value."""
    x = torch.tensor(sign * (format.min_normal + fraction * (format.max_value - format.min_normal)))
    error = (format.snap(x, None).double() - x.double()).abs().item()
    assert error <= 2.0 ** (math.frexp(x.item())[1] - 2 - format.mantissa_bits)


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(1, 2), (4, 0), (4, 4), (0, 0), (-1, 3)], ids=str)
def test_impossible_layouts_are_refused(exponent_bits: int, mantissa_bits: int) -> None:
    with pytest.raises(RecipeError, match=f"^minifloat odd: {exponent_bits} exponent and {mantissa_bits} mantissa"):
        MinifloatFormat(name="odd", exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)


def test_compressed_tensors_rounds_fp4_alike_and_reads_the_codes() -> None:
    fp4 = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    for x in (every_finite(torch.float16), every_finite(torch.bfloat16), hard_values(E2M1)):
        theirs = fp4.cast_to_fp4(x.clamp(E2M1.min_value, E2M1.max_value))
        assert torch.equal(E2M1.snap(x, None), theirs)
        codes = E2M1.encode(x[: len(x) // 2 * 2], None)
        packed = (codes[0::2] | codes[1::2] << 4).unsqueeze(0)
        unpacked = helpers.unpack_fp4_from_uint8(packed, 1, len(codes), torch.float32)[0]
        assert torch.equal(unpacked, theirs[: len(codes)])
        # Theirs has -0 as well.
        positive = torch.where(theirs == 0, 0.0, theirs)[: len(codes)]
        assert torch.equal(helpers.pack_fp4_to_uint8(positive.unsqueeze(0)), packed)


def test_compressed_tensors_rounds_fp6_alike_and_reads_the_codes() -> None:
    fp6 = pytest.importorskip("compressed_tensors.quantization.utils.fp6_utils")
    helpers = pytest.importorskip("compressed_tensors.compressors.mxfp6.helpers")
    for x in (every_finite(torch.float16), every_finite(torch.bfloat16), hard_values(E2M3)):
        theirs = fp6.cast_to_fp6(x)
        assert torch.equal(E2M3.snap(x, None), theirs)
    values = E2M3.decode(every_code(E2M3), None)
    packed = helpers.pack_fp6_to_uint8(values.unsqueeze(0))
    assert same_bits(helpers.unpack_fp6_from_uint8(packed, 1, 64, torch.float32)[0], values)
    word = packed[0].to(torch.int32).reshape(-1, 3)
    word = word[:, 0] | word[:, 1] << 8 | word[:, 2] << 16
    codes = torch.stack([word >> shift & 0x3F for shift in (0, 6, 12, 18)], dim=-1).flatten()
    assert torch.equal(codes.to(torch.uint8), every_code(E2M3))
