"""Which layers of a model an adapter can stand around: those that compute x Wᵀ with one matrix, dense or packed.

GPT-2's `Conv1D` is one of them, whose weight is stored [I, O]. Experts that are slices of one 3-D parameter are not: no
module computes their product alone. They stay frozen under a pattern for everything, and are refused under one that
means them.

Legend: O out features, I in features.
"""

from collections.abc import Iterable
from copy import copy
from typing import cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from bitwright.errors import RecipeError, did_you_mean
from bitwright.model.sites import Site, block_sites, find_blocks, modules_of
from bitwright.nn.linear import QuantizedLinear
from bitwright.recipe import matches

Layer = nn.Linear | QuantizedLinear | Conv1D
ALL_TARGETS = ("*",)
"""Every linear layer of the decoder blocks."""


def shape_of(layer: Layer) -> tuple[int, int]:
    """Return O and I."""
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
        return outputs, inputs
    return layer.out_features, layer.in_features


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Return every linear layer of the model that an adapter can stand around, by name."""
    # A subclass of Linear may compute something else.
    return {
        name: cast(Layer, module)
        for name, module in modules_of(model).items()
        if isinstance(module, QuantizedLinear) or type(module) in (nn.Linear, Conv1D)
    }


def block_layers(model: nn.Module) -> dict[str, Layer]:
    """Return those of the decoder blocks, without routers; experts in one 3-D parameter are no layers.

    Raises:
        StructureError: the model has no decoder blocks.
    """
    layers = linear_layers(model)
    return {site.name: layers[site.name] for site in _sites(model) if site.kind != "router" and site.name in layers}


def stacked_experts(model: nn.Module) -> list[str]:
    """Return the names of the experts of the decoder blocks that are slices of a 3-D parameter."""
    return [site.name for site in _sites(model) if site.index is not None]


def select(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the names of the block's linear layers that any of the patterns covers, in the model's order.

    Raises:
        RecipeError: a pattern covers none, or experts in one 3-D parameter, or there are no layers.
        StructureError: the model has no decoder blocks.
    """
    patterns, names, experts = list(targets), list(block_layers(model)), stacked_experts(model)
    if not names:
        raise RecipeError(
            f"lora: the decoder blocks of {type(model).__name__} hold their weights in other modules than linear "
            "layers, around which no adapter can stand. Use another model."
        )
    for pattern in patterns:
        meant = [each for each in experts if matches(pattern, each) or matches(pattern, each.partition("[")[0])]
        if meant and pattern not in ALL_TARGETS:
            raise RecipeError(
                f"lora: pattern '{pattern}' covers {meant[0]}, a slice of one 3-D parameter, around which no adapter "
                "can stand. Name the layers of attention, or leave --targets out: experts stay frozen then."
            )
        if not any(matches(pattern, name) for name in names):
            known = {f"*.{name.rpartition('.')[2]}" for name in names}
            raise RecipeError(
                f"lora: pattern '{pattern}' matches no linear layer of the decoder blocks."
                f"{did_you_mean(pattern, known)}"
            )
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def _sites(model: nn.Module) -> list[Site]:
    outline = _outline(model)
    return [site for block in find_blocks(outline)[1] for site in block_sites(outline.get_submodule(block), block)]


def _outline(module: nn.Module) -> nn.Module:
    """Return the tree of modules with dense layers, without weights, in the place of packed ones, as sites need it."""
    if isinstance(module, QuantizedLinear):
        return nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    outline = copy(module)
    children = {name: _outline(child) for name, child in module.named_children()}
    outline._modules = dict[str, nn.Module | None](children)  # pyright: ignore[reportPrivateUsage]
    return outline
