"""Bytes of a quantized model in its files, tensor by tensor and header by header, before anything is quantized.

Every layout is a table of tensors (their names, shapes and dtypes), so that sizes are exact wherever shapes decide
them. They do not decide what else a method adds to a site (scales of inputs, float columns, corrections; of low-rank
addends the shape is known) nor how many weights are outliers, of which a scheme gives only the share.

Legend: O out features, I in features, R rows of scales, G groups.
"""

import json
import math
from collections.abc import Iterable, Mapping

import torch

from bitwright.exporters.layout_choice import choose_layouts
from bitwright.model.layouts import compressed_tensors as ct
from bitwright.model.layouts import own
from bitwright.model.sites import Site
from bitwright.numerics.codebook_grid import CodebookFormat, LearnedTableFormat
from bitwright.numerics.formats import has_float_zero
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE
from bitwright.numerics.low_rank import factor_shapes
from bitwright.numerics.outliers import MAX_SHORT_COLUMNS
from bitwright.numerics.packing import num_words
from bitwright.numerics.ternary import TernaryFormat
from bitwright.numerics.trits import num_trit_bytes
from bitwright.recipe import Layout
from bitwright.schemes import MODEL_SCALE, ActivationScheme, Scheme, WeightScheme
from bitwright.search.model_shape import ModelShape, StoredTensor

_SCALE_DTYPES = {
    "float32": torch.float32, "e8m0": torch.uint8, "e8m0-int8": torch.uint8, "nested": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}  # fmt: skip
_NESTED_BLOCK = 256
_LENGTH_BYTES, _ALIGNMENT = 8, 8
_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""In the order in which safetensors lays tensors out, which decides how long the header's offsets are."""
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def exported_bytes(
    shape: ModelShape, assignment: Mapping[str, Scheme | None], *, layout: Layout = "auto", tied_apart: bool = False
) -> int:
    """Return the bytes of all safetensors files of a model under an assignment, headers included.

    Args:
        shape: of the model.
        assignment: site -> scheme; None, or no entry, leaves a site in its dtype.
        layout: as in a recipe.
        tied_apart: a transform has given the head a weight of its own.
    Raises:
        ShapeError: weights that no layout holds.
        RecipeError: the layout asked for cannot hold a site.
    """
    names = shape.block_names
    shards: dict[str, list[StoredTensor]] = {name: [] for name in (*names, "")}
    for tensor in stored_tensors(shape, assignment, layout=layout):
        home = next((name for name in names if tensor.name.startswith(name + ".")), "")
        shards[home].append(tensor)
    apart = shape.head_bytes if tied_apart else 0
    return apart + sum(file_bytes(tensors) for tensors in shards.values())


def stored_tensors(
    shape: ModelShape, assignment: Mapping[str, Scheme | None], *, layout: Layout = "auto"
) -> list[StoredTensor]:
    """Return every tensor that is stored of a model under an assignment; the arguments are those of `exported_bytes`.

    Experts that share a parameter are listed one by one, as most checkpoints store them. A fused gate and up counts as
    one product, where files may hold two: that is a few hundred bytes of header for each expert.
    """
    layouts: dict[str, str] = {}
    if any(shape.ranks.get(name) for name, scheme in assignment.items() if scheme is not None):
        layout = own.NAME
    if any(scheme is not None for scheme in assignment.values()):
        plan = shape.plan(assignment)
        layouts = choose_layouts(shape.sites, plan, layout, dtype=shape.dtype, stored=shape.site_dtypes)
    tensors = list(shape.kept)
    for site in shape.sites:
        scheme, dtype = assignment.get(site.name), shape.site_dtypes[site.name]
        module = site.name.removesuffix(".weight")
        if scheme is None:
            dims = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
            tensors.append(StoredTensor(name=f"{module}.weight", shape=dims, dtype=dtype))
        else:
            rank = shape.ranks.get(site.name, 0)
            tensors += _named(module, site_tensors(site, scheme, layouts[site.name], dtype, rank=rank))
    return tensors


def site_bytes(
    site: Site, scheme: Scheme | None, dtype: torch.dtype, model_dtype: torch.dtype, *, rank: int = 0
) -> int:
    """Bytes of one site's tensors, without its share of a header.

    Args:
        site: its shape.
        scheme: with the granularity that is really used; None for the weight itself.
        dtype: of the weight as it is stored.
        model_dtype: decides, with the scheme, which layout holds it.
        rank: of its low-rank addend; 0 for none.
    """
    if scheme is None:
        return site.out_features * site.in_features * dtype.itemsize
    held = None if rank else ct.layout_of(scheme, site.in_features, model_dtype)
    parts = site_tensors(site, scheme, held or own.NAME, dtype, rank=rank)
    return sum(tensor.num_bytes for tensor in _named("", parts))


def site_tensors(
    site: Site, scheme: Scheme, layout: str, dtype: torch.dtype, *, rank: int = 0
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of a site, by the names inside its module.

    Args:
        site: its shape.
        scheme: with the granularity that is really used.
        layout: a name in compressed-tensors' `LAYOUTS`, or bitwright's own.
        dtype: of the weight, which plain scales have too.
        rank: of its low-rank addend; 0 for none.
    """
    rows, columns = site.out_features, site.in_features
    weights = scheme.weights
    parts = (
        _own_codes(weights, rows, columns, dtype) if layout == own.NAME else _ct_codes(weights, rows, columns, layout)
    )
    parts |= _scales(weights, rows, columns, layout, dtype)
    parts |= _zero_points(weights, rows, columns, layout)
    if scheme.activations is not None:
        parts |= _inputs(scheme.activations, columns, layout)
    if rank:
        a, b = factor_shapes(rank, rows, columns)
        parts |= {"low_rank_a": (a, dtype), "low_rank_b": (b, dtype)}
    return parts


def file_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of one safetensors file: the length of the header, the header, and the data."""
    listed = sorted(tensors, key=lambda tensor: (_ORDER[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in listed:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return _LENGTH_BYTES + -(-length // _ALIGNMENT) * _ALIGNMENT + offset


_Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _named(module: str, parts: _Parts) -> list[StoredTensor]:
    return [StoredTensor(name=f"{module}.{leaf}", shape=dims, dtype=dtype) for leaf, (dims, dtype) in parts.items()]


def _ct_codes(weights: WeightScheme, rows: int, columns: int, layout: str) -> _Parts:
    bits = int(weights.format.bits)
    if layout == ct.PACKED:
        words = ((rows, num_words(columns, bits)), torch.int32)
        return {"weight_packed": words, "weight_shape": ((2,), torch.int64)}
    if layout in (ct.FLOAT, ct.MXFP8):
        return {"weight": ((rows, columns), torch.float8_e4m3fn)}
    if layout == ct.INT:
        return {"weight": ((rows, columns), torch.int8)}
    return {"weight_packed": ((rows, columns * bits // 8), torch.uint8)}


def _own_codes(weights: WeightScheme, rows: int, columns: int, dtype: torch.dtype) -> _Parts:
    parts: _Parts = {own.GUARD: ((0,), dtype), "weight_shape": ((2,), torch.int64)}
    if isinstance(weights.format, TernaryFormat):
        parts["weight_codes"] = ((rows, num_trit_bytes(columns)), torch.uint8)
    else:
        parts["weight_codes"] = ((rows, num_words(columns, int(weights.format.bits))), torch.int32)
    if isinstance(weights.format, LearnedTableFormat):
        parts["weight_table"] = ((weights.format.num_codes,), torch.float32)
    if weights.outliers:
        parts |= _outliers(math.ceil(rows * columns * weights.outliers), rows, columns, dtype)
    return parts


def _outliers(count: int, rows: int, columns: int, dtype: torch.dtype) -> _Parts:
    """The smaller of two layouts: positions in the flat weight, or columns and where each row begins."""
    values: _Parts = {"weight_outlier_value": ((count,), dtype)}
    column = torch.uint16 if columns <= MAX_SHORT_COLUMNS else torch.int32
    if count * column.itemsize + (rows + 1) * torch.int32.itemsize < count * torch.int32.itemsize:
        by_row: _Parts = {"column": ((count,), column), "row_start": ((rows + 1,), torch.int32)}
        return values | {f"weight_outlier_{name}": entry for name, entry in by_row.items()}
    return values | {"weight_outlier_index": ((count,), torch.int32)}


def _scales(weights: WeightScheme, rows: int, columns: int, layout: str, dtype: torch.dtype) -> _Parts:
    shape = weights.granularity.scale_shape(rows, columns)
    format = weights.format
    if isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat):
        return {"weight_codebook": ((*shape, format.num_codes), dtype)}
    if layout != own.NAME and weights.granularity.kind == "tensor":
        return {"weight_scale": ((1,), dtype)}
    stored = dtype if weights.scale == MODEL_SCALE else _SCALE_DTYPES[weights.scale]
    parts: _Parts = {"weight_scale": (shape, stored)}
    if weights.scale == "e4m3":
        parts["weight_global_scale"] = ((1,), torch.float32)
    if weights.scale == "nested":
        parts["weight_nested_absmax"] = ((-(-shape[0] * shape[1] // _NESTED_BLOCK),), torch.float32)
        parts["weight_nested_offset"] = ((1,), torch.float32)
    return parts


def _zero_points(weights: WeightScheme, rows: int, columns: int, layout: str) -> _Parts:
    format = weights.format
    if format.symmetric:
        return {}
    num_rows, groups = weights.granularity.scale_shape(rows, columns)
    bits, name = int(format.bits), "weight_zero_point"
    if has_float_zero(format):
        return {name: ((num_rows, groups), FLOAT_ZERO_DTYPE)}
    if layout == own.NAME:
        return {name: ((num_rows, num_words(groups, bits)), torch.int32)}
    if weights.granularity.kind == "tensor":
        return {name: ((1,), torch.int8)}
    if layout == ct.PACKED:
        return {name: ((num_words(num_rows, bits), groups), torch.int32)}
    return {name: ((num_rows, groups), torch.int8)}


def _inputs(acts: ActivationScheme, columns: int, layout: str) -> _Parts:
    if acts.observer is None:
        return {}
    if not acts.is_static:
        return {"input_global_scale": ((1,), torch.float32)}
    shape = (acts.granularity.num_groups(columns),)
    parts: _Parts = {"input_scale": (shape, torch.float32)}
    if not acts.format.symmetric:
        parts["input_zero_point"] = (shape, torch.int32 if layout == own.NAME else torch.int8)
    return parts
