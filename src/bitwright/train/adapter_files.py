"""Adapters on disk, in the format of the package peft, which most tools read.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight [r, I], ...lora_B.weight [O, r]
    adapter_config.json         r, lora_alpha and what else decides the product; single layers may have others of both
    bitwright_adapter.json      what bitwright knows besides: which base the adapter was trained on. peft ignores it.

What a configuration asks for and bitwright does not compute (DoRA, trained biases, whole modules in place of adapters)
is refused, as is a key that bitwright does not know and that is not off. So are pickles, which run code when loaded.

Legend: O out features, I in features, r rank.

Reference: peft's checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bitwright.errors import CheckpointError, RecipeError
from bitwright.model.sites import modules_of
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.nn.linear import QuantizedLinear
from bitwright.records import write_json_atomic
from bitwright.train.lora import LoraConfig, LoraLinear, adapters_of, attach
from bitwright.train.target_layers import Conv1D, Layer, linear_layers, shape_of

CONFIG, TENSORS, FACTS = "adapter_config.json", "adapter_model.safetensors", "bitwright_adapter.json"
PICKLE = "adapter_model.bin"
ALL_LINEAR = "all-linear"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern",
    "target_modules", "use_rslora",
}  # fmt: skip
# These say where an adapter comes from, how it was initialised, or what the stored tensors tell better.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts that leave the base's weight as it is; others take a part out of it, which only peft can do again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFiles:
    """An adapter as it was read.

    Attributes:
        layers: by layer, A [r, I] and B [O, r].
        configs: by layer.
        base_hash: of the model that it was trained on, as `base_hash` computes it; None where nobody wrote it down.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    configs: Mapping[str, LoraConfig]
    base_hash: str | None


def save_adapters(model: nn.Module, folder: Path, *, base: str, base_hash: str | None = None) -> None:
    """Write the adapters of a model; each file appears whole, the configuration last.

    Args:
        model: with `LoraLinear` adapters.
        folder: made if missing; an adapter in it is replaced.
        base: path or hub id of the base, for whoever loads it.
        base_hash: what `base_hash(model)` gave; None to leave it out.
    Raises:
        RecipeError: the model has no adapters, some that fold into zero points, or some that scale differently.
        ResourceError: the folder cannot be written.
    """
    adapters = adapters_of(model)
    plain = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoraLinear)}
    if not plain or len(plain) != len(adapters):
        problem = "no adapters" if not adapters else "group adapters, which peft does not have: fold them"
        raise RecipeError(f"{folder}: cannot be written, since the model has {problem}.")
    config = _config(model, plain, base)
    tensors: dict[str, Tensor] = {}
    for name, adapter in plain.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.lora_a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.lora_b.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors_atomic(folder / TENSORS, tensors)
    write_json_atomic(folder / FACTS, {"version": 1, "base_hash": base_hash})
    write_json_atomic(folder / CONFIG, config)


def read_adapters(folder: Path) -> AdapterFiles:
    """Read an adapter that bitwright or peft wrote.

    Raises:
        CheckpointError: a file is missing or damaged, only pickled tensors are there, or it asks for something that
            bitwright does not compute.
    """
    config = _read_json(folder / CONFIG)
    _check_config(folder / CONFIG, config)
    file = folder / TENSORS
    if not file.is_file():
        if (folder / PICKLE).is_file():
            raise CheckpointError(
                f"{folder / PICKLE}: pickled tensors can run code when loaded and are refused. Load it with peft where "
                "you trust it, and save it again with safe_serialization=True."
            )
        raise CheckpointError(f"{folder}: no {TENSORS}. Give the directory of an adapter.")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a valid safetensors file ({error}). Obtain it again.") from None
    layers = _pairs(file, tensors)
    _check_targets(folder / CONFIG, config["target_modules"], layers)
    facts = _read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    configs = {name: _layer_config(folder / CONFIG, config, name) for name in layers}
    for name, (a, b) in layers.items():
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == configs[name].rank:
            raise CheckpointError(
                f"{file}: {name} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} says rank "
                f"{configs[name].rank}. The files do not belong together."
            )
    return AdapterFiles(layers=layers, configs=configs, base_hash=cast(str | None, facts.get("base_hash")))


def load_adapters(model: nn.Module, folder: Path, *, check_base: bool = True) -> dict[str, LoraLinear]:
    """Freeze a model and put the adapters of a directory around its layers; in place. Return them by layer.

    Args:
        model: the base, dense or packed, without adapters.
        folder: as `save_adapters` or peft wrote it.
        check_base: refuse a base with other weights than the adapter was trained on, where the directory says so. An
            adapter that was trained over a packed model and is to be used over the dense one needs False.
    Raises:
        CheckpointError: as `read_adapters`; a layer is missing in the model or has another shape; another base.
        RecipeError: the model has adapters.
    """
    files, known = read_adapters(folder), linear_layers(model)
    for name, (a, b) in files.layers.items():
        if name not in known:
            raise CheckpointError(f"{folder}: it adapts {name}, which is no linear layer of this model. Another base?")
        found = list(shape_of(known[name]))
        if found != [b.shape[0], a.shape[1]]:
            raise CheckpointError(
                f"{folder}: it adapts a weight {[b.shape[0], a.shape[1]]} at {name}, which is {found} in this model. "
                "Load the base that it was trained on."
            )
    if check_base and files.base_hash is not None and files.base_hash != base_hash(model):
        raise CheckpointError(
            f"{folder}: it was trained on other weights than this model has, or in another dtype. Load that base, or "
            "pass check_base=False if the difference is meant."
        )

    def build(name: str, base: Layer) -> LoraLinear:
        a, b = files.layers[name]
        adapter = LoraLinear(base, files.configs[name])  # float32 whatever the file has, as peft does it
        with torch.no_grad():
            adapter.lora_a.copy_(a)
            adapter.lora_b.copy_(b)
        return adapter

    return attach(model, files.layers, build)


def base_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all weights that are not an adapter's, packed ones as they are stored; reads everything."""
    digest = hashlib.sha256()
    adapters = adapters_of(model)
    for name, module in modules_of(model).items():
        if name in adapters:
            continue
        held = dict(module.named_parameters(recurse=False))
        held |= module.stored() if isinstance(module, QuantizedLinear) else {}
        layer = name.removesuffix(".base") if name.removesuffix(".base") in adapters else name
        for leaf, tensor in sorted(held.items()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{layer}.{leaf} {plain.dtype} {list(plain.shape)}".encode())
            digest.update(cast(Any, plain.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _config(model: nn.Module, adapters: Mapping[str, LoraLinear], base: str) -> dict[str, Any]:
    """What peft needs to build the same adapters; the commonest rank and alpha are the rule, others the exception."""
    configs = {name: adapter.config for name, adapter in adapters.items()}
    if len({(config.rslora, config.dropout) for config in configs.values()}) > 1:
        raise RecipeError(
            "adapter files: peft has one use_rslora and one lora_dropout for all layers. Make them alike."
        )
    rank = Counter(config.rank for config in configs.values()).most_common(1)[0][0]
    alpha = Counter(config.alpha for config in configs.values()).most_common(1)[0][0]
    first = next(iter(configs.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "fan_in_fan_out": any(isinstance(adapter.base, Conv1D) for adapter in adapters.values()),
        "target_modules": _targets(model, list(adapters)),
        "rank_pattern": {_exactly(name): config.rank for name, config in configs.items() if config.rank != rank},
        "alpha_pattern": {_exactly(name): config.alpha for name, config in configs.items() if config.alpha != alpha},
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _targets(model: nn.Module, adapted: list[str]) -> list[str]:
    """Last parts of names, which every reader understands, where they say it all; full names where not."""
    endings = sorted({name.rpartition(".")[2] for name in adapted})
    says_more = any(name.rpartition(".")[2] in endings for name in linear_layers(model))
    return adapted if says_more else endings


def _exactly(name: str) -> str:
    """A key of peft's patterns, which are regular expressions for the end of a name."""
    return "^" + re.escape(name)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file. Give the directory of an adapter.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}). Obtain it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: not a JSON object. Obtain it again.")
    return cast(dict[str, Any], found)


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse whatever would make the product another one."""
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if key not in config:
            raise CheckpointError(f"{file}: has no {key}. Obtain it again.")
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"{file}: peft_type {config['peft_type']!r} is not LORA, the one that bitwright reads.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: trained biases (bias: {config['bias']!r}) are not supported. Use bias: none.")
    if config.get("modules_to_save"):
        names = ", ".join(cast(list[str], config["modules_to_save"]))
        raise CheckpointError(
            f"{file}: modules_to_save ({names}) are whole modules and no adapters; not supported. Merge with peft."
        )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: the adapter started as {config['init_lora_weights']!r}, which changes the base's weights. "
            "Convert it to a plain one with peft (path_initial_model_for_weight_conversion)."
        )
    for key, value in config.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, 0, "", {}, []):
            raise CheckpointError(f"{file}: {key}: {value!r} is not supported. Merge the adapter with peft.")


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{file}: {key} is no matrix of a LoRA adapter of linear layers; not supported.")
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"{file}: {name} has lora_{next(iter(pair))} alone. Obtain the file again.")
    if not found:
        raise CheckpointError(f"{file}: holds no tensors. Obtain the file again.")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _check_targets(file: Path, targets: object, layers: Mapping[str, object]) -> None:
    """Every tensor must be of the configuration: peft would leave out what its configuration does not name.

    The configuration may name more: modules that other architectures have, or that `exclude_modules` takes out again.
    """
    if targets == ALL_LINEAR:
        return
    listed = cast(list[str], targets) if isinstance(targets, list) else None
    if listed is None and not isinstance(targets, str):
        raise CheckpointError(f"{file}: target_modules {targets!r} must be a list or a regular expression.")
    for name in layers:
        if listed is None:
            is_target = re.fullmatch(cast(str, targets), name) is not None
        else:
            is_target = any(name == target or name.endswith(f".{target}") for target in listed)
        if not is_target:
            raise CheckpointError(f"{file}: target_modules does not cover {name}, whose tensors are stored beside it.")


def _layer_config(file: Path, config: Mapping[str, Any], name: str) -> LoraConfig:
    try:
        return LoraConfig(
            rank=int(_by_pattern(config.get("rank_pattern"), name, config["r"])),
            alpha=float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])),
            dropout=float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora")),
        )
    except (RecipeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{file}: {name}: {error}") from None


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: object) -> Any:
    """The entry of the first pattern that matches the end of a name, as peft finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise
