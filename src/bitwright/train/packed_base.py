"""A base that bitsandbytes packed: its layers become ours, so that adapters stand on the same 4-bit weights."""

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bitwright.errors import BitwrightError, CheckpointError, MissingDependency
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.layouts import bitsandbytes, own
from bitwright.model.layouts.stored import module_of, own_schemes
from bitwright.nn.linear import QuantizedLinear
from bitwright.schemes import Scheme


def is_from_bitsandbytes(model: Path) -> bool:
    """Whether a model directory is in bitsandbytes' layout.

    Raises:
        MissingDependency: it is, and transformers could not load it.
    """
    config = open_checkpoint(model).config
    if (config.get("quantization_config") or {}).get("quant_method") != bitsandbytes.NAME:
        return False
    if importlib.util.find_spec(bitsandbytes.NAME) is None:
        raise MissingDependency(f"{model}: packed by bitsandbytes, which loads it. pip install bitsandbytes.")
    return True


def packed_schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Return the scheme of every layer of a checkpoint that becomes a `QuantizedLinear`, by the name of its module."""
    config = checkpoint.config.get("quantization_config") or {}
    if config.get("quant_method") == own.NAME:
        return own_schemes(config, checkpoint.path)
    if config.get("quant_method") != bitsandbytes.NAME:
        return {}
    names = checkpoint.packed_names()
    return {module_of(name): bitsandbytes.scheme_of(checkpoint.read_packed(name)) for name in names}


def adopt_layers(model: nn.Module) -> None:
    """Put a `QuantizedLinear` of the same codes and scales into the place of every layer of bitsandbytes, in place.

    Weights are equal in every bit where the model computes in the dtype that bitsandbytes dequantizes to. In another
    they are not rounded to that dtype first, and inputs are not cast to `bnb_4bit_compute_dtype`.

    Raises:
        CheckpointError: a layer that cannot be decoded, as where blocks run across the ends of rows.
    """
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            model.set_submodule(name, _adopted(name, layer, cast(Any, model).dtype))
    # Transformers moves, casts and saves models of bitsandbytes in ways of their own; this one is none any more.
    cast(Any, model).hf_quantizer.remove_quantization_config(model)


def _adopted(name: str, layer: Any, dtype: torch.dtype) -> QuantizedLinear:
    state: dict[str, Any] = layer.weight.quant_state.as_dict(packed=True)
    parts = {key.rpartition(".")[2]: tensor for key, tensor in state.items()}
    try:
        site = bitsandbytes.decode({key: t.cpu() for key, t in {**parts, "weight": layer.weight.data}.items()})
    except BitwrightError as error:
        raise CheckpointError(f"{name}: {error}") from None
    stored = {own.GUARD: own.guard(dtype), **own.encode(site)}
    bias = None if layer.bias is None else layer.bias.detach()
    num_rows, in_features = site.weight.shape
    return QuantizedLinear(bitsandbytes.scheme_of(site), num_rows, in_features, stored, bias).to(layer.weight.device)
