"""bitwright's own layout: it holds every format, and `import bitwright` teaches transformers to load and run it.

    <module>.weight                   [0] in the model's dtype: a guard, of a shape that no dense weight has
    <module>.weight_codes             int32 [O, ceil(I bits / 32)], a bitstream per row; ternary: uint8 [O, ceil(I / 5)]
    <module>.weight_shape             int64 [2]
    <module>.weight_scale             as the scale format stores it, with its further tensors beside it
    <module>.weight_zero_point        int32, packed like codes, or float16 [R, G]; asymmetric only
    <module>.weight_codebook          [R, G, K] floats; tables per row or group
    <module>.weight_table             float32 [K]; one table for the weight
    <module>.weight_outlier_*         weights kept as floats
    <module>.input_scale              float32 [1] or [G]; calibrated scales, with input_zero_point int32 if asymmetric
    <module>.input_global_scale       float32 [1]; the level above dynamic FP8 scales
    <module>.transform_scale          float32 [I]; inputs are divided by it before anything else
    <module>.transform_hadamard       int64 [1]; block size of the Hadamard rotation that inputs go through next
    <module>.column_index, _weight    int32 [k], floats [O, k]; columns that stay floats
    <module>.low_rank_a, _b           floats [k, I], [O, k]; B A is added to the weight that the codes stand for
    <module>.output_correction        float32 [O]; added to the output

Stored codes count from 0: `min_code` is subtracted. The scheme, by name, is in the configuration.

Without bitwright transformers must not load such a model: it would warn, and fill the weights with random numbers. Two
things make it refuse. The configuration's `transformers_weights`, the name of the weight file, holds `NEEDS_BITWRIGHT`
instead, which transformers quotes in its error. And where that entry is lost, as when a model is saved again, the
guards do not fit the shapes of the weights.

Legend: O out features, I in features, R rows of scales, G groups, K entries of a table, n outliers, k rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.numerics.block_scales import BoundFp8Scale, FixedFp8Scale, Fp8Scale, MxInputScale
from bitwright.numerics.codebook_grid import STORED_DTYPES, CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.formats import Format, LevelFormat, has_float_zero
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.inputs import FloatColumns, InputQuantizer, InputTransform, QuantizedSite
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE
from bitwright.numerics.learned_table import table_format
from bitwright.numerics.low_rank import LowRank
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.nested import NestedScale
from bitwright.numerics.outliers import SparseOutliers
from bitwright.numerics.packing import num_words, pack, unpack
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.ternary import TernaryFormat
from bitwright.numerics.trits import num_trit_bytes, pack_trits, unpack_trits
from bitwright.schemes import MODEL_SCALE, ActivationScheme, Scheme, WeightScheme

NAME = "bitwright"
WEIGHT, INPUT = "weight_", "input_"
GUARD = "weight"
_TOGETHER = (("column_index", "column_weight"), ("low_rank_a", "low_rank_b"))
"""Stored one with the other, or not at all."""
EXTRAS = ("transform_scale", "transform_hadamard", *(name for pair in _TOGETHER for name in pair), "output_correction")
"""What a site may have besides, whatever its scheme."""
NEEDS_BITWRIGHT = (
    "this model needs the package bitwright: pip install bitwright, then `import bitwright` before from_pretrained"
)
Stored: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a stored tensor."""
_Allowed: TypeAlias = tuple[tuple[int, ...], tuple[torch.dtype, ...]]


def encode(site: QuantizedSite) -> dict[str, Tensor]:
    """Return the stored tensors of a site, by their names inside its module."""
    weight = site.weight
    parts = {"codes": pack_codes(weight.codes, weight.grid.format), "shape": torch.tensor(weight.shape)}
    parts |= _encode_grid(weight.grid)
    if weight.outliers is not None:
        parts |= {f"outlier_{name}": tensor for name, tensor in weight.outliers.tensors().items()}
    stored = {WEIGHT + name: tensor.contiguous() for name, tensor in parts.items()}
    stored |= {INPUT + name: tensor.contiguous() for name, tensor in encode_inputs(site.inputs).items()}
    return stored | {name: tensor.contiguous() for name, tensor in _encode_extras(site).items()}


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
    inputs: InputQuantizer | None = None
    if scheme.activations is not None:
        given = {name.removeprefix(INPUT): tensor for name, tensor in stored.items() if name.startswith(INPUT)}
        inputs = decode_inputs(scheme.activations, given, in_features)
    columns: FloatColumns | None = None
    if "column_index" in stored:
        columns = FloatColumns(index=stored["column_index"], weight=stored["column_weight"])
    low_rank: LowRank | None = None
    if "low_rank_a" in stored:
        low_rank = LowRank(a=stored["low_rank_a"], b=stored["low_rank_b"])
    return QuantizedSite(
        weight=QTensor(codes=codes, grid=grid, outliers=outliers),
        inputs=inputs,
        transform=_decode_transform(stored),
        columns=columns,
        low_rank=low_rank,
        correction=stored.get("output_correction"),
    )


def pack_codes(codes: Tensor, format: Format) -> Tensor:
    """Pack codes [..., n] densely along the last dimension."""
    if isinstance(format, TernaryFormat):
        return pack_trits(codes)
    return pack(codes.to(torch.int32) - format.min_code, int(format.bits))


def unpack_codes(packed: Tensor, format: Format, n: int) -> Tensor:
    """Undo `pack_codes`."""
    if isinstance(format, TernaryFormat):
        return unpack_trits(packed, n)
    # Both kinds of codes take a byte and wrap at its end, so that no wider copy is needed.
    return unpack(packed, int(format.bits), n).view(format.code_dtype).add_(format.min_code)


def guard(dtype: torch.dtype) -> Tensor:
    """Return what stands under the name of the dense weight."""
    return torch.empty(0, dtype=dtype)


def is_part(leaf: str) -> bool:
    """Whether a tensor of this name, inside a quantized module, is one of those that `encode` makes, or the guard."""
    return leaf in (GUARD, *EXTRAS) or leaf.startswith((WEIGHT, INPUT))


def needed_tensors(scheme: Scheme) -> set[str]:
    """Return the names, inside its module, of the tensors that every weight in a scheme has."""
    return set(_expected(scheme, 1, 1))


def check_stored(module: str, scheme: Scheme, out_features: int, in_features: int, found: Mapping[str, Stored]) -> None:
    """Compare what is stored of a weight [O, I] with what `encode` and `guard` write for its scheme.

    Args:
        module: for messages.
        scheme: with the granularity that was really used.
        out_features: O.
        in_features: I.
        found: shapes and dtypes by the names inside the module.
    Raises:
        CheckpointError: a tensor is missing, one too many, or of another shape or dtype.
    """
    expected = _expected(scheme, out_features, in_features)
    if scheme.weights.outliers:
        expected |= _expected_outliers(found, out_features)
    expected |= _expected_extras(found, out_features, in_features)
    for name in sorted(expected.keys() ^ found.keys()):
        problem = "is missing" if name in expected else "is not part of it"
        raise CheckpointError(f"{module}.{name}: {problem}; the module is in {scheme}. Obtain the checkpoint again.")
    for name, (shape, dtypes) in expected.items():
        found_shape, dtype = found[name]
        if found_shape != shape or dtype not in dtypes:
            raise CheckpointError(
                f"{module}.{name}: {dtype} {list(found_shape)}, but a weight [{out_features}, {in_features}] in "
                f"{scheme} has {' or '.join(map(str, dtypes))} {list(shape)}. The files do not belong together."
            )


def _expected(scheme: Scheme, num_rows: int, in_features: int) -> dict[str, _Allowed]:
    """All tensors but the outliers, whose number shapes do not tell."""
    weights = scheme.weights
    format, granularity = weights.format, weights.granularity
    rows, groups = granularity.scale_shape(num_rows, in_features)
    expected: dict[str, _Allowed] = {GUARD: ((0,), STORED_DTYPES), "weight_shape": ((2,), (torch.int64,))}
    if isinstance(format, TernaryFormat):
        expected["weight_codes"] = ((num_rows, num_trit_bytes(in_features)), (torch.uint8,))
    else:
        expected["weight_codes"] = ((num_rows, num_words(in_features, int(format.bits))), (torch.int32,))
    if isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat):
        expected["weight_codebook"] = ((rows, groups, format.num_codes), STORED_DTYPES)
    else:
        expected |= {WEIGHT + name: entry for name, entry in _expected_scales(weights, rows, groups).items()}
    if isinstance(format, LearnedTableFormat):
        expected["weight_table"] = ((format.num_codes,), (torch.float32,))
    if has_float_zero(format):
        expected["weight_zero_point"] = ((rows, groups), (FLOAT_ZERO_DTYPE,))
    elif not format.symmetric:
        expected["weight_zero_point"] = ((rows, num_words(groups, int(format.bits))), (torch.int32,))
    if scheme.activations is not None:
        inputs = _expected_inputs(scheme.activations, in_features)
        expected |= {INPUT + name: entry for name, entry in inputs.items()}
    return expected


def _expected_scales(weights: WeightScheme, rows: int, groups: int) -> dict[str, _Allowed]:
    shape, one = (rows, groups), ((1,), (torch.float32,))
    scale = None if weights.scale == MODEL_SCALE else SCALE_FORMATS[weights.scale]
    if scale is None or isinstance(scale, FloatScale):
        return {"scale": (shape, STORED_DTYPES if scale is None else (scale.dtype,))}
    if isinstance(scale, Fp8Scale):
        return {"scale": (shape, (torch.float8_e4m3fn,)), "global_scale": one}
    expected: dict[str, _Allowed] = {"scale": (shape, (torch.uint8,))}
    if isinstance(scale, NestedScale):
        blocks = -(-rows * groups // scale.block)
        expected |= {"nested_absmax": ((blocks,), (torch.float32,)), "nested_offset": one}
    return expected


def _expected_inputs(acts: ActivationScheme, in_features: int) -> dict[str, _Allowed]:
    if acts.observer is None:
        return {}
    if not acts.is_static:
        return {"global_scale": ((1,), (torch.float32,))}
    shape = (acts.granularity.num_groups(in_features),)
    expected: dict[str, _Allowed] = {"scale": (shape, (torch.float32,))}
    return expected if acts.format.symmetric else expected | {"zero_point": (shape, (torch.int32,))}


def _expected_outliers(found: Mapping[str, Stored], num_rows: int) -> dict[str, _Allowed]:
    """The tensors of either layout of outliers, as long as the values that were found."""
    shape = found["weight_outlier_value"][0] if "weight_outlier_value" in found else (0,)
    parts: dict[str, _Allowed] = {"value": (shape, STORED_DTYPES)}
    if "weight_outlier_index" in found:
        parts["index"] = (shape, (torch.int32, torch.int64))
    else:
        parts["row_start"] = ((num_rows + 1,), (torch.int32,))
        parts["column"] = (shape, (torch.uint16, torch.int32))
    return {f"weight_outlier_{name}": entry for name, entry in parts.items()}


def _expected_extras(found: Mapping[str, Stored], num_rows: int, in_features: int) -> dict[str, _Allowed]:
    """What a site may have, whatever its scheme, if there is anything of it."""
    num_columns = found["column_index"][0] if "column_index" in found else (0,)
    rank = found["low_rank_a"][0][:1] if "low_rank_a" in found else (0,)
    optional: dict[str, _Allowed] = {
        "transform_scale": ((in_features,), (torch.float32,)),
        "transform_hadamard": ((1,), (torch.int64,)),
        "column_index": (num_columns, (torch.int32,)),
        "column_weight": ((num_rows, *num_columns), STORED_DTYPES),
        "low_rank_a": ((*rank, in_features), STORED_DTYPES),
        "low_rank_b": ((num_rows, *rank), STORED_DTYPES),
        "output_correction": ((num_rows,), (torch.float32,)),
    }
    expected = {name for pair in _TOGETHER if found.keys() & pair for name in pair} | found.keys()
    return {name: entry for name, entry in optional.items() if name in expected}


def _encode_extras(site: QuantizedSite) -> dict[str, Tensor]:
    extras: dict[str, Tensor] = {}
    if site.transform is not None and site.transform.scale is not None:
        extras["transform_scale"] = site.transform.scale.float()
    if site.transform is not None and site.transform.hadamard is not None:
        extras["transform_hadamard"] = torch.tensor([site.transform.hadamard])
    if site.columns is not None:
        extras |= {"column_index": site.columns.index, "column_weight": site.columns.weight}
    if site.low_rank is not None:
        extras |= {"low_rank_a": site.low_rank.a, "low_rank_b": site.low_rank.b}
    if site.correction is not None:
        extras["output_correction"] = site.correction.float()
    return extras


def _decode_transform(stored: Mapping[str, Tensor]) -> InputTransform | None:
    scale, block = stored.get("transform_scale"), stored.get("transform_hadamard")
    if scale is None and block is None:
        return None
    return InputTransform(scale=scale, hadamard=None if block is None else int(block))


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
        is_float = has_float_zero(grid.format)
        parts["zero_point"] = grid.zero_point if is_float else pack(grid.zero_point, int(grid.format.bits))
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
    if format.symmetric or has_float_zero(format):
        return parts.get("zero_point")
    return unpack(parts["zero_point"], int(format.bits), granularity.num_groups(in_features)).to(torch.int32)
