"""A quantized checkpoint that may be damaged: read tensor by tensor, with the original's weights where it has none.

The usual reader refuses a checkpoint with a missing tensor or a scale that is NaN, as it should. A check-up must go on:
what cannot be read is noted, and the original stands in for it, so that the rest can still be run and judged.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bitwright.checkup.findings import Finding, Kind
from bitwright.errors import BitwrightError, CheckpointError
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.layouts import bitsandbytes, own
from bitwright.model.layouts.stored import CT_PARTS, CtQuantization, OwnQuantization, from_config, module_of
from bitwright.numerics.inputs import QuantizedSite

QUANTIZATION = "quantization_config"
E8M0_NAN = 255
COPY_AGAIN = "Quantize or download this model again; the file lost data when it was written or edited."


class DamagedCheckpoint(Checkpoint):
    """A quantized checkpoint of which some weights may be missing or unreadable.

    Args:
        path: the model directory.
        config: its configuration, with `quantization_config`.
        original: gives the weights that this one does not.
        replaced: dense names of weights to take from the original although they can be read.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], original: Checkpoint, *, replaced: Iterable[str] = ()
    ) -> None:
        super().__init__(path, {key: value for key, value in config.items() if key != QUANTIZATION})
        self.config = config
        self._original = original
        quantization = from_config(config[QUANTIZATION], path)
        self._quantization = quantization
        if isinstance(quantization, CtQuantization):
            quantization.refuse_activation_order(self.stored)
        self.problems: dict[str, str] = {}
        for module in _packed_modules(quantization, self.stored):
            try:
                self._parts |= _parts_of(quantization, module, self.stored)
            except BitwrightError as error:
                self.problems[f"{module}.weight"] = str(error)
        components = {part for parts in self._parts.values() for part in parts}
        broken = {module_of(name) for name in self.problems}
        plain = [name for name in self.stored if name not in components and name.rpartition(".")[0] not in broken]
        self.held = sorted({*plain, *self._parts})
        self.stand_ins: set[str] = {*self.problems, *replaced} | (set(original.names) - set(self.held))
        self.stand_ins &= set(original.names)
        self.reshaped = self._other_shapes()
        self.stand_ins |= self.reshaped.keys()
        self.names = sorted({*self.held, *self.stand_ins})

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base class, or of the original."""
        return self._original.shape(name) if name in self.stand_ins else super().shape(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As the base class, or of the original."""
        wanted = list(names)
        tensors = super().read([name for name in wanted if name not in self.stand_ins])
        return tensors | self._original.read([name for name in wanted if name in self.stand_ins])

    def _other_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors that have another one than the original's."""
        found: dict[str, tuple[int, ...]] = {}
        for name in set(self.held) & set(self._original.names) - self.stand_ins:
            try:
                shape = super().shape(name)
            except (BitwrightError, KeyError, ValueError) as error:
                self.problems[name] = f"its shape cannot be read ({error})"
                self.stand_ins.add(name)
                continue
            if shape != self._original.shape(name):
                found[name] = shape
        return found

    def packed_names(self) -> list[str]:
        """Dense names of the quantized weights that are read from here."""
        return sorted(set(self._parts) - self.stand_ins)

    def all_packed_names(self) -> list[str]:
        """Dense names of all weights that are stored as codes, readable or not."""
        return sorted({*self._parts, *self.problems})

    def parts(self, name: str) -> dict[str, Tensor]:
        """What is stored of a weight, by the names inside its module."""
        module = module_of(name)
        places = (module, name, f"{name}.quant_state")  # the last two are bitsandbytes'
        stored = [each for each in self.stored if each.rpartition(".")[0] in places]
        return {each.rpartition(".")[2]: tensor for each, tensor in self.read_stored(stored).items()}

    def with_originals(self, names: Iterable[str]) -> "DamagedCheckpoint":
        """Return this checkpoint with some more weights of the original."""
        replaced = {*self.stand_ins, *names}
        return DamagedCheckpoint(self.path, self.config, self._original, replaced=replaced)


def open_damaged(path: str | Path, original: Checkpoint) -> DamagedCheckpoint:
    """Open a quantized model directory for a check-up.

    Raises:
        CheckpointError: no such directory, no readable configuration or weight file, a layout that is not supported,
            or a model that is not quantized.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        folder = open_checkpoint(path).path
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not readable as JSON ({error}).") from None
    if not isinstance(config, dict) or not isinstance(config.get(QUANTIZATION), dict):
        raise CheckpointError(
            f"{path}: config.json has no {QUANTIZATION}; the model is not quantized. Nothing to check."
        )
    return DamagedCheckpoint(folder, cast(dict[str, Any], config), original)


def decode_site(checkpoint: DamagedCheckpoint, name: str) -> QuantizedSite | Finding:
    """Decode a weight; a finding where that fails, after which the original stands in for it."""
    site = module_of(name)
    if name in checkpoint.problems:
        return _unreadable(site, checkpoint.problems[name])
    if name in checkpoint.reshaped:
        return wrong_shape(site, checkpoint.reshaped[name], checkpoint.shape(name))
    found = _bad_scale(site, checkpoint.parts(name))
    if found is None:
        try:
            decoded = checkpoint.read_packed(name)
            found = not_finite(name, decoded.coded())
            if found is None:
                return decoded
        except (BitwrightError, KeyError, ValueError, RuntimeError) as error:
            found = _unreadable(site, str(error))
    checkpoint.stand_ins.add(name)
    return found


def missing_finding(name: str) -> Finding:
    """A tensor of the original of which nothing is stored."""
    is_weight = name.endswith(".weight")
    return Finding(
        severity="error",
        kind="missing-site" if is_weight else "missing-tensor",
        site=module_of(name),
        what=f"{name} is not in the checkpoint, neither as codes nor as floats.",
        evidence="0 of its tensors are stored",
        remedy=COPY_AGAIN,
        explained=1.0,
    )


def wrong_shape(site: str, found: tuple[int, ...], expected: tuple[int, ...]) -> Finding:
    """A tensor whose shape is that of the original's transpose, or any other."""
    is_turned = found == expected[::-1]
    return Finding(
        severity="error",
        kind="transposed" if is_turned else "wrong-shape",
        site=site,
        what="The weight was stored transposed." if is_turned else f"{site} has another shape than in the original.",
        evidence=f"{list(found)} is stored, the original has {list(expected)}",
        remedy="Codes are stored as [out, in]. Check that both models are versions of one, and that no rows were "
        "padded or fused; then quantize the original's weight again.",
        explained=1.0,
    )


def not_finite(name: str, tensor: Tensor) -> Finding | None:
    """A plain tensor with NaN or Inf."""
    if not tensor.is_floating_point():
        return None
    bad = int((~torch.isfinite(tensor.float())).sum())
    if not bad:
        return None
    return Finding(
        severity="error",
        kind="not-finite",
        site=module_of(name),
        what=f"{name} holds NaN or Inf.",
        evidence=f"{bad} of {tensor.numel()} values",
        remedy=COPY_AGAIN,
        explained=1.0,
    )


def is_covered(config: Mapping[str, Any], module: str) -> bool:
    """Whether a configuration says that a module is quantized."""
    quantization = cast(dict[str, Any], config[QUANTIZATION])
    if "schemes" in quantization:
        return any(module in modules for modules in quantization["schemes"].values())
    if quantization.get("quant_method") == bitsandbytes.NAME:
        skipped = quantization.get("llm_int8_skip_modules") or ()
        return not any(module.endswith(name) or module.startswith(f"{name}.") for name in map(str, skipped))

    def matches(pattern: str) -> bool:
        if pattern.startswith("re:"):
            return re.match(pattern[3:], module) is not None
        return module == pattern or module.endswith("." + pattern)

    if any(matches(str(pattern)) for pattern in quantization.get("ignore") or ()):
        return False
    groups = cast(dict[str, Any], quantization.get("config_groups") or {})
    targets = [str(target) for group in groups.values() for target in group.get("targets") or ()]
    return any(target == "Linear" or matches(target) for target in targets)


def _packed_modules(quantization: Any, stored: Iterable[str]) -> list[str]:
    """Modules that hold some part of codes, and not only a float weight or nothing."""
    if isinstance(quantization, bitsandbytes.BnbQuantization):
        return sorted({module_of(dense) for name in stored if (dense := bitsandbytes.dense_name(name))})
    parts = [name.rpartition(".") for name in stored]
    if isinstance(quantization, OwnQuantization):
        coded = {module for module, _, leaf in parts if own.is_part(leaf) and leaf != own.GUARD}
        return sorted(coded & quantization.schemes.keys())
    leaves = set(CT_PARTS) - {"weight"}
    return sorted({module for module, _, leaf in parts if leaf in leaves})


def _parts_of(quantization: Any, module: str, stored: Iterable[str]) -> dict[str, list[str]]:
    """The stored tensors of one module's weight.

    Raises:
        CheckpointError: one is missing.
    """
    if isinstance(quantization, bitsandbytes.BnbQuantization):
        return quantization.weights(name for name in stored if name.startswith(f"{module}.weight"))
    names = [name for name in stored if name.rpartition(".")[0] == module]
    if isinstance(quantization, OwnQuantization):
        return replace(quantization, schemes={module: quantization.schemes[module]}).weights(names)
    parts = cast(CtQuantization, quantization).weights(names)
    if not parts:
        raise CheckpointError(f"{module}: no weight_scale beside {', '.join(sorted(names))}; the file is incomplete.")
    return parts


def _unreadable(site: str, reason: str) -> Finding:
    incomplete = "missing" in reason or "incomplete" in reason
    return Finding(
        severity="error",
        kind="missing-tensor" if incomplete else "unreadable",
        site=site,
        what=f"The codes of {site} cannot be read.",
        evidence=reason,
        remedy=COPY_AGAIN,
        explained=1.0,
    )


def _bad_scale(site: str, parts: Mapping[str, Tensor]) -> Finding | None:
    """NaN, Inf or 0 where scales, tables or float zero points are."""
    for leaf in sorted(parts.keys() - {"weight", "weight_codes", "weight_packed"}):
        tensor = parts[leaf]
        is_scale = leaf.startswith(("weight_scale", "weight_global_scale", "input_scale"))
        is_power = is_scale and tensor.dtype == torch.uint8 and "weight_nested_absmax" not in parts
        values = tensor.float()
        if is_power:
            values = values.masked_fill(tensor == E8M0_NAN, math.nan)
        bad = int((~torch.isfinite(values)).sum())
        zeros = int((values == 0).sum()) if is_scale and tensor.is_floating_point() else 0
        if bad or zeros:
            return _scale_finding(site, leaf, bad, zeros, tensor.numel())
    return None


def _scale_finding(site: str, leaf: str, bad: int, zeros: int, total: int) -> Finding:
    kind: Kind = "nan-scale" if bad else "zero-scale"
    what = "NaN or Inf" if bad else "0"
    return Finding(
        severity="error",
        kind=kind,
        site=site,
        what=f"{site}.{leaf} holds {what}: every output of its rows is lost." if bad else f"{site}.{leaf} holds 0.",
        evidence=f"{bad or zeros} of {total} values",
        remedy="Quantize the original's weight again: a scale is the range of finite weights over the largest code, "
        "and never 0.",
        explained=1.0,
    )
