"""The compressed-tensors `pack-quantized` layout: quantized weights to stored tensors and back.

    <weight>_packed      int32 [O, ceil(I * bits / 32)]   element i at bits [i * bits, (i + 1) * bits) of its row
    <weight>_scale       [O, G]   (channel: [O, 1]; tensor: [1])
    <weight>_zero_point  int32 [ceil(O * bits / 32), G]   asymmetric only; packed along O (tensor: int8 [1], not packed)
    <weight>_shape       int64 [2]

Stored codes are unsigned: a signed code q is stored as q + 2^(bits - 1). Asymmetric codes and zero points, which are 0
.. 2^bits - 1 here, are packed as they are (the reader subtracts 2^(bits - 1) from both, which changes nothing); the
zero point that is not packed is stored with 2^(bits - 1) already subtracted.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.qtensor import QTensor

LAYOUT_VERSION = "0.17.0"
SUFFIXES = ("_packed", "_scale", "_zero_point", "_shape")
WIDTHS_PACKED_ALIKE_BEFORE_0_17 = (1, 2, 4, 8)


def encode(name: str, tensor: QTensor) -> dict[str, Tensor]:
    """Return the stored tensors of a quantized weight called `name` (which ends in `.weight`)."""
    grid = tensor.grid
    bits = grid.format.bits
    offset = 1 << (bits - 1) if grid.format.symmetric else 0
    scale = grid.scale.reshape(1) if grid.granularity.kind == "tensor" else grid.scale
    stored = {
        f"{name}_packed": pack(tensor.codes.to(torch.int32) + offset, bits),
        f"{name}_scale": scale.contiguous(),
        f"{name}_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if grid.zero_point is not None:
        stored[f"{name}_zero_point"] = _encode_zero_point(grid.zero_point, bits, grid.granularity)
    return stored


def config_group(bits: int, symmetric: bool, granularity: Granularity, targets: list[str]) -> dict[str, Any]:
    """Return one `config_groups` entry of `quantization_config`."""
    return {
        "targets": targets,
        "format": "pack-quantized",
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": granularity.kind,
            "group_size": granularity.group_size,
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": None,
        "output_activations": None,
    }


def quantization_config(groups: list[dict[str, Any]], ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model directory."""
    return {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How the packed weights of one checkpoint are laid out, from its `quantization_config`."""

    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]
    version: str
    path: Path

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "Packing":
        """Raises CheckpointError for every other quantization method or layout."""
        method, layout = config.get("quant_method"), config.get("format")
        entries = cast(dict[str, dict[str, Any]], config.get("config_groups") or {})
        layouts = {str(entry.get("format") or layout) for entry in entries.values()}
        if method != "compressed-tensors" or layouts != {"pack-quantized"}:
            raise CheckpointError(
                f"{path}: the model is already quantized ({method}, {', '.join(sorted(layouts)) or layout}). "
                "Only unquantized models and compressed-tensors pack-quantized ones can be read; give the original."
            )
        try:
            groups = tuple((tuple(entry["targets"]), _weight_args(entry)) for entry in entries.values())
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: quantization_config describes no weights in a config group ({error}). Obtain it again."
            ) from None
        return cls(groups=groups, version=str(config.get("version", "0")), path=path)

    def weights(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Map each packed weight's dense name to the stored tensors that hold it."""
        names = set(stored)
        found: dict[str, list[str]] = {}
        for name in names:
            if name.endswith("_packed"):
                dense = name.removesuffix("_packed")
                parts = [dense + suffix for suffix in SUFFIXES if dense + suffix in names]
                if f"{dense}_scale" not in names or f"{dense}_shape" not in names:
                    raise CheckpointError(
                        f"{self.path}: {name} has no scale or shape beside it; the file is incomplete."
                    )
                if f"{dense}_g_idx" in names:
                    raise CheckpointError(
                        f"{self.path}: {dense}_g_idx gives the columns an order at run time, which is not supported. "
                        "Quantize the original with a static order."
                    )
                found[dense] = parts
        return found

    def decode(self, name: str, stored: dict[str, Tensor]) -> QTensor:
        """Return the quantized weight `name` from its stored tensors."""
        args = self._args(name.removesuffix(".weight"))
        bits, symmetric, strategy = int(args["num_bits"]), bool(args["symmetric"]), str(args["strategy"])
        self._check_version(bits)
        num_rows, num_columns = (int(n) for n in stored[f"{name}_shape"])
        number_format = IntegerFormat(bits=bits, symmetric=symmetric)
        group_size = args.get("group_size") if strategy == "group" else None
        granularity = Granularity(kind=cast(Any, strategy), group_size=group_size)
        codes = unpack(stored[f"{name}_packed"], bits, num_columns)
        offset = 1 << (bits - 1) if symmetric else 0
        scale = stored[f"{name}_scale"]
        zero_point = None
        if not symmetric:
            zero_point = _decode_zero_point(stored[f"{name}_zero_point"], bits, granularity, num_rows)
        grid = Grid(
            format=number_format,
            granularity=granularity,
            in_features=num_columns,
            scale=scale.reshape(1, 1) if strategy == "tensor" else scale,
            zero_point=zero_point,
        )
        return QTensor(codes=(codes.to(torch.int16) - offset).to(number_format.code_dtype), grid=grid)

    def _args(self, module: str) -> dict[str, Any]:
        exact = [args for targets, args in self.groups if module in targets]
        broad = [args for targets, args in self.groups if any(_matches(target, module) for target in targets)]
        for args in exact + broad:
            return args
        raise CheckpointError(f"{self.path}: no config group of quantization_config covers {module}.")

    def _check_version(self, bits: int) -> None:
        numbers = [int(n) for n in re.findall(r"\d+", self.version)[:2]]
        if bits not in WIDTHS_PACKED_ALIKE_BEFORE_0_17 and numbers < [0, 17]:
            raise CheckpointError(
                f"{self.path}: {bits}-bit weights packed by compressed-tensors {self.version} use an older layout. "
                "Save the model again with version 0.17 or newer."
            )


def _weight_args(entry: dict[str, Any]) -> dict[str, Any]:
    args = dict(entry["weights"])
    return {**args, **{key: args[key] for key in ("num_bits", "symmetric", "strategy")}}


def _encode_zero_point(zero_point: Tensor, bits: int, granularity: Granularity) -> Tensor:
    if granularity.kind == "tensor":
        return (zero_point.reshape(1) - (1 << (bits - 1))).to(torch.int8)
    return pack(zero_point.to(torch.int32).T.contiguous(), bits).T.contiguous()


def _decode_zero_point(stored: Tensor, bits: int, granularity: Granularity, num_rows: int) -> Tensor:
    """Return the zero points [R, G] int32 as they count here, from 0."""
    if granularity.kind == "tensor":
        return stored.to(torch.int32).reshape(1, 1) + (1 << (bits - 1))
    return unpack(stored.T.contiguous(), bits, num_rows).T.contiguous().to(torch.int32)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == "Linear"
