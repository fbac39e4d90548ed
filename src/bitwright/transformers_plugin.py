"""transformers loads and runs models in bitwright's own layout: importing this module registers how.

Before any weight is read, the linear layers that the configuration names are replaced by empty `QuantizedLinear`s,
whose buffers have the names, shapes and dtypes that the files' headers say. transformers fills and saves them like any
others. Nothing is converted: memory holds what the files hold.

`import bitwright` imports this module as soon as transformers' quantizers are there (see `hook`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitwright.errors import CheckpointError
from bitwright.model.checkpoint import TensorInfo, scan_headers
from bitwright.model.layouts import own
from bitwright.model.layouts.stored import OwnQuantization, module_of
from bitwright.nn.linear import QuantizedLinear
from bitwright.schemes import Scheme


@register_quantization_config(own.NAME)
class BitwrightConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model in bitwright's own layout.

    Args:
        schemes: a scheme's name -> the modules that have it, as the files call them.
        version: of the layout.
        quant_method: `bitwright`.
        unknown: what a later version may add.
    Raises:
        CheckpointError: something unknown.
    """

    def __init__(
        self, schemes: Mapping[str, Sequence[str]], version: int, quant_method: str = own.NAME, **unknown: Any
    ) -> None:
        if unknown:
            raise CheckpointError(
                f"quantization_config: unknown entry {sorted(unknown)[0]}. Update bitwright: pip install -U bitwright."
            )
        self.quant_method: Any = quant_method
        self.schemes, self.version = schemes, version


@register_quantizer(own.NAME)
class BitwrightQuantizer(HfQuantizer):
    """Puts packed layers into a model before its weights are read, and checks them afterwards."""

    requires_calibration = True  # so that a dense model with our configuration is refused, not quantized

    def update_attn_implementation(self, config: Any) -> Any:
        """Clear the message that stands in for the weight file's name, before transformers looks for that file."""
        config.transformers_weights = None
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """As `update_attn_implementation`, which transformers before 5.18 does not call."""
        return self.update_attn_implementation(config)

    def is_serializable(self) -> Any:
        """Yes: `save_pretrained` writes the packed tensors again."""
        return True

    @property
    def is_trainable(self) -> Any:
        """No: codes have no gradient."""
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        del kwargs
        where = model.config.name_or_path or type(model).__name__
        quantization = OwnQuantization.from_config(self.quantization_config.to_dict(), Path(where))
        if not checkpoint_files:
            raise CheckpointError(f"{where}: loads from files only. Give from_pretrained a directory or a hub id.")
        infos = scan_headers(Path(file) for file in checkpoint_files)
        weights = quantization.weights(infos)
        for dense, module in _modules(model, weights).items():
            parts = {name.rpartition(".")[2]: infos[name] for name in weights[dense]}
            model.set_submodule(module, _empty_layer(model, module, quantization.schemes[module_of(dense)], parts))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        if model._tp_size is not None:  # pyright: ignore[reportPrivateUsage]
            raise CheckpointError(
                f"{model.config.name_or_path}: packed weights cannot be split over devices by rows or columns. "
                "Load it without tp_plan; device_map places whole layers."
            )
        for name, layer in _packed_layers(model):
            _check_loaded(name, layer)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in _packed_layers(model):
            if any(tensor.is_meta for tensor in layer.stored().values()):
                raise CheckpointError(f"{name}: offloaded; a model is dequantized only as a whole. Load it without.")
            model.set_submodule(name, layer.dequantized(dtype))
        return model


def _modules(model: Any, weights: Iterable[str]) -> dict[str, str]:
    """Map dense weights, as the files call them, to the modules that hold them, by transformers' own renamings."""
    # Not at the top: transformers may be in the middle of importing these when it imports its quantizers.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state: dict[str, Tensor] = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, str] = {}
    for weight in weights:
        name, converter = rename_source_key(weight, renamings, converters, model.base_model_prefix, state)
        if name not in state:
            name, converter = rename_source_key(weight, [], [], model.base_model_prefix, state)
        if name not in state or converter is not None:
            raise CheckpointError(
                f"{weight}: {type(model).__name__} has no such layer. Load the model with the class that it was "
                "quantized with (AutoModelForCausalLM)."
            )
        found[weight] = module_of(name)
    return found


def _empty_layer(model: Any, name: str, scheme: Scheme, parts: Mapping[str, TensorInfo]) -> QuantizedLinear:
    """Return the layer for tensors of these shapes and dtypes, on the meta device."""
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:  # a subclass may compute something else
        raise CheckpointError(f"{name}: is a {type(linear).__name__}, not a Linear, and cannot hold packed weights.")
    own.check_stored(
        name, scheme, linear.out_features, linear.in_features, {n: (i.shape, i.dtype) for n, i in parts.items()}
    )
    stored = {part: torch.empty(info.shape, dtype=info.dtype, device="meta") for part, info in parts.items()}
    stored[own.GUARD] = own.guard(linear.weight.dtype).to("meta")  # model code asks layers for `weight.dtype`
    return QuantizedLinear(scheme, linear.out_features, linear.in_features, stored, linear.bias)


def _packed_layers(model: Any) -> list[tuple[str, QuantizedLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def _check_loaded(name: str, layer: QuantizedLinear) -> None:
    """Raises CheckpointError for a layer whose tensors are not those of the files."""
    stored = layer.stored()
    found = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in stored.items()}
    own.check_stored(name, layer.scheme, layer.out_features, layer.in_features, found)
    offloading: Any = getattr(layer, "_hf_hook", None)  # accelerate's, which moves tensors as a layer is called
    if offloading is None:
        unread = [part for part, tensor in stored.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if unread:
            raise CheckpointError(f"{name}.{unread[0]}: transformers did not read it from the files.")
        return
    # Moved tensors have lost the mark above. The shape tells whether they were read, and as what.
    shape: Tensor = offloading.weights_map["weight_shape"] if stored["weight_shape"].is_meta else stored["weight_shape"]
    if shape.dtype != torch.int64 or shape.tolist() != [layer.out_features, layer.in_features]:
        raise CheckpointError(
            f"{name}.weight_shape: reads as {shape.tolist()} in {shape.dtype}. Early versions of transformers read "
            "offloaded codes as floats. Update transformers, or load without offload_buffers."
        )
