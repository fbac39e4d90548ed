"""What a checkpoint's `quantization_config` says of its weights: which tensors make up each, and how to read them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.model.layouts import bitsandbytes, compressed_tensors, own
from bitwright.numerics.inputs import QuantizedSite
from bitwright.schemes import Scheme

COMPRESSED_TENSORS = "compressed-tensors"
CT_VERSION = "0.20.0"
OWN_VERSION = 1
CT_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
SAYS_SHAPE = ("weight_shape", *bitsandbytes.STATES)
"""Ends of the names of small tensors that say the shape of a weight."""
WIDTHS_PACKED_ALIKE_BEFORE_0_18 = (1, 2, 4, 8)


class StoredQuantization(Protocol):
    """How the quantized weights of one checkpoint are stored."""

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the inputs of some sites are quantized too."""
        ...

    def weights(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Map each quantized weight's dense name to the stored tensors that hold it."""
        ...

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return [O, I] of a weight from its parts' shapes and the values of those that say a shape."""
        ...

    def decode(self, name: str, stored: Mapping[str, Tensor]) -> QuantizedSite:
        """Return the site of the weight `name` from its parts, by their names inside the module."""
        ...


def from_config(config: Mapping[str, Any], path: Path) -> StoredQuantization:
    """Read a `quantization_config`.

    Raises:
        CheckpointError: another quantization method or layout.
    """
    method = config.get("quant_method")
    if method == own.NAME:
        return OwnQuantization.from_config(config, path)
    if method == bitsandbytes.NAME:
        return bitsandbytes.BnbQuantization.from_config(config, path)
    entries = cast(dict[str, dict[str, Any]], config.get("config_groups") or {})
    layouts = {str(entry.get("format") or config.get("format")) for entry in entries.values()}
    if method != COMPRESSED_TENSORS or not layouts or not layouts <= set(compressed_tensors.LAYOUTS):
        raise CheckpointError(
            f"{path}: the model is already quantized ({method}, {', '.join(sorted(layouts)) or config.get('format')}). "
            f"Only unquantized models, bitwright's own, bitsandbytes' 4-bit ones and compressed-tensors' "
            f"{', '.join(compressed_tensors.LAYOUTS)} can be read; give the original."
        )
    return CtQuantization.from_config(config, entries, path)


def module_of(weight: str) -> str:
    """The module that holds a weight."""
    return weight.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class CtQuantization:
    """A checkpoint in compressed-tensors' layouts.

    Attributes:
        groups: targets, layout and arguments of each config group.
        version: of the layout.
        path: for messages.
    """

    groups: tuple[tuple[tuple[str, ...], str, Mapping[str, Any]], ...]
    version: str
    path: Path

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], entries: Mapping[str, dict[str, Any]], path: Path
    ) -> "CtQuantization":
        """Raises CheckpointError where a group describes no weights."""
        groups: list[tuple[tuple[str, ...], str, Mapping[str, Any]]] = []
        for entry in entries.values():
            layout = str(entry.get("format") or config.get("format"))
            try:
                compressed_tensors.weight_scheme(entry["weights"], layout)
                compressed_tensors.input_scheme(entry.get("input_activations"))
                groups.append((tuple(entry["targets"]), layout, entry))
            except (KeyError, TypeError, ValueError, BitwrightError) as error:
                raise CheckpointError(
                    f"{path}: quantization_config has a config group that cannot be read ({error}). Obtain it again."
                ) from None
        return cls(groups=tuple(groups), version=str(config.get("version", "0")), path=path)

    @property
    def quantizes_inputs(self) -> bool:
        """Whether some group quantizes its inputs."""
        return any(entry.get("input_activations") is not None for _, _, entry in self.groups)

    def weights(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Every module with a `weight_scale` is quantized."""
        names = set(stored)
        self.refuse_activation_order(names)
        found: dict[str, list[str]] = {}
        for name in sorted(names):
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_packed" and f"{module}.weight_scale" not in names:
                raise CheckpointError(f"{self.path}: {name} has no scale beside it; the file is incomplete.")
            if leaf != "weight_scale":
                continue
            self._check_version(module)
            parts = [f"{module}.{part}" for part in CT_PARTS if f"{module}.{part}" in names]
            _, layout, entry = self._group(module)
            needed = compressed_tensors.needed_tensors(layout, entry)
            if missing := sorted(f"{module}.{part}" for part in needed if f"{module}.{part}" not in parts):
                raise CheckpointError(f"{self.path}: {missing[0]} is missing; the file is incomplete.")
            found[f"{module}.weight"] = parts
        return found

    def refuse_activation_order(self, stored: Iterable[str]) -> None:
        """Raise CheckpointError where columns have an order of their own: codes mean other weights without it."""
        ordered = sorted(name for name in stored if name.endswith(".weight_g_idx"))
        if ordered:
            raise CheckpointError(
                f"{self.path}: {ordered[0]} gives the columns an order at run time (activation order), which is not "
                "supported. Quantize the original with a static order."
            )

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """As the protocol says."""
        _, layout, entry = self._group(module_of(name))
        format = compressed_tensors.weight_scheme(entry["weights"], layout).format
        return compressed_tensors.stored_shape(layout, format, shapes, small)

    def decode(self, name: str, stored: Mapping[str, Tensor]) -> QuantizedSite:
        """As the protocol says."""
        _, layout, entry = self._group(module_of(name))
        return compressed_tensors.decode(layout, entry, stored)

    def _group(self, module: str) -> tuple[tuple[str, ...], str, Mapping[str, Any]]:
        exact = [group for group in self.groups if module in group[0]]
        broad = [group for group in self.groups if any(_matches(target, module) for target in group[0])]
        for group in exact + broad:
            return group
        raise CheckpointError(f"{self.path}: no config group of quantization_config covers {module}.")

    def _check_version(self, module: str) -> None:
        _, layout, entry = self._group(module)
        bits = int(entry["weights"]["num_bits"])
        numbers = [int(n) for n in re.findall(r"\d+", self.version)[:2]]
        is_packed = layout == compressed_tensors.PACKED and bits not in WIDTHS_PACKED_ALIKE_BEFORE_0_18
        if is_packed and numbers < [0, 18]:
            raise CheckpointError(
                f"{self.path}: {bits}-bit weights packed by compressed-tensors {self.version} use an older layout. "
                "Save the model again with version 0.18 or newer."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnQuantization:
    """A checkpoint in bitwright's own layout.

    Attributes:
        schemes: of each quantized module.
    """

    schemes: Mapping[str, Scheme]
    path: Path

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> "OwnQuantization":
        """Raises CheckpointError for a version or a scheme that this release does not know."""
        if config.get("version") != OWN_VERSION:
            raise CheckpointError(
                f"{path}: written in version {config.get('version')} of bitwright's layout; this release reads "
                f"{OWN_VERSION}. Update bitwright: pip install -U bitwright."
            )
        return cls(schemes=own_schemes(config, path), path=path)

    @property
    def quantizes_inputs(self) -> bool:
        """Whether some scheme quantizes its inputs."""
        return any(scheme.activations is not None for scheme in self.schemes.values())

    def weights(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """As the protocol says."""
        found: dict[str, list[str]] = {f"{module}.weight": [] for module in self.schemes}
        for name in sorted(stored):
            module, _, leaf = name.rpartition(".")
            if f"{module}.weight" in found and own.is_part(leaf):
                found[f"{module}.weight"].append(name)
        for module, scheme in self.schemes.items():
            needed = {f"{module}.{leaf}" for leaf in own.needed_tensors(scheme)}
            if missing := sorted(needed - set(found[f"{module}.weight"])):
                raise CheckpointError(f"{self.path}: {missing[0]} is missing; the file is incomplete.")
        return found

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """As the protocol says."""
        del name, shapes
        num_rows, in_features = (int(n) for n in small["weight_shape"])
        return num_rows, in_features

    def decode(self, name: str, stored: Mapping[str, Tensor]) -> QuantizedSite:
        """As the protocol says."""
        return own.decode(self.schemes[module_of(name)], stored)


def own_schemes(config: Mapping[str, Any], path: Path | str) -> dict[str, Scheme]:
    """Return the scheme of every quantized module of a configuration of bitwright's own."""
    schemes: dict[str, Scheme] = {}
    try:
        for name, modules in cast(Mapping[str, Sequence[str]], config["schemes"]).items():
            schemes |= dict.fromkeys(modules, Scheme.parse(name))
    except (KeyError, TypeError, AttributeError, BitwrightError) as error:
        raise CheckpointError(f"{path}: quantization_config cannot be read ({error}). Obtain it again.") from None
    return schemes


def own_config(modules: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the `quantization_config` of a directory in bitwright's own layout.

    Args:
        modules: scheme's name -> the modules that have it.
    """
    return {"quant_method": own.NAME, "version": OWN_VERSION, "schemes": {k: list(v) for k, v in modules.items()}}


def ct_config(groups: Sequence[tuple[Scheme, str, Sequence[str]]], ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a directory in compressed-tensors' layouts.

    Args:
        groups: scheme, layout and targets.
        ignore: Linear modules that are left alone.
    """
    layouts = {layout for _, layout, _ in groups}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "version": CT_VERSION,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": list(targets),
                **compressed_tensors.arguments(scheme, layout),
                "output_activations": None,
            }
            for i, (scheme, layout, targets) in enumerate(groups)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == "Linear"
