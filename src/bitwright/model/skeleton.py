"""A transformers model whose weights are absent until asked for: modules on the meta device, filled at will.

Checkpoint names become parameter names by transformers' own conversion rules, so that prefixes, renamed modules and
per-expert checkpoints of models with fused 3-D expert parameters load here exactly as `from_pretrained` loads them.
"""

import re
from copy import deepcopy
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from bitwright.errors import CheckpointError
from bitwright.model.checkpoint import Checkpoint

CONSTRUCTION_ERRORS = (
    ValueError, KeyError, ImportError, OSError, AttributeError, TypeError, RuntimeError, ArithmeticError
)  # fmt: skip
"""What transformers raises for a configuration it does not know or cannot follow."""


class Skeleton:
    """One model's modules without weights, and the mapping from stored tensors to its parameters.

    Attributes:
        model: the transformers model; parameters are on the meta device unless loaded.
        sources: parameter name -> stored names it is made of, in order.
        unused: stored names that this architecture does not use (rotary caches, extra prediction heads …).
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, trust_remote_code: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.device = torch.device(device)
        self.model = _empty_model(checkpoint, dtype, trust_remote_code)
        _materialise_buffers(self.model, self.device)
        self._map_names()

    def load(self, prefix: str) -> None:
        """Fill every parameter and persistent buffer under `prefix`, in the compute dtype and on the device."""
        for name in self._under(prefix):
            self._set(name, self._assemble(name))

    def load_outside(self, prefix: str) -> None:
        """Fill everything that does not start with `prefix`: embeddings, final norm, head."""
        inside = set(self._under(prefix))
        for name in self.sources:
            if name not in inside:
                self._set(name, self._assemble(name))
        self.model.tie_weights()

    def free(self, prefix: str) -> None:
        """Put every loaded tensor under `prefix` back on the meta device."""
        for name in self._under(prefix):
            self._set(name, None)

    def free_outside(self, prefix: str) -> None:
        """Put everything outside `prefix` back on the meta device."""
        inside = set(self._under(prefix))
        for name in self.sources:
            if name not in inside:
                self._set(name, None)
        self.model.tie_weights()

    def stored_names(self, prefix: str) -> list[str]:
        """The stored tensors that make up the parameters under `prefix`."""
        return sorted({stored for name in self._under(prefix) for stored in self.sources[name]})

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which the checkpoint stores a parameter, or its first part; packed, that of its values."""
        return self.checkpoint.dtype(self.sources[parameter][0])

    def stored_pieces(self, parameter: str) -> list[tuple[str, int | None, int, int]]:
        """Where the rows of a parameter lie in the checkpoint: (stored name, expert, first row, end row), in order.

        Raises:
            CheckpointError: the checkpoint stores the rows transposed or interleaved, or all experts in one tensor.
        """
        if not self._converters.get(parameter):
            stored, shape = self.sources[parameter][0], self.model.get_parameter(parameter).shape
            if len(shape) != 2:
                raise CheckpointError(
                    f"{stored}: holds all experts in one tensor, which compressed-tensors cannot; "
                    "this layout is not supported."
                )
            return [(stored, None, 0, shape[0])]
        return _trace_rows(self.model, parameter)

    def stored_tensors(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """Cut a parameter's value into the dense tensors that the checkpoint has of it, on the CPU, in their dtypes.

        Raises:
            CheckpointError: the checkpoint stores it in a way that cannot be traced; see `stored_pieces`.
        """
        sources, dtype = self.sources[parameter], self.checkpoint.dtype
        if len(sources) == 1 and self.checkpoint.shape(sources[0]) == tuple(value.shape):
            pieces = {sources[0]: value}
        else:
            pieces = {
                name: (value if expert is None else value[expert])[first:end]
                for name, expert, first, end in self.stored_pieces(parameter)
            }
        return {name: piece.to("cpu", dtype(name), copy=True).contiguous() for name, piece in pieces.items()}

    def tied_names(self) -> set[str]:
        """Parameters that share another's storage and need no tensor of their own."""
        return set(self.model.all_tied_weights_keys)

    def _under(self, prefix: str) -> list[str]:
        return [name for name in self.sources if name.startswith(prefix + ".")]

    def _map_names(self) -> None:
        state = self.model.state_dict()
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self.sources: dict[str, list[str]] = {}
        self.unused: list[str] = []
        self._converters: dict[str, list[tuple[str, str, WeightConverter]]] = {}
        for stored in sorted(self.checkpoint.names, key=_natural_key):
            target, pattern = rename_source_key(stored, renamings, converters, self.model.base_model_prefix, state)
            if target not in state:
                self.unused.append(stored)
                continue
            self.sources.setdefault(target, []).append(stored)
            if pattern is not None:
                self._converters.setdefault(target, []).append((stored, pattern, by_pattern[pattern]))
        self._adopt_converted_targets(state)
        missing = [name for name in state if name not in self.sources and name not in self.tied_names()]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.path}: {len(missing)} tensors of {type(self.model).__name__} missing, "
                f"first {missing[0]}. The checkpoint is incomplete or of another architecture."
            )
        for name in list(self.sources):
            if name in self.tied_names():
                self.unused.extend(self.sources.pop(name))
        for name, sources in self.sources.items():
            if name not in self._converters:
                self._check_shape(name, self.checkpoint.shape(sources[0]), tuple(state[name].shape))

    def _check_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has shape {found}, the configuration asks for {wanted}. "
                "The weights and config.json do not belong together."
            )

    def _adopt_converted_targets(self, state: dict[str, Any]) -> None:
        """A conversion with several targets is filed under the first; file the others as well."""
        for first, parts in list(self._converters.items()):
            rule = parts[0][2]
            for pattern in rule.target_patterns[1:]:
                other = first.replace(rule.target_patterns[0], pattern)
                if other in state:
                    self.sources[other], self._converters[other] = self.sources[first], parts

    def _assemble(self, name: str) -> Tensor:
        tensors = self.checkpoint.read(self.sources[name])
        parts = self._converters.get(name)
        if parts is None:
            return tensors[self.sources[name][0]]
        rule = deepcopy(parts[0][2])
        for stored, pattern, _ in parts:
            rule.add_tensor(name, stored, pattern, cast(Any, tensors.pop(stored)))
        made = cast(dict[str, Any], rule.convert(name, model=self.model, config=self.model.config))
        value = made[name]
        return value[0] if isinstance(value, list) else value

    def _set(self, name: str, value: Tensor | None) -> None:
        """Place a tensor in the module tree; None puts the parameter back on the meta device."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        old = cast(Tensor, getattr(module, leaf))
        if value is None:
            value = torch.empty(old.shape, dtype=old.dtype, device="meta")
        else:
            self._check_shape(name, tuple(value.shape), tuple(old.shape))
            value = value.to(self.device, self._dtype_of(name, old) if value.is_floating_point() else None)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value)

    def _dtype_of(self, name: str, parameter: Tensor) -> torch.dtype:
        """The parameter's own type, or the one transformers keeps it in (a router's correction bias is float32)."""
        plan = self.model._get_dtype_plan(self.dtype)  # pyright: ignore[reportPrivateUsage]
        for pattern, dtype in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return parameter.dtype


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, experts_implementation="eager"
            )
    except (*CONSTRUCTION_ERRORS, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{checkpoint.path}: transformers cannot build this model ({reason}).") from None
    return cast(PreTrainedModel, model.eval())


def _materialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies, masks) as transformers initialises them."""
    owners: set[str] = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, torch.empty_like(buffer, device="cpu"))
        owners.add(path)
    with torch.no_grad():
        for path in owners:
            model._init_weights(model.get_submodule(path))  # pyright: ignore[reportPrivateUsage]
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer.to(device))


def _trace_rows(model: PreTrainedModel, parameter: str) -> list[tuple[str, int | None, int, int]]:
    """Send row numbers through transformers' own reverse conversion and read where they come out."""
    shape = model.get_parameter(parameter).shape  # [E, O, I] or [O, I]
    rows_per_expert = shape[-2]
    numbers = torch.arange(shape[:-1].numel(), dtype=torch.float64).view(*shape[:-1], 1).expand(*shape[:-1], 2).clone()
    pieces: list[tuple[str, int | None, int, int]] = []
    for stored, rows in revert_weight_conversion(model, {parameter: numbers}).items():
        first = int(rows.flatten()[0])
        expected = torch.arange(first, first + rows.shape[0], dtype=torch.float64).unsqueeze(1).expand(-1, 2)
        if rows.ndim != 2 or not torch.equal(rows, expected):
            raise CheckpointError(
                f"{stored}: its rows are not contiguous rows of {parameter}; this layout is not supported."
            )
        expert, row = divmod(first, rows_per_expert)
        pieces.append((stored, expert if len(shape) == 3 else None, row, row + rows.shape[0]))
    return sorted(pieces, key=lambda piece: (piece[1] or 0, piece[2]))


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
