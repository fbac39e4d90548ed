"""The layouts of compressed-tensors: quantized sites to stored tensors and back.

    layout                  weight tensors, by their names inside the module
    pack-quantized          weight_packed int32 [O, ceil(I * bits / 32)], weight_scale, weight_shape; asymmetric:
                            weight_zero_point int32 [ceil(O * bits / 32), G], packed along O (tensor: int8 [1])
    int-quantized           weight int8 [O, I], weight_scale; asymmetric: weight_zero_point int8
    float-quantized         weight float8_e4m3fn [O, I], weight_scale
    mxfp8-quantized         weight float8_e4m3fn [O, I], weight_scale uint8 [O, I / 32]
    mxfp6-pack-quantized    weight_packed uint8 [O, 3 I / 4], weight_scale uint8 [O, I / 32]
    mxfp4-pack-quantized    weight_packed uint8 [O, I / 2], weight_scale uint8 [O, I / 32]
    nvfp4-pack-quantized    weight_packed uint8 [O, I / 2], weight_scale e4m3 [O, I / 16], weight_global_scale f32 [1]

weight_scale is [O, G] floats in the model's dtype unless said otherwise; [1] per tensor. pack-quantized stores unsigned
codes: a signed code q is stored as q + 2^(bits - 1). Asymmetric codes and zero points, which are 0 .. 2^bits - 1 here,
are packed as they are (the reader subtracts 2^(bits - 1) from both, which changes nothing); zero points and codes that
are not packed are stored with 2^(bits - 1) already subtracted. Calibrated inputs add input_scale [1] and
input_zero_point, NVFP4's input_global_scale [1].
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.model.layouts.own import INPUT, decode_inputs, encode_inputs
from bitwright.numerics.formats import FORMATS, Format, LevelFormat, has_float_zero
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.integer import MAX_BITS, IntegerFormat
from bitwright.numerics.nibbles import pack_low_first, unpack_low_first
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.schemes import MODEL_SCALE, ActivationScheme, Scheme, WeightScheme

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP8, MXFP6, MXFP4, NVFP4 = "mxfp8-quantized", "mxfp6-pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
LAYOUTS = (PACKED, INT, FLOAT, MXFP8, MXFP6, MXFP4, NVFP4)
_BLOCK_SCALED = {
    ("fp8-e4m3", "e8m0", 32): MXFP8,
    ("fp6-e2m3", "e8m0", 32): MXFP6,
    ("fp4-e2m1", "e8m0", 32): MXFP4,
    ("fp4-e2m1", "e4m3", 16): NVFP4,
}
_INPUT_FLOATS = (
    ("fp8-e4m3", "float32"), ("fp8-e4m3", "e8m0"), ("fp6-e2m3", "e8m0"), ("fp4-e2m1", "e8m0"), ("fp4-e2m1", "e4m3"),
)  # fmt: skip
_FLOAT_BITS = {"fp8-e4m3": 8, "fp6-e2m3": 6, "fp4-e2m1": 4}
_FLOATS = {bits: name for name, bits in _FLOAT_BITS.items()}
_SCALE_DTYPES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}


def layout_of(scheme: Scheme, in_features: int, dtype: torch.dtype) -> str | None:
    """Return the layout that holds a weight with rows of `in_features`; None if none does.

    Args:
        dtype: the model's. Readers round scales to it, and make bfloat16 of FP4 and MX whatever it is.
    """
    weights, acts = scheme.weights, scheme.activations
    size = weights.granularity.group_size
    ragged = weights.granularity.kind == "group" and size is not None and in_features % size != 0
    if ragged or weights.outliers or not _holds_inputs(acts, in_features):
        return None
    if isinstance(weights.format, IntegerFormat):
        holds = weights.scale == MODEL_SCALE and not has_float_zero(weights.format)
        return _integer_layout(weights, acts) if holds else None
    if weights.format.name == "fp8-e4m3" and weights.scale == MODEL_SCALE:
        return FLOAT
    if weights.granularity.kind != "group" or size is None or dtype != torch.bfloat16:
        return None
    return _BLOCK_SCALED.get((weights.format.name, weights.scale, size))


def arguments(scheme: Scheme, layout: str) -> dict[str, Any]:
    """Return `weights` and `input_activations` of a `config_groups` entry."""
    weights, acts = scheme.weights, scheme.activations
    entry: dict[str, Any] = {
        **_number(weights.format, weights.granularity, weights.scale),
        "dynamic": False,
        "actorder": None,
    }
    return {"weights": entry, "input_activations": None if acts is None else _input_arguments(acts), "format": layout}


def encode(layout: str, site: QuantizedSite) -> dict[str, Tensor]:
    """Return the stored tensors of a site, by their names inside its module."""
    grid = site.weight.grid
    assert isinstance(grid, Grid)
    stored = _encode_codes(layout, site.weight.codes, grid.format)
    stored |= {"weight_" + name: tensor for name, tensor in _encode_scale(grid).items()}
    if grid.zero_point is not None:
        stored["weight_zero_point"] = _encode_zero_point(layout, grid.zero_point, grid)
    for name, tensor in encode_inputs(site.inputs).items():
        stored[INPUT + name] = tensor
    if site.inputs is not None and "input_zero_point" in stored:
        stored["input_zero_point"] = (stored["input_zero_point"] - _half(site.inputs.format)).to(torch.int8)
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def needed_tensors(layout: str, arguments: Mapping[str, Any]) -> set[str]:
    """Return the tensors that a module of this layout must have, by their names inside it.

    Engines make up those that are missing: zeros for zero points, garbage for global scales.
    """
    weights, acts = arguments["weights"], arguments.get("input_activations")
    needed = {"weight_scale", "weight_packed" if "pack" in layout else "weight"}
    if layout == PACKED:
        needed.add("weight_shape")
    if layout == NVFP4:
        needed.add("weight_global_scale")
    if not weights.get("symmetric", True):
        needed.add("weight_zero_point")
    if acts is not None and acts.get("dynamic") == "local":
        needed.add("input_global_scale")
    if acts is not None and not acts.get("dynamic"):
        needed |= {"input_scale"} | (set() if acts.get("symmetric", True) else {"input_zero_point"})
    return needed


def decode(layout: str, arguments: Mapping[str, Any], stored: Mapping[str, Tensor]) -> QuantizedSite:
    """Undo `encode`.

    Args:
        layout: one of `LAYOUTS`.
        arguments: an entry of `config_groups`.
        stored: tensors by their names inside the module.
    Raises:
        CheckpointError: floats of another format than the layout's.
    """
    weights = weight_scheme(arguments["weights"], layout)
    format = cast(LevelFormat, weights.format)
    num_rows, in_features = stored_shape(layout, format, {name: tuple(t.shape) for name, t in stored.items()}, stored)
    codes = _decode_codes(layout, stored, format, in_features)
    scale, kept = stored["weight_scale"], None
    if weights.scale != MODEL_SCALE:
        kept = SCALE_FORMATS[weights.scale].load(
            {name.removeprefix("weight_"): tensor for name, tensor in stored.items() if name.startswith("weight_")}
        )
        scale = kept.values()
    elif weights.granularity.kind == "tensor":
        scale = scale.reshape(1, 1)
    grid = Grid(
        format=format,
        granularity=weights.granularity,
        in_features=in_features,
        scale=scale,
        zero_point=None if format.symmetric else _decode_zero_point(layout, stored, weights, num_rows),
        stored=kept,
    )
    acts = input_scheme(arguments.get("input_activations"))
    weight = QTensor(codes=codes, grid=grid)
    if acts is None:
        return QuantizedSite(weight=weight)
    given = {name.removeprefix(INPUT): tensor for name, tensor in stored.items() if name.startswith(INPUT)}
    if "zero_point" in given:
        given["zero_point"] = given["zero_point"].to(torch.int32) + _half(acts.format)
    return QuantizedSite(weight=weight, inputs=decode_inputs(acts, given, in_features))


def stored_shape(
    layout: str, format: Format, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Tensor]
) -> tuple[int, int]:
    """Return [O, I] of a stored weight."""
    if layout == PACKED:
        num_rows, in_features = (int(n) for n in stored["weight_shape"])
        return num_rows, in_features
    num_rows, width = shapes["weight_packed" if "weight_packed" in shapes else "weight"]
    return num_rows, width * 8 // int(format.bits) if "weight_packed" in shapes else width


def weight_scheme(arguments: Mapping[str, Any], layout: str) -> WeightScheme:
    """Read the `weights` of a `config_groups` entry.

    Raises:
        KeyError: an argument that every entry has is missing.
        ValueError: arguments that this layout does not have.
    """
    scale = {MXFP8: "e8m0", MXFP6: "e8m0", MXFP4: "e8m0", NVFP4: "e4m3"}.get(layout, MODEL_SCALE)
    return WeightScheme(format=_format(arguments), granularity=_granularity(arguments), scale=scale)


def input_scheme(arguments: Mapping[str, Any] | None) -> ActivationScheme | None:
    """Read the `input_activations` of a `config_groups` entry."""
    if arguments is None:
        return None
    format = _format(arguments)
    if isinstance(format, IntegerFormat) and format.symmetric:
        format = replace(format, full_range=False)
    scale = {"torch.uint8": "e8m0", "torch.float8_e4m3fn": "e4m3"}.get(str(arguments.get("scale_dtype")), "float32")
    # A stored scale does not say how it was found; any observer's name marks it as calibrated.
    observer = "minmax" if arguments.get("dynamic") in (False, "local") else None
    granularity = _granularity(arguments)
    return ActivationScheme(format=cast(LevelFormat, format), granularity=granularity, scale=scale, observer=observer)


def _integer_layout(weights: WeightScheme, acts: ActivationScheme | None) -> str | None:
    if acts is not None and int(weights.format.bits) == MAX_BITS:
        return INT
    # Packed zero points are read only where all is dequantized at once, inputs and all.
    readable = weights.format.symmetric or acts is None
    return PACKED if readable and weights.granularity.kind != "block" else None


def _holds_inputs(acts: ActivationScheme | None, in_features: int) -> bool:
    """Whether `input_activations` can say what happens to the inputs."""
    if acts is None:
        return True
    granularity = acts.granularity
    if granularity.kind == "group":
        fits = granularity.group_size is not None and in_features % granularity.group_size == 0
    else:
        fits = granularity.kind in ("token", "tensor")
    if isinstance(acts.format, IntegerFormat):
        return fits and acts.scale == "float32"
    return fits and (acts.format.name, acts.scale) in _INPUT_FLOATS


def _number(format: Format, granularity: Granularity, scale: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "num_bits": _FLOAT_BITS.get(format.name, int(format.bits)),
        "type": "float" if format.name in _FLOAT_BITS else "int",
        "symmetric": format.symmetric,
        "strategy": "tensor_group" if scale == "e4m3" else granularity.kind,
        "group_size": None if granularity.kind == "block" else granularity.group_size,
    }
    if granularity.kind == "block":
        entry["block_structure"] = [granularity.block_rows, granularity.group_size]
    if scale in _SCALE_DTYPES:
        entry |= {"scale_dtype": _SCALE_DTYPES[scale], "zp_dtype": _SCALE_DTYPES[scale]}
    return entry


def _input_arguments(acts: ActivationScheme) -> dict[str, Any]:
    dynamic: bool | str = "local" if acts.scale == "e4m3" else not acts.is_static
    return {**_number(acts.format, acts.granularity, acts.scale), "dynamic": dynamic, "actorder": None}


def _format(arguments: Mapping[str, Any]) -> Format:
    bits = int(arguments["num_bits"])
    if arguments.get("type", "int") == "int":
        return IntegerFormat(bits=bits, symmetric=bool(arguments["symmetric"]))
    if bits not in _FLOATS:
        raise ValueError(f"floats of {bits} bits")
    return FORMATS[_FLOATS[bits]]


def _granularity(arguments: Mapping[str, Any]) -> Granularity:
    strategy = str(arguments["strategy"])
    if strategy == "block":
        rows, columns = arguments["block_structure"]
        return Granularity(kind="block", block_rows=int(rows), group_size=int(columns))
    kind = "group" if strategy == "tensor_group" else strategy
    size = int(arguments["group_size"]) if kind == "group" else None
    return Granularity(kind=cast(Any, kind), group_size=size)


def _half(format: Format) -> int:
    """What compressed-tensors subtracts from unsigned codes and zero points."""
    return 1 << (int(format.bits) - 1)


def _encode_codes(layout: str, codes: Tensor, format: Format) -> dict[str, Tensor]:
    if layout == PACKED:
        shape = torch.tensor(codes.shape, dtype=torch.int64)
        offset = codes.to(torch.int32) - format.min_code
        return {"weight_packed": pack(offset, int(format.bits)), "weight_shape": shape}
    if layout == INT:
        return {"weight": codes if format.symmetric else (codes.to(torch.int16) - _half(format)).to(torch.int8)}
    if layout in (FLOAT, MXFP8):
        return {"weight": codes.view(torch.float8_e4m3fn)}
    if layout == MXFP6:
        # Four codes fill three bytes; the dense bitstream of int32 words, read as bytes, is the same.
        width = codes.shape[-1] * 6 // 8
        return {"weight_packed": pack(codes, 6).view(torch.uint8)[:, :width]}
    return {"weight_packed": pack_low_first(codes)}


def _decode_codes(layout: str, stored: Mapping[str, Tensor], format: Format, in_features: int) -> Tensor:
    if layout == PACKED:
        offset = unpack(stored["weight_packed"], int(format.bits), in_features)
        return (offset.to(torch.int16) + format.min_code).to(format.code_dtype)
    if layout == INT:
        codes = stored["weight"]
        return codes if format.symmetric else (codes.to(torch.int16) + _half(format)).to(torch.uint8)
    if layout in (FLOAT, MXFP8):
        if stored["weight"].dtype != torch.float8_e4m3fn:
            raise CheckpointError(f"{layout}: weights of {stored['weight'].dtype}, which engines take for E4M3.")
        return stored["weight"].view(torch.uint8)
    if layout == MXFP6:
        packed = stored["weight_packed"]
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous()
        return unpack(padded.view(torch.int32), 6, in_features)
    return unpack_low_first(stored["weight_packed"])


def _encode_scale(grid: Grid) -> dict[str, Tensor]:
    if grid.stored is not None:
        return dict(grid.stored.tensors())
    return {"scale": grid.scale.reshape(1) if grid.granularity.kind == "tensor" else grid.scale}


def _encode_zero_point(layout: str, zero_point: Tensor, grid: Grid) -> Tensor:
    if layout == PACKED and grid.granularity.kind != "tensor":
        return pack(zero_point.to(torch.int32).T.contiguous(), int(grid.format.bits)).T
    shifted = (zero_point - _half(grid.format)).to(torch.int8)
    return shifted.reshape(1) if grid.granularity.kind == "tensor" else shifted


def _decode_zero_point(layout: str, stored: Mapping[str, Tensor], weights: WeightScheme, num_rows: int) -> Tensor:
    """Return the zero points [R, G] int32 as they count here, from 0."""
    zero_point = stored["weight_zero_point"]
    if layout == PACKED and weights.granularity.kind != "tensor":
        bits = int(weights.format.bits)
        return unpack(zero_point.T.contiguous(), bits, num_rows).T.contiguous().to(torch.int32)
    shifted = zero_point.to(torch.int32) + _half(weights.format)
    return shifted.reshape(1, 1) if weights.granularity.kind == "tensor" else shifted
