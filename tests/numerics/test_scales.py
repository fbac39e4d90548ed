import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import RecipeError, ShapeError, UnknownName, VerificationError
from bitwright.numerics.block_scales import BoundFp8Scale, E8M0Scale, Fp8Scale, StoredE8M0Scale, StoredFp8Scale
from bitwright.numerics.minifloat import E2M1, E2M3, E4M3, MinifloatFormat
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import MIN_SCALE, BoundScale, FloatScale, StoredScale

EVERY_SCALE = pytest.mark.parametrize("name", list(SCALE_FORMATS))
EVERY_BYTE_SCALE = pytest.mark.parametrize("name", ["e8m0", "e8m0-int8", "e4m3"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(MIN_SCALE), ids=str)
EVERY_OFFSET = pytest.mark.parametrize("offset", [0, 6])
TINY = torch.finfo(torch.float32).tiny

STEPS = st.lists(st.floats(0, 1e37, allow_subnormal=True), min_size=1, max_size=20)
RAGGED = [(1, 1), (5, 1), (1, 7), (3, 5), (0, 4)]


def bind(name: str, largest: float = 3.0) -> BoundScale:
    return SCALE_FORMATS[name].bind(torch.tensor(largest, dtype=torch.float64))


def bind_fp8(largest: float) -> BoundFp8Scale:
    bound = Fp8Scale().bind(torch.tensor(largest, dtype=torch.float64))
    assert isinstance(bound, BoundFp8Scale)
    return bound


def store(bound: BoundScale, scale: torch.Tensor) -> StoredScale:
    stored = bound.store(scale)
    assert stored is not None
    return stored


def steps(*shape: int) -> torch.Tensor:
    """Positive float64 steps over many orders of magnitude, a zero among them."""
    step = torch.exp(torch.randn(shape, dtype=torch.float64) * 6)
    step.flatten()[:1] = 0
    return step


def module(name: str) -> Any:
    return pytest.importorskip(f"compressed_tensors.{name}")


def test_the_table_of_names() -> None:
    assert list(SCALE_FORMATS) == ["bfloat16", "e4m3", "e8m0", "e8m0-int8", "float16", "float32", "nested"]
    assert all(SCALE_FORMATS[name].name == name for name in SCALE_FORMATS)
    assert [name for name in SCALE_FORMATS if bind(name).signed] == ["bfloat16", "float16", "float32"]
    assert [name for name in SCALE_FORMATS if SCALE_FORMATS[name].stored_afterwards] == ["nested"]
    with pytest.raises(UnknownName, match=r"unknown scale format 'e8m'\. Did you mean 'e8m0'"):
        SCALE_FORMATS["e8m"]


@EVERY_SCALE
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_rounding_is_idempotent_positive_and_elementwise(name: str, shape: tuple[int, int]) -> None:
    step = steps(*shape)
    before = step.clone()
    bound = bind(name, 1e6)
    scale = bound.round(step)
    assert torch.equal(step, before)
    assert scale.shape == step.shape
    assert scale.dtype == {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
    assert (scale > 0).all()
    assert torch.equal(bound.round(scale.double()), scale)
    assert torch.equal(bound.round(scale), scale)
    for row in range(shape[0]):
        assert torch.equal(bound.round(step[row : row + 1]), scale[row : row + 1])


@EVERY_SCALE
@given(values=STEPS)
def test_rounding_is_monotone_and_never_gives_zero_or_subnormal(name: str, values: list[float]) -> None:
    step = torch.tensor([sorted(value for value in values if value > 0)], dtype=torch.float64)
    scale = bind(name).round(step).float()
    assert (scale[:, 1:] >= scale[:, :-1]).all()
    assert (scale >= TINY).all()
    assert (bind(name).round(torch.zeros(1, 1)) >= TINY).all()


@EVERY_SCALE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_steps_of_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    step = torch.tensor([[0.0, 1e-6, 0.3, 2.0, 7.0]], dtype=dtype)
    assert torch.equal(bind(name).round(step), bind(name).round(step.double()))


@EVERY_BYTE_SCALE
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_what_is_stored_gives_the_scales_back(name: str, shape: tuple[int, int]) -> None:
    bound = bind(name, 1e6)
    scale = bound.round(steps(*shape))
    stored = store(bound, scale)
    assert torch.equal(stored.values(), scale)
    assert stored.values().dtype == torch.float32
    assert stored.num_bits == sum(tensor.nbytes * 8 for tensor in stored.tensors().values())
    assert stored.num_bits == 8 * scale.numel() + (32 if name == "e4m3" else 0)
    assert torch.equal(stored.rows(1, 3).values(), scale[1:3])
    assert torch.equal(stored.columns(1, 4).values(), scale[:, 1:4])
    assert torch.equal(stored.rows(1, 3).columns(1, 2).to("cpu").values(), scale[1:3, 1:2])
    assert all(tensor.is_meta for tensor in stored.to("meta").tensors().values())


@EVERY_BYTE_SCALE
@pytest.mark.parametrize("scale", [0.0, -1.0, 0.3, math.inf, math.nan, 1e38, 1e-40], ids=str)
def test_storing_refuses_what_it_cannot_hold(name: str, scale: float) -> None:
    with pytest.raises(VerificationError, match=r"^scales: a scale differs from what its format can store"):
        bind(name).store(torch.tensor([[1.0, scale]]))


@EVERY_DTYPE
def test_float_scales_are_stored_as_they_are(dtype: torch.dtype) -> None:
    format = FloatScale(dtype)
    bound = format.bind(torch.tensor(1.0, dtype=torch.float64))
    floor = MIN_SCALE[dtype]
    step = torch.tensor([[0.0, -0.0, 1e-50, -1e-50, 0.3, -0.3, floor]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 1.0, floor, -floor, 0.3, -0.3, floor]], dtype=torch.float64).to(dtype)
    assert torch.equal(bound.round(step), expected)
    assert bound.store(expected) is None
    assert (bound.signed, bound.factors) == (True, None)
    other = torch.float32 if dtype == torch.float16 else torch.float16
    with pytest.raises(VerificationError, match=f"^scales: {other} scales in {format.name} storage"):
        bound.store(torch.ones(1, 1, dtype=other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_other_float_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RecipeError, match=f"^scales: plain scales are float32, float16 or bfloat16, not {dtype}"):
        FloatScale(dtype)


@EVERY_OFFSET
def test_the_whole_e8m0_table(offset: int) -> None:
    """The native dtype reads the bytes; the definition is 2^(byte - 127) for all but NaN."""
    stored = StoredE8M0Scale(scale=torch.arange(256).to(torch.uint8).reshape(16, 16), exponent_offset=offset)
    values = stored.values().flatten()
    assert values[255].isnan()
    assert values[:255].tolist() == [math.ldexp(1.0, byte - 127 - offset) for byte in range(255)]
    native = stored.scale.view(torch.float8_e8m0fnu).float().flatten()
    assert torch.equal(values[:255] * 2.0**offset, native[:255])
    assert torch.equal(
        store(E8M0Scale(exponent_offset=offset), stored.values()[1:15]).tensors()["scale"], stored.scale[1:15]
    )


@EVERY_OFFSET
@given(values=STEPS)
def test_e8m0_is_the_least_power_of_two_that_covers(offset: int, values: list[float]) -> None:
    format = E8M0Scale(exponent_offset=offset)
    step = torch.tensor([[value for value in values if TINY / 2 < value <= 2.0**121]], dtype=torch.float64)
    scale = format.round(step).double()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (step <= scale).all()
    assert (scale < 2 * step).all()


@EVERY_OFFSET
def test_e8m0_powers_of_two_stay_and_their_neighbours_do_not(offset: int) -> None:
    format = E8M0Scale(exponent_offset=offset)
    power = torch.ldexp(torch.ones(200, dtype=torch.float64), torch.arange(-100, 100)).unsqueeze(0)
    infinity = torch.tensor(math.inf, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        exact = power.to(dtype)
        assert torch.equal(format.round(exact).double(), power)
        assert torch.equal(format.round(torch.nextafter(exact, infinity.to(dtype))).double(), 2 * power)
        assert torch.equal(format.round(torch.nextafter(exact, -infinity.to(dtype))).double(), power)


@EVERY_OFFSET
def test_e8m0_saturates(offset: int) -> None:
    format = E8M0Scale(exponent_offset=offset)
    scale = format.round(torch.tensor([[1e-300, 5e-324, 1e300]], dtype=torch.float64))
    assert scale.tolist() == [[2.0**-126, 2.0**-126, 2.0 ** (127 - offset)]]
    assert format.store(scale).scale.tolist() == [[1 + offset, 1 + offset, 254]]


def test_mxint8_bytes_follow_the_specification() -> None:
    """An MXINT8 element is int8 * 2^-6 and its block scale 2^(byte - 127): weights of at most 127/64 have byte 127."""
    format = E8M0Scale(exponent_offset=6)
    weight = torch.tensor([[127 / 64, -1.0, 1 / 64, 0.5]])
    scale = format.round(weight.abs().amax(1, keepdim=True).double() / 127)
    codes = torch.round(weight / scale)
    assert codes.tolist() == [[127.0, -64.0, 1.0, 32.0]]
    byte = int(format.store(scale).scale)
    assert byte == 127
    assert torch.equal(codes * 2.0**-6 * 2.0 ** (byte - 127), weight)


@pytest.mark.parametrize("offset", [-1, 7])
def test_other_offsets_are_refused(offset: int) -> None:
    with pytest.raises(RecipeError, match=f"^scales: an e8m0 exponent offset is 0 to 6, not {offset}"):
        E8M0Scale(exponent_offset=offset)


def test_e8m0_factors_are_the_only_ones_that_matter() -> None:
    assert E8M0Scale().factors == (1.0, 0.5, 0.25, 0.125)
    step = steps(4, 4) + 1e-30
    for factor in (0.51, 0.7, 0.99):
        again = E8M0Scale().round(step * factor)
        assert ((again == E8M0Scale().round(step)) | (again == E8M0Scale().round(step * 0.5))).all()


@pytest.mark.parametrize("largest", [1e-35, 1e-6, 0.1, 3.0, 1e6, 1e37])
def test_fp8_uses_the_whole_range_below_the_global_scale(largest: float) -> None:
    bound = bind_fp8(largest)
    stored = bound.store(
        bound.round(torch.tensor([[largest, largest * 2.0**-12, largest * 1e-9]], dtype=torch.float64))
    )
    assert stored.global_scale.shape == (1,)
    if largest > 1e-32:
        assert stored.scale.float()[0, 0] == 448
        assert stored.scale.float()[0, 1:].tolist() == [448 * 2.0**-12, 2.0**-9]
    assert (stored.values() >= TINY).all()
    assert stored.values().isfinite().all()


def test_fp8_of_a_zero_tensor() -> None:
    bound = bind_fp8(0.0)
    assert bound.global_scale.tolist() == [1.0]
    assert bound.round(torch.zeros(2, 3)).tolist() == [[2.0**-9] * 3] * 2


@given(largest=st.floats(1e-20, 1e30), fraction=st.floats(0.0, 1.0))
def test_fp8_scales_are_the_nearest(largest: float, fraction: float) -> None:
    bound = bind_fp8(largest)
    multiplier = bound.global_scale.double().item()
    levels = torch.arange(1, 0x7F).to(torch.uint8).view(torch.float8_e4m3fn).double() / multiplier
    step = largest * fraction
    scale = bound.round(torch.tensor([[step]], dtype=torch.float64)).double().item()
    # Global scale, product and quotient are each rounded to float32; a tie may fall either way.
    assert abs(scale - step) <= (levels - step).abs().min().item() + 4 * 2.0**-24 * max(step, scale)


def test_stored_tensors_of_the_wrong_kind_are_refused() -> None:
    byte, fp8, one = torch.ones(2, 2).to(torch.uint8), torch.ones(2, 2).to(torch.float8_e4m3fn), torch.ones(1)
    with pytest.raises(ShapeError, match=r"torch.uint8 \[R, G\], not torch.float32 \[2, 2\]"):
        StoredE8M0Scale(scale=torch.ones(2, 2))
    with pytest.raises(ShapeError, match=r"torch.uint8 \[R, G\], not torch.uint8 \[4\]"):
        StoredE8M0Scale(scale=byte.flatten())
    with pytest.raises(ShapeError, match=r"torch.float8_e4m3fn \[R, G\], not torch.uint8"):
        StoredFp8Scale(scale=byte, global_scale=one)
    for wrong in (torch.ones(2), torch.tensor(1.0), one.double()):
        with pytest.raises(ShapeError, match=r"a global scale is torch.float32 \[1\], not torch.float"):
            StoredFp8Scale(scale=fp8, global_scale=wrong)


# Against compressed-tensors. Its MX scales round the largest weight, not the step, so that its exponents may differ
# from ours: with the same stored scale everything else is equal.


def test_compressed_tensors_reads_and_writes_the_same_e8m0_bytes() -> None:
    mx_utils = module("compressors.mx_utils")
    byte = torch.arange(255).to(torch.uint8).unsqueeze(0)
    values = StoredE8M0Scale(scale=byte).values()
    assert torch.equal(mx_utils.decompress_mx_scale(byte).float(), values)
    assert torch.equal(mx_utils.compress_mx_scale(values, torch.uint8), byte)


@pytest.mark.parametrize(
    ("format", "beyond", "wasteful"), [(E2M1, 7 / 6, False), (E2M3, 7.75 / 7.5, False), (E4M3, 1.0, True)], ids=str
)
def test_compressed_tensors_clips_where_e8m0_covers(format: MinifloatFormat, beyond: float, wasteful: bool) -> None:
    """Theirs is half of ours where the largest weight exceeds the largest level but rounds to it.

    At exactly 448 * 2^k theirs is twice ours: for E4M3 it keeps the threshold of E2M1, 7/4 of a power of two, which is
    a level of E4M3.
    """
    mxfp_utils = module("quantization.utils.mxfp_utils")
    largest = torch.cat([torch.linspace(1, 4, 3073), torch.rand(1000) * 1e-20 + 1e-30, torch.rand(1000) * 1e20])
    theirs = 2.0 ** (mxfp_utils.generate_mx_scales(largest, format.bits).double() - 127)
    ours = E8M0Scale().round((largest.double() / format.max_value).unsqueeze(0))[0].double()
    ratio = largest / (theirs * format.max_value)
    smaller, larger = theirs < ours, theirs > ours
    assert (theirs[smaller] == ours[smaller] / 2).all()
    assert (ratio[smaller] > 1).all()
    assert (ratio[smaller] < beyond).all()
    assert bool(smaller.any()) == (beyond > 1)
    assert (theirs[larger] == ours[larger] * 2).all()
    assert (ratio[larger] == 0.5).all()
    assert bool(larger.any()) == wasteful


def compressed(compressor: str, format: MinifloatFormat, group_size: int, state: dict[str, torch.Tensor]) -> Any:
    """What compressed-tensors stores for a weight and its scales, and the weight that it reads back."""
    package = module(f"compressors.{compressor}")
    quantization = module("quantization")
    fp8_scale = "weight_global_scale" in state
    weights = quantization.QuantizationArgs(
        num_bits=format.bits,
        type="float",
        symmetric=True,
        strategy="tensor_group" if fp8_scale else "group",
        group_size=group_size,
        scale_dtype=torch.float8_e4m3fn if fp8_scale else torch.uint8,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    (cls,) = [entry for name, entry in vars(package.base).items() if name.lower().startswith(compressor)]
    packed = cls.compress(dict(state), scheme)
    return packed, cls.decompress(dict(packed), scheme)["weight"]


def dequantized(weight: torch.Tensor, scale: torch.Tensor, format: MinifloatFormat) -> torch.Tensor:
    """Scale times level, by the definition."""
    divisor = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return format.snap(weight / divisor, None) * divisor


@pytest.mark.parametrize(("compressor", "format"), [("mxfp4", E2M1), ("mxfp6", E2M3), ("mxfp8", E4M3)])
def test_compressed_tensors_agrees_given_our_mx_scales(compressor: str, format: MinifloatFormat) -> None:
    weight = torch.randn(6, 96) * torch.logspace(-12, 12, 6).unsqueeze(1)
    weight[2, 32:64] = 0
    step = weight.unflatten(1, (-1, 32)).abs().amax(-1).double() / format.max_value
    scale = E8M0Scale().round(step)
    packed, read = compressed(compressor, format, 32, {"weight": weight, "weight_scale": scale})
    assert torch.equal(packed["weight_scale"], E8M0Scale().store(scale).scale)
    # A power of two times a level of at most 4 significant bits is exact in bfloat16.
    assert torch.equal(read.float(), dequantized(weight, scale, format))


@pytest.mark.parametrize("magnitude", [1e-25, 1e-3, 1.0, 7e4, 1e30])
def test_compressed_tensors_has_the_same_nvfp4_scales(magnitude: float) -> None:
    quantization, helpers = module("quantization"), module("quantization.utils.helpers")
    weight = torch.randn(40, 320) * magnitude * torch.logspace(-1, 1, 320).roll(100)
    low, high = torch.aminmax(weight.unflatten(1, (-1, 16)), dim=-1)
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    global_scale = helpers.generate_gparam(low.amin(), high.amax())
    theirs, _ = helpers.calculate_qparams(low, high, args, global_scale=global_scale)

    largest = torch.maximum(-low, high).double() / E2M1.max_value
    bound = Fp8Scale().bind(largest.amax())
    scale = bound.round(largest)
    stored = bound.store(scale)
    assert isinstance(stored, StoredFp8Scale)
    assert torch.equal(stored.global_scale, global_scale)
    assert torch.equal(stored.scale.float(), theirs)
    state = {"weight": weight, "weight_scale": theirs, "weight_global_scale": global_scale}
    packed, read = compressed("nvfp4", E2M1, 16, state)
    assert torch.equal(packed["weight_scale"].view(torch.uint8), stored.scale.view(torch.uint8))
    assert torch.equal(read, dequantized(weight, scale, E2M1).bfloat16())


def test_global_scales_are_bitwise_those_of_compressed_tensors() -> None:
    helpers = module("quantization.utils.helpers")
    largest = torch.cat([torch.rand(2000), torch.exp(torch.randn(2000) * 20).clamp(1e-30, 1e35)])
    for amax in largest:
        expected = helpers.generate_gparam(-amax, amax)
        assert torch.equal(bind_fp8(amax.double().item() / E2M1.max_value).global_scale, expected)


def test_groups_that_compressed_tensors_loses_keep_their_values() -> None:
    """Below half the smallest FP8 it stores the scale 0.125, at which all weights of the group round to 0."""
    quantization, helpers = module("quantization"), module("quantization.utils.helpers")
    largest = torch.tensor([[6.0, 6.0 * 2.0**-19]])
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    global_scale = helpers.generate_gparam(-largest.amax(), largest.amax())
    theirs, _ = helpers.calculate_qparams(-largest, largest, args, global_scale=global_scale)
    bound = bind_fp8(1.0)
    ours = bound.store(bound.round(largest.double() / 6)).scale.float()
    assert theirs.tolist() == [[448.0, 0.125]]
    assert ours.tolist() == [[448.0, 2.0**-9]]
    assert E2M1.snap(largest * global_scale / theirs, None)[0, 1] == 0
    assert E2M1.snap(largest * global_scale / ours, None)[0, 1] > 0
