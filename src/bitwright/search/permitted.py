"""Which schemes each site may have: what the recipe keeps or fixes has no choice, nor what no layout holds."""

from collections.abc import Mapping, Sequence

import torch

from bitwright.errors import RecipeError
from bitwright.exporters.layout_choice import refuse_transposed
from bitwright.model.layouts.compressed_tensors import PACKED, layout_of
from bitwright.model.sites import Site
from bitwright.recipe import Recipe, matches, rule_of
from bitwright.schemes import Scheme


def permitted(
    sites: Sequence[Site], menu: Sequence[str], recipe: Recipe, min_bits: Mapping[str, int], dtype: torch.dtype
) -> dict[str, tuple[str | None, ...]]:
    """Return the choices of each site; None is 16 bit.

    Args:
        sites: of a model, those that can be quantized.
        menu: what is offered.
        recipe: its ignore patterns and rules are kept.
        min_bits: site pattern -> the fewest bits of a code.
        dtype: the model's.
    Raises:
        RecipeError: a pattern of `min_bits` matches no site.
        ShapeError: a site with a choice is stored as no layout holds it.
    """
    for pattern in min_bits:
        if not any(matches(pattern, site.name) for site in sites):
            raise RecipeError(f"--min-bits {pattern}: matches no site that can be quantized.")
    has_stacks = any(site.index is not None for site in sites)
    found: dict[str, tuple[str | None, ...]] = {}
    for site in sites:
        least = max((bits for pattern, bits in min_bits.items() if matches(pattern, site.name)), default=0)
        rule = rule_of(recipe, site.name)
        if any(matches(pattern, site.name) for pattern in recipe.ignore):
            found[site.name] = (None,)
        elif rule is not None:
            found[site.name] = (None if rule.scheme is None else str(rule.scheme),)
        else:
            kept = [name for name in menu if Scheme.parse(name).weights.format.bits >= least]
            if has_stacks:
                kept = [name for name in kept if _loads_beside_stacks(Scheme.parse(name), site, dtype)]
            found[site.name] = (*kept, None)
    refuse_transposed(site for site in sites if found[site.name] != (None,))
    return found


def _loads_beside_stacks(scheme: Scheme, site: Site, dtype: torch.dtype) -> bool:
    """Experts in one 3-D parameter need compressed-tensors, and there several schemes must be symmetric."""
    held = layout_of(scheme, site.in_features, dtype)
    if site.index is not None and (held != PACKED or scheme.activations is not None):
        return False
    return held is not None and scheme.weights.format.symmetric
