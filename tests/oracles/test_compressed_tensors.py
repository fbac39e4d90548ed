"""compressed-tensors as the oracle: every stored tensor, every dequantized weight and every rounded input.

Its compressors and its modules' arithmetic are called directly; that transformers drives them as expected is checked by
tests/exporters.
"""

import importlib
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bitwright.exporters.engine_inputs import engine_inputs
from bitwright.model.layouts import compressed_tensors as layouts
from bitwright.model.layouts.own import input_scale
from bitwright.numerics.block_scales import BoundFp8Scale, FixedFp8Scale, Fp8Scale, MxInputScale
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite, static_grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M1, E2M3, E4M3, MinifloatFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.schemes import MODEL_SCALE, ActivationScheme, Scheme

pytest.importorskip("compressed_tensors")
compressors: Any = importlib.import_module("compressed_tensors.compressors.base")
quantization: Any = importlib.import_module("compressed_tensors.quantization")
quant_args: Any = importlib.import_module("compressed_tensors.quantization.quant_args")
forward: Any = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
helpers: Any = importlib.import_module("compressed_tensors.quantization.utils.helpers")
mx_utils: Any = importlib.import_module("compressed_tensors.quantization.utils.mxfp_utils")

SHAPE = (37, 96)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [
    f"{base}-{granularity}{symmetry}"
    for base, granularities in (
        ("W2A16", "tensor channel g16"), ("W3A16", "tensor channel g16"), ("W4A16", "tensor channel g16 g96"),
        ("W5A16", "channel g16"), ("W6A16", "channel g16"), ("W7A16", "channel g16"), ("W8A16", "tensor channel g16"),
        ("W8A8", "tensor channel g16 block16x32"),
    )
    for granularity in granularities.split()
    for symmetry in ("", "-asym")
]  # fmt: skip
PLAIN = [
    *INTEGERS,
    "W4A8-g32",
    "W4A4-channel",
    "fp8-tensor",
    "fp8-channel",
    "fp8-g16",
    "fp8-block16x32",
    "fp8-block64-a16",
]
BLOCK_SCALED = ["mxfp8", "mxfp6", "mxfp6-a16", "mxfp4", "mxfp4-a16", "nvfp4", "nvfp4-a16"]


def random_weight(scheme: Scheme, dtype: torch.dtype) -> QTensor:
    """Every code and zero point, and both signs of scales that may have two."""
    weights, format = scheme.weights, cast(LevelFormat, scheme.weights.format)
    shape = weights.granularity.scale_shape(*SHAPE)
    steps, stored = (0.5 + torch.rand(shape)) * 0.01, None
    if weights.scale == MODEL_SCALE:
        scale = (steps * (torch.randint(0, 2, shape) * 2 - 1)).to(dtype)
    else:
        bound = SCALE_FORMATS[weights.scale].bind(steps.max().double())
        scale = bound.round(steps)
        stored = bound.store(scale)
    zero_point = None if format.symmetric else torch.randint(0, 2 ** int(format.bits), shape, dtype=torch.int32)
    grid = Grid(
        format=format,
        granularity=weights.granularity,
        in_features=SHAPE[1],
        scale=scale,
        zero_point=zero_point,
        stored=stored,
    )
    codes = torch.randint(0, 2 ** int(format.bits), SHAPE)
    if isinstance(format, IntegerFormat):
        codes = codes + format.min_code
    else:
        codes[format.decode(codes.to(torch.uint8), None).nan_to_num(0.0) == 0] = 0  # neither NaN nor -0
    return QTensor(codes=codes.to(format.code_dtype), grid=grid)


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tokens of different sizes, one of them zero and one so small that its scale is 0 where scales have few bits."""
    x = torch.randn(shape) * torch.exp(torch.randn((*shape[:-1], 1)))
    x.view(-1, shape[-1])[1] = 0
    x.view(-1, shape[-1])[2] *= 1e-7
    return x.to(dtype)


def input_quantizer(acts: ActivationScheme, in_features: int) -> InputQuantizer:
    scale, static = input_scale(acts), None
    if acts.is_static:
        low, high = torch.tensor([-1.75]), torch.tensor([1.25])
        rounded = SCALE_FORMATS["bfloat16"]
        static = static_grid(low, high, acts.format, acts.granularity, in_features, scale=rounded)
    elif acts.observer is not None:
        scale = FixedFp8Scale(bound=BoundFp8Scale(global_scale=torch.tensor([351.0])))
    return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale, static=static)


def their_scheme(scheme: Scheme, layout: str) -> Any:
    found = layouts.arguments(scheme, layout)
    inputs = found["input_activations"]
    return quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**found["weights"]),
        input_activations=None if inputs is None else quantization.QuantizationArgs(**inputs),
        format=layout,
    )


def compressor_of(layout: str) -> Any:
    return compressors.BaseCompressor.get_value_from_registry(layout)


def layout_of(scheme: Scheme) -> str:
    layout = layouts.layout_of(scheme, SHAPE[1], torch.bfloat16)
    assert layout is not None
    return layout


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in PLAIN for dtype in DTYPES] + [(name, torch.bfloat16) for name in BLOCK_SCALED],
    ids=str,
)
def test_it_reads_our_weights(name: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(name)
    layout = layout_of(scheme)
    weight = random_weight(scheme, dtype)
    stored = layouts.encode(layout, QuantizedSite(weight=weight))
    found = compressor_of(layout).decompress(stored, their_scheme(scheme, layout))["weight"]
    assert found.dtype == dtype
    assert found.equal(weight.dequantize(dtype))


@pytest.mark.parametrize("name", [*PLAIN, *BLOCK_SCALED])
def test_it_stores_what_we_store(name: str) -> None:
    """Given the weight that codes stand for and their scales, it finds the same codes and writes the same tensors."""
    scheme = Scheme.parse(name)
    layout = layout_of(scheme)
    weight = random_weight(scheme, torch.float32)
    grid = cast(Grid, weight.grid)
    stored = layouts.encode(layout, QuantizedSite(weight=weight))
    is_tensor = grid.granularity.kind == "tensor"
    state = {"weight": weight.dequantize(), "weight_scale": grid.scale.reshape(1) if is_tensor else grid.scale}
    if grid.zero_point is not None:
        signed = (grid.zero_point - 2 ** (int(grid.format.bits) - 1)).to(torch.int8)
        state["weight_zero_point"] = signed.reshape(1) if is_tensor else signed
    if "weight_global_scale" in stored:
        state["weight_global_scale"] = stored["weight_global_scale"]
        state["weight_scale"] = stored["weight_scale"].float()
    found = compressor_of(layout).compress(state, their_scheme(scheme, layout))
    assert found.keys() == stored.keys()
    for part, tensor in stored.items():
        assert found[part].dtype == tensor.dtype
        assert found[part].shape == tensor.shape
        assert found[part].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), part


GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=24),
    Granularity(kind="block", group_size=32, block_rows=16),
]


def their_arguments(format: IntegerFormat, granularity: Granularity) -> Any:
    size = granularity.group_size
    is_block = granularity.kind == "block"
    return quantization.QuantizationArgs(
        num_bits=format.bits,
        symmetric=format.symmetric,
        strategy=granularity.kind,
        group_size=None if is_block else size,
        block_structure=[granularity.block_rows, size] if is_block else None,
    )


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_grids(bits: int, symmetric: bool, granularity: Granularity) -> None:
    """Equal numbers everywhere; with zero points, except where a weight lies within rounding of a border.

    There the two ways to add a zero point, before or after rounding, may take either neighbour.
    """
    weight = torch.randn(SHAPE) * 0.02
    format = IntegerFormat(bits=bits, symmetric=symmetric)
    grid = fit_grid(weight, format, granularity)
    theirs_of = {"scale": grid.scale, "zero_point": torch.zeros(1)}
    if grid.zero_point is not None:
        theirs_of["zero_point"] = grid.zero_point - 2 ** (bits - 1)
    theirs_of = {key: t.reshape(1) if granularity.kind == "tensor" else t for key, t in theirs_of.items()}
    if symmetric:
        theirs_of["zero_point"] = torch.zeros_like(theirs_of["scale"])
    for x in (weight, 3 * weight):  # the second one beyond the range
        found = forward.fake_quantize(x, **theirs_of, args=their_arguments(format, granularity))
        ours = grid.fake_quantize(x)
        if symmetric:
            assert found.equal(ours)
            continue
        steps = granularity.join(granularity.split(x) / grid.scale.unsqueeze(-1), SHAPE[0], SHAPE[1])
        clear = (steps - steps.floor() - 0.5).abs() > 2.0**bits * torch.finfo(torch.float32).eps
        assert bool(clear.any())
        assert found[clear].equal(ours[clear])
        assert bool(((found - ours).abs() <= 1.001 * grid.scale.max()).all())


def near_borders(format: MinifloatFormat) -> Tensor:
    """Every value, every border between two values, their neighbours in float32, and values beyond the range."""
    levels = torch.tensor(sorted({format.magnitude(code) for code in range(format.max_code + 1)}))
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, torch.rand(2000) * 1.2 * format.max_value])
    points = torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])
    return torch.cat([points, -points])


@pytest.mark.parametrize("format", [E4M3, E2M3, E2M1], ids=lambda f: f.name)
def test_float_casts(format: MinifloatFormat) -> None:
    x = near_borders(format)
    args = quantization.QuantizationArgs(num_bits=format.bits, type="float")
    low, high = helpers.calculate_range(args, "cpu")
    assert (float(low), float(high)) == (format.min_value, format.max_value)
    found = quant_args.round_to_quantized_type_args(x, args, low, high)
    assert found.equal(format.snap(x, None))


def all_bfloat16() -> Tensor:
    """Every positive bfloat16 but the smallest and the largest, whose scales or squares are no float32."""
    values = torch.arange(0x0800, 0x7800, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values.float()


@pytest.mark.parametrize("format", [E4M3, E2M3, E2M1], ids=lambda f: f.name)
def test_mx_scales_of_inputs(format: MinifloatFormat) -> None:
    """Of the largest magnitude of a group: all of bfloat16, and float32 around every border."""
    edges = torch.exp2(torch.arange(-20, 20).float())[:, None] * (1 + torch.arange(1, 17) / 16)
    edges = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(torch.inf))]).flatten()
    largest = torch.cat([all_bfloat16(), edges])
    expected = torch.exp2(mx_utils.generate_mx_scales(largest, format.bits).clamp(0, 255) - 127)
    rows = torch.zeros(largest.numel(), 32)
    rows[:, 5] = largest
    inputs = InputQuantizer(
        format=format, granularity=Granularity(kind="group", group_size=32), scale=MxInputScale(element=format)
    )
    found = cast(Grid, inputs.quantize(rows).grid).scale.flatten()
    assert found.equal(expected)


def test_the_global_scale_of_nvfp4() -> None:
    for largest in torch.rand(500, dtype=torch.float64).mul(20).sub(10).exp().float():
        expected = helpers.generate_gparam(-largest, largest / 2)
        assert Fp8Scale().bind(largest.double() / 6).global_scale.equal(expected)


def test_scales_of_nvfp4() -> None:
    """Equal where they are not 0; ours is then the smallest one."""
    args = layouts.arguments(Scheme.parse("nvfp4"), layouts.NVFP4)["input_activations"]
    args = quantization.QuantizationArgs(**args)
    largest = torch.rand(4000).mul(30).sub(15).exp()
    for global_scale in (torch.tensor([0.37]), torch.tensor([2688.0])):
        scale, _ = helpers.calculate_qparams(-largest, largest / 2, args, global_scale=global_scale)
        ours = BoundFp8Scale(global_scale=global_scale).round((largest / 6)[:, None]).flatten()
        is_number = largest / 6 * global_scale > 2.0**-10
        assert bool(is_number.any())
        assert bool((~is_number).any())
        assert ours[is_number].equal((scale / global_scale)[is_number])
        assert bool((scale[~is_number] == 0.125).all())


INTEGER_INPUTS = [
    *(f"W8A{bits}-channel{option}" for bits in range(2, 9) for option in ("", "-actasym")),
    "W8A8-acttensor", "W8A8-acttensor-actasym", "W8A8-actg32", "W4A4-g16-actg16-actasym", "W8A8-static-minmax",
    "W8A8-static-minmax-actasym", "W4A4-g32-static-minmax-actasym",
]  # fmt: skip
FP8_INPUTS = ["fp8", "fp8-acttensor", "fp8-actg32", "fp8-static-mse"]
BLOCK_SCALED_INPUTS = ["mxfp8", "mxfp6", "mxfp4", "nvfp4"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in (*INTEGER_INPUTS, *FP8_INPUTS) for dtype in DTYPES]
    + [(name, dtype) for name in BLOCK_SCALED_INPUTS for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_the_inputs_that_its_modules_multiply(name: str, dtype: torch.dtype) -> None:
    """Bit for bit in every dtype that is computed in, with and without a batch dimension."""
    scheme = Scheme.parse(name)
    assert scheme.activations is not None
    inputs = input_quantizer(scheme.activations, SHAPE[1])
    args = their_scheme(scheme, layout_of(scheme)).input_activations
    module = their_module(inputs, dtype)
    for shape in ((2, 40, 96), (40, 96), (2, 3, 20, 96)):
        x = random_inputs(shape, dtype)
        found = forward.forward_quantize(module, x.clone(), "input", args)
        assert found.dtype == dtype
        ours = engine_inputs(x, inputs)
        assert ours.dtype == dtype
        assert found.equal(ours)
        assert not ours.equal(x)


def their_module(inputs: InputQuantizer, dtype: torch.dtype) -> nn.Module:
    """A module as it looks after loading: scales in the model's dtype."""
    module: Any = nn.Module()
    module.quantization_status = quantization.QuantizationStatus.DECOMPRESSED
    if inputs.static is not None:
        module.input_scale = inputs.static.scale.reshape(1).to(dtype)
        if inputs.static.zero_point is not None:
            signed = inputs.static.zero_point - 2 ** (int(inputs.format.bits) - 1)
            module.input_zero_point = signed.reshape(1).to(torch.int8)
    if isinstance(inputs.scale, FixedFp8Scale):
        module.input_global_scale = inputs.scale.bound.global_scale
    return module


@pytest.mark.parametrize(
    "name", ["fp8", "fp8-actg32", "fp8-acttensor", "fp8-static-minmax", "mxfp8", "mxfp6", "mxfp4", "nvfp4"]
)
def test_our_quantized_inputs_are_its_floats(name: str) -> None:
    """Our own products are on the same codes and scales, unlike those of integers, whose scales differ on purpose."""
    scheme = Scheme.parse(name)
    assert scheme.activations is not None
    inputs = input_quantizer(scheme.activations, SHAPE[1])
    x = random_inputs((1, 200, 96), torch.float32)
    args = their_scheme(scheme, layout_of(scheme)).input_activations
    found = forward.forward_quantize(their_module(inputs, torch.float32), x.clone(), "input", args)
    assert found[0].equal(inputs.quantize(x[0]).dequantize())
