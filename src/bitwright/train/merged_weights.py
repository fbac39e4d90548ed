"""Weights with adapters in them: summed in float32, and rounded once to what the unquantized checkpoint stores.

Adapters are added either to what they were trained on, where a packed base is decoded, or to the original's weights.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from bitwright.errors import CheckpointError, RecipeError
from bitwright.model.sites import modules_of
from bitwright.model.skeleton import Skeleton
from bitwright.model.stream import StreamedModel
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.inputs import QuantizedSite
from bitwright.train.group_adapter import GroupLoraLinear
from bitwright.train.lora import adapters_of


@torch.no_grad()
def onto_base(model: nn.Module, original: StreamedModel) -> dict[str, Tensor]:
    """Return every parameter of a model in memory, packed ones decoded, with its adapters in them.

    Args:
        model: with adapters; unchanged.
        original: the unquantized model, or the packed base itself, which says what is stored and how.
    Raises:
        CheckpointError: an adapted weight is tied to another.
        RecipeError: a packed layer corrects its outputs.
    """
    adapters, values = adapters_of(model), dict[str, Tensor]()
    _check_places(adapters, original.skeleton)
    for path, module in modules_of(model).items():
        if path in adapters:
            continue
        name = path.removesuffix(".base")
        adapter = adapters.get(name)
        for leaf, parameter in module.named_parameters(recurse=False):
            values[f"{name}.{leaf}".removeprefix(".")] = parameter.detach()
        if isinstance(module, QuantizedLinear):
            weight = _dense(name, adapter.fold() if isinstance(adapter, GroupLoraLinear) else module.site())
        elif adapter is not None:
            weight = cast(Tensor, module.weight).float()
        else:
            continue
        if adapter is not None and not isinstance(adapter, GroupLoraLinear):  # folded ones are in the weight
            weight = weight + adapter.as_stored(adapter.delta().float())
        values[f"{name}.weight"] = weight.to("cpu", original.skeleton.stored_dtype(f"{name}.weight"))
    return values


@torch.no_grad()
def onto_original(model: nn.Module, original: StreamedModel) -> dict[str, Tensor]:
    """Return the adapted weights: those of the original, with what the adapters of the model in memory add.

    Args:
        model: with adapters; unchanged.
        original: the unquantized model, opened in float32.
    Raises:
        CheckpointError: an adapted weight is tied to another.
    """
    left, values = adapters_of(model), dict[str, Tensor]()
    _check_places(left, original.skeleton)
    places = [(f"{name}.", original.block(index)) for index, name in enumerate(original.block_names)]
    for prefix, held in [*places, ("", original.outside())]:
        with held:
            for name in [each for each in left if each.startswith(prefix)]:
                adapter, parameter = left.pop(name), f"{name}.weight"
                delta = adapter.as_stored(adapter.delta().float()).cpu()
                weight = original.skeleton.model.get_parameter(parameter) + delta
                values[parameter] = weight.to(original.skeleton.stored_dtype(parameter))
    return values


def _dense(name: str, site: QuantizedSite) -> Tensor:
    if site.correction is not None:
        raise RecipeError(
            f"{name}: its base corrects outputs, for which a dense weight has no place. Merge --into original."
        )
    return site.dense(torch.float32)


def _check_places(adapted: Iterable[str], skeleton: Skeleton) -> None:
    for name in adapted:
        if f"{name}.weight" not in skeleton.sources:
            raise CheckpointError(
                f"{name}: its weight is another layer's too (tied), which would change with it. Leave its adapter "
                "out, or untie the model."
            )
