"""bitwright's own layout: it holds every format, and `import bitwright` teaches transformers to load and run it.

    <module>.weight_codes             int32 [O, ceil(I bits / 32)], a bitstream per row; ternary: uint8 [O, ceil(I / 5)]
    <module>.weight_shape             int64 [2]
    <module>.weight_scale             as the scale format stores it, with its further tensors beside it
    <module>.weight_zero_point        int32, packed like codes; asymmetric only
    <module>.weight_codebook          [R, G, K] floats; tables per row or group
    <module>.weight_table             float32 [K]; one table for the weight
    <module>.weight_outlier_*         weights kept as floats
    <module>.input_scale              float32 [1] or [G]; calibrated scales, with input_zero_point int32 if asymmetric
    <module>.input_global_scale       float32 [1]; the level above dynamic FP8 scales

Stored codes count from 0: `min_code` is subtracted. The scheme, by name, is in the configuration.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bitwright.numerics.block_scales import BoundFp8Scale, FixedFp8Scale, MxInputScale
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.formats import Format, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite
from bitwright.numerics.learned_table import table_format
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.outliers import SparseOutliers
from bitwright.numerics.packing import num_words, pack, unpack
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import ScaleFormat
from bitwright.numerics.ternary import TernaryFormat
from bitwright.numerics.trits import pack_trits, unpack_trits
from bitwright.schemes import MODEL_SCALE, ActivationScheme, Scheme

NAME = "bitwright"
WEIGHT, INPUT = "weight_", "input_"


def encode(site: QuantizedSite) -> dict[str, Tensor]:
    """Return the stored tensors of a site, by their names inside its module."""
    weight = site.weight
    parts = {"codes": pack_codes(weight.codes, weight.grid.format), "shape": torch.tensor(weight.shape)}
    parts |= _encode_grid(weight.grid)
    if weight.outliers is not None:
        parts |= {f"outlier_{name}": tensor for name, tensor in weight.outliers.tensors().items()}
    stored = {WEIGHT + name: tensor.contiguous() for name, tensor in parts.items()}
    return stored | {INPUT + name: tensor.contiguous() for name, tensor in encode_inputs(site.inputs).items()}


def decode(scheme: Scheme, stored: Mapping[str, Tensor]) -> QuantizedSite:
    """Undo `encode`.

    Args:
        scheme: with the granularity that was really used.
        stored: tensors by their names inside the module.
    """
    parts = {name.removeprefix(WEIGHT): tensor for name, tensor in stored.items() if name.startswith(WEIGHT)}
    num_rows, in_features = (int(n) for n in parts["shape"])
    grid = _decode_grid(scheme, parts, num_rows, in_features)
    outlying = {name.removeprefix("outlier_"): t for name, t in parts.items() if name.startswith("outlier_")}
    outliers = SparseOutliers.from_tensors(outlying, (num_rows, in_features)) if outlying else None
    codes = unpack_codes(parts["codes"], grid.format, in_features)
    weight = QTensor(codes=codes, grid=grid, outliers=outliers)
    if scheme.activations is None:
        return QuantizedSite(weight=weight)
    given = {name.removeprefix(INPUT): tensor for name, tensor in stored.items() if name.startswith(INPUT)}
    return QuantizedSite(weight=weight, inputs=decode_inputs(scheme.activations, given, in_features))


def pack_codes(codes: Tensor, format: Format) -> Tensor:
    """Pack codes [..., n] densely along the last dimension."""
    if isinstance(format, TernaryFormat):
        return pack_trits(codes)
    return pack(codes.to(torch.int32) - format.min_code, int(format.bits))


def unpack_codes(packed: Tensor, format: Format, n: int) -> Tensor:
    """Undo `pack_codes`."""
    if isinstance(format, TernaryFormat):
        return unpack_trits(packed, n)
    return (unpack(packed, int(format.bits), n).to(torch.int16) + format.min_code).to(format.code_dtype)


def stored_shapes(
    scheme: Scheme, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the packed codes: what an empty module must offer before its tensors are read."""
    format = scheme.weights.format
    if isinstance(format, TernaryFormat):
        return {"weight_codes": ((out_features, -(-in_features // 5)), torch.uint8)}
    return {"weight_codes": ((out_features, num_words(in_features, int(format.bits))), torch.int32)}


def decode_inputs(acts: ActivationScheme, given: Mapping[str, Tensor], in_features: int) -> InputQuantizer:
    """Return the quantizer of a site's inputs from what is stored of it: nothing where all scales are dynamic."""
    scale = input_scale(acts)
    static: Grid | None = None
    if acts.is_static:
        zero_point = given["zero_point"].reshape(1, -1).to(torch.int32) if "zero_point" in given else None
        static = Grid(
            format=acts.format, granularity=acts.granularity, in_features=in_features,
            scale=given["scale"].reshape(1, -1), zero_point=zero_point,
        )  # fmt: skip
    elif "global_scale" in given:
        scale = FixedFp8Scale(bound=BoundFp8Scale(global_scale=given["global_scale"]))
    return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale, static=static)


def encode_inputs(inputs: InputQuantizer | None) -> dict[str, Tensor]:
    """Return what is stored of a quantizer: calibrated scales; nothing where all are found at run time."""
    if inputs is None:
        return {}
    if isinstance(inputs.scale, FixedFp8Scale):
        return {"global_scale": inputs.scale.bound.global_scale}
    if inputs.static is None:
        return {}
    parts = {"scale": inputs.static.scale.flatten()}
    if inputs.static.zero_point is not None:
        parts["zero_point"] = inputs.static.zero_point.flatten()
    return parts


def input_scale(acts: ActivationScheme) -> ScaleFormat:
    """How run-time scales of activations are rounded: as the kernels do, where there are kernels."""
    if acts.scale == "e8m0" and isinstance(acts.format, MinifloatFormat):
        return MxInputScale(element=acts.format)
    return SCALE_FORMATS[acts.scale]


def _encode_grid(grid: AnyGrid) -> dict[str, Tensor]:
    if isinstance(grid, CodebookGrid):
        return {"codebook": grid.codebook}
    assert isinstance(grid, Grid)
    parts = {"scale": grid.scale} if grid.stored is None else dict(grid.stored.tensors())
    if grid.format.name.startswith("lut"):
        levels = torch.arange(grid.format.num_codes, dtype=grid.format.code_dtype)
        parts["table"] = grid.format.decode(levels, None)
    if grid.zero_point is not None:
        parts["zero_point"] = pack(grid.zero_point, int(grid.format.bits))
    return parts


def _decode_grid(scheme: Scheme, parts: Mapping[str, Tensor], num_rows: int, in_features: int) -> AnyGrid:
    weights = scheme.weights
    format, granularity = weights.format, weights.granularity
    if isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat):
        return CodebookGrid(format=format, granularity=granularity, in_features=in_features, codebook=parts["codebook"])
    levels = table_format(format.bits, parts["table"]) if isinstance(format, LearnedTableFormat) else format
    grid = Grid(
        format=cast(LevelFormat, levels),
        granularity=granularity,
        in_features=in_features,
        scale=parts["scale"]
        if weights.scale in (MODEL_SCALE, "float32")
        else torch.ones(granularity.scale_shape(num_rows, in_features), device=parts["scale"].device),
        zero_point=_decode_zero_point(format, granularity, parts, in_features),
    )
    if weights.scale in (MODEL_SCALE, "float32"):
        return grid
    stored = SCALE_FORMATS[weights.scale].load(parts)
    return replace(grid, scale=stored.values(), stored=stored)


def _decode_zero_point(
    format: Format, granularity: Granularity, parts: Mapping[str, Tensor], in_features: int
) -> Tensor | None:
    if format.symmetric:
        return None
    return unpack(parts["zero_point"], int(format.bits), granularity.num_groups(in_features)).to(torch.int32)
