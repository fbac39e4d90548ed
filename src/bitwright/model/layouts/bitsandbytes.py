"""bitsandbytes' 4-bit layout, as transformers saves and loads it: NF4 or FP4 in blocks over the flattened weight.

    <module>.weight                     uint8 [O I / 2, 1]: two codes per byte, high first; rows run together
    <module>.weight.absmax              float32 [N], or uint8 [N] where the scales are quantized too
    <module>.weight.quant_map           float32 [16]: the table of the format
    <module>.weight.nested_absmax       float32 [ceil(N / 256)]; quantized scales only
    <module>.weight.nested_quant_map    float32 [256]; quantized scales only
    <module>.weight.quant_state.bitsandbytes__nf4    uint8: JSON of type, block, dtype, shape and offset; or ..__fp4

Blocks do not know of rows. Where the block divides the row both ways of counting give the same blocks; only such
weights are read and written. bitsandbytes also stores scales of 0, for blocks of zeros, which a grid refuses: they are
read as the smallest scale over codes of the value 0. No bitsandbytes is needed here.

Legend: O out features, I in features, N blocks.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.nested import MIN_SCALE, NestedScale, StoredNestedScale, dynamic_map
from bitwright.numerics.nibbles import pack_high_first, unpack_high_first
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.table import FP4_BNB, NF4, TableFormat
from bitwright.schemes import Scheme

NAME = "bitsandbytes"
FORMATS: dict[str, TableFormat] = {"nf4": NF4, "fp4": FP4_BNB}
"""bitsandbytes' names of the formats."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes of a block that its kernels know."""
STATES = tuple(f"{NAME}__{quant_type}" for quant_type in FORMATS)
"""Last part of the name of the tensor that says type and shape."""
ABSMAX, TABLE = "absmax", "quant_map"
NESTED_ABSMAX, NESTED_TABLE = "nested_absmax", "nested_quant_map"
PARTS = (ABSMAX, TABLE, NESTED_ABSMAX, NESTED_TABLE)


def quant_type(scheme: Scheme) -> str | None:
    """bitsandbytes' name of what a scheme makes of weights; None where it has none."""
    weights = scheme.weights
    granularity = weights.granularity
    if scheme.activations is not None or weights.outliers or weights.scale not in ("float32", "nested"):
        return None
    if granularity.kind != "group" or granularity.group_size not in BLOCKS:
        return None
    return next((name for name, format in FORMATS.items() if format == weights.format), None)


def dense_name(stored: str) -> str | None:
    """Return the weight that a stored tensor is a part of, beside the codes; None for any other tensor."""
    dense, _, leaf = stored.rpartition(".")
    dense = dense.removesuffix(".quant_state")
    return dense if dense.endswith(".weight") and leaf in (*PARTS, *STATES) else None


def encode(site: QuantizedSite, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the stored tensors of a site, by their names inside its module.

    Args:
        site: its scheme has a `quant_type`, and its block divides the rows.
        dtype: that bitsandbytes dequantizes to.
    """
    grid = site.weight.grid
    assert isinstance(grid, Grid)
    name = next(name for name, format in FORMATS.items() if format == grid.format)
    state: dict[str, Any] = {
        "quant_type": name, "blocksize": grid.granularity.group_size, "dtype": str(dtype).removeprefix("torch."),
        "shape": list(site.weight.shape),
    }  # fmt: skip
    parts = {ABSMAX: grid.scale.float().flatten(), TABLE: torch.tensor(FORMATS[name].values)}
    if grid.stored is not None:
        stored = grid.stored
        assert isinstance(stored, StoredNestedScale)
        parts |= {
            ABSMAX: stored.scale.flatten(), NESTED_ABSMAX: stored.nested_absmax,
            NESTED_TABLE: torch.tensor(dynamic_map()),
        }  # fmt: skip
        state |= {
            "nested_blocksize": stored.block, "nested_dtype": "float32", "nested_offset": float(stored.nested_offset)
        }  # fmt: skip
    named = {f"weight.{part}": tensor for part, tensor in parts.items()}
    named[f"weight.quant_state.{NAME}__{name}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {"weight": pack_high_first(site.weight.codes).unsqueeze(-1), **named}


def decode(parts: Mapping[str, Tensor]) -> QuantizedSite:
    """Return the site that bitsandbytes stored.

    Args:
        parts: tensors by the last parts of their names.
    Raises:
        CheckpointError: another table, or blocks across the ends of rows.
        BitwrightError: shapes that do not fit each other.
    """
    state = _state(parts)
    format, block = FORMATS[state["quant_type"]], int(state["blocksize"])
    num_rows, in_features = (int(n) for n in state["shape"])
    if in_features % block:
        raise CheckpointError(
            f"blocks of {block} weights run across the ends of rows of {in_features}, and cannot be read. "
            "Give the original, or quantize it in a block that divides the rows."
        )
    if not parts[TABLE].equal(torch.tensor(format.values)):
        raise CheckpointError(f"quant_map is not the table of {state['quant_type']}. Obtain the checkpoint again.")
    shape = (num_rows, in_features // block)
    codes = unpack_high_first(parts["weight"], num_rows * in_features).view(num_rows, in_features)
    scale, stored = _scales(parts, state, shape)
    if bool((zero := scale == 0).any()):  # the double-quantized form has no code for the smallest scale
        scale, stored = scale.masked_fill(zero, MIN_SCALE), None
        code_of_zero = int(format.encode(torch.zeros(1), None))
        codes = codes.masked_fill(zero.repeat_interleave(block, dim=1), code_of_zero)
    grid = Grid(
        format=format, granularity=Granularity(kind="group", group_size=block), in_features=in_features,
        scale=scale, zero_point=None, stored=stored,
    )  # fmt: skip
    return QuantizedSite(weight=QTensor(codes=codes.to(format.code_dtype), grid=grid))


def scheme_of(site: QuantizedSite) -> Scheme:
    """Return the scheme of a decoded site."""
    grid = site.weight.grid
    assert isinstance(grid, Grid)
    return Scheme.parse(f"{grid.format.name}-g{grid.granularity.group_size}{'-dq' if grid.stored is not None else ''}")


def config(quant_type: str, nested: bool, dtype: torch.dtype, skipped: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a directory.

    Args:
        quant_type: `nf4` or `fp4`.
        nested: whether scales are quantized too.
        dtype: to compute in.
        skipped: Linear modules that are left alone.
    """
    return {
        "quant_method": NAME, "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": list(skipped),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class BnbQuantization:
    """A checkpoint in bitsandbytes' 4-bit layout; satisfies `StoredQuantization`.

    Attributes:
        path: for messages.
    """

    path: Path

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> "BnbQuantization":
        """Raises CheckpointError for 8 bit, or codes hidden in floats."""
        if not config.get("load_in_4bit", config.get("_load_in_4bit")):
            raise CheckpointError(
                f"{path}: bitsandbytes' 8-bit weights depend on the inputs at run time and cannot be read. Give the "
                "original."
            )
        storage = config.get("bnb_4bit_quant_storage") or "uint8"
        if storage != "uint8":
            raise CheckpointError(
                f"{path}: 4-bit codes stored as {storage} cannot be read. Save the model again with "
                "bnb_4bit_quant_storage uint8."
            )
        return cls(path=path)

    @property
    def quantizes_inputs(self) -> bool:
        """Never."""
        return False

    def weights(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Every module whose state is stored, or one of its parts, is quantized."""
        names = set(stored)
        found: dict[str, list[str]] = {}
        for name in sorted(names):
            if (dense := dense_name(name)) is not None:
                found.setdefault(dense, []).append(name)
        for dense, parts in found.items():
            leaves = {part.rpartition(".")[2] for part in parts}
            needed = [dense, f"{dense}.{ABSMAX}", f"{dense}.{TABLE}"]
            missing = [name for name in needed if name not in names]
            missing += [] if leaves & set(STATES) else [f"{dense}.quant_state.{STATES[0]}"]
            if missing:
                raise CheckpointError(f"{self.path}: {missing[0]} is missing; the file is incomplete.")
            parts.append(dense)
        return found

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """As the protocol says; `small` holds the state."""
        del shapes
        try:
            num_rows, in_features = (int(n) for n in _state(small)["shape"])
        except (CheckpointError, ValueError, TypeError, KeyError) as error:
            raise self._unreadable(name, error) from None
        return num_rows, in_features

    def decode(self, name: str, stored: Mapping[str, Tensor]) -> QuantizedSite:
        """As the protocol says."""
        try:
            return decode(stored)
        except (BitwrightError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name}: {error}")


def _state(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Raises CheckpointError if what says type and shape is absent or unreadable."""
    found = [parts[name] for name in STATES if name in parts]
    try:
        state: Any = json.loads(bytes(found[0].tolist()))
        if state["quant_type"] not in FORMATS or len(state["shape"]) != 2 or int(state["blocksize"]) < 1:
            raise ValueError(f"{state['quant_type']}, {state['shape']}, {state['blocksize']}")
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"its quant_state cannot be read ({error}). Obtain the checkpoint again.") from None
    return cast(dict[str, Any], state)


def _scales(
    parts: Mapping[str, Tensor], state: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Tensor, StoredNestedScale | None]:
    """Return the scales [O, N / O] as float32, and how they are stored if not as these."""
    if NESTED_ABSMAX not in parts:
        return parts[ABSMAX].view(shape), None
    if not parts[NESTED_TABLE].equal(torch.tensor(dynamic_map())):
        raise CheckpointError("nested_quant_map is not the signed dynamic map. Obtain the checkpoint again.")
    if state["nested_blocksize"] != NestedScale().block:
        raise CheckpointError(f"scales are quantized in blocks of {state['nested_blocksize']}, not 256.")
    stored = NestedScale().load(
        {
            "scale": parts[ABSMAX].view(shape),
            "nested_absmax": parts[NESTED_ABSMAX],
            "nested_offset": torch.tensor([float(state["nested_offset"])]),
        }
    )
    return stored.values(), stored
