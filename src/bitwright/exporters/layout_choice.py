"""Which layout a run's model is written in, decided before any work.

compressed-tensors, where it holds every site, since transformers and vLLM read it without us; otherwise bitwright's
own, for the whole model. A model has one quantization method.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from bitwright.errors import RecipeError, ShapeError
from bitwright.model.layouts import own
from bitwright.model.layouts.compressed_tensors import PACKED, layout_of
from bitwright.model.layouts.stored import COMPRESSED_TENSORS
from bitwright.model.sites import Site
from bitwright.recipe import Layout, SitePlan
from bitwright.schemes import Scheme

KEPT = "kept in 16 bit"


def choose_layouts(
    sites: Sequence[Site],
    plan: Mapping[str, SitePlan],
    asked: Layout,
    *,
    dtype: torch.dtype,
    stored: Mapping[str, torch.dtype],
) -> dict[str, str]:
    """Return the layout of every quantized site: names of compressed-tensors' layouts, or `bitwright` for all.

    Args:
        sites: of the model.
        plan: what becomes of each.
        asked: as in the recipe.
        dtype: the model's, as its configuration says.
        stored: of the weight of each site in the checkpoint, which its scales have too.
    Raises:
        ShapeError: transposed weights (GPT-2's Conv1D, experts of gpt-oss), which no layout holds.
        RecipeError: the layout asked for cannot hold a site, or transformers could not read it back.
    """
    quantized = {site: scheme for site in sites if (scheme := plan[site.name].effective) is not None}
    refuse_transposed(quantized)
    chosen = {site.name: layout_of(scheme, site.in_features, dtype) for site, scheme in quantized.items()}
    problem = _ct_problem(sites, plan, quantized, chosen, dtype) or _dtype_problem(quantized, dtype, stored)
    if asked != own.NAME and problem is None:
        return {name: layout for name, layout in chosen.items() if layout is not None}
    own_problem = _own_problem(quantized)
    if asked == COMPRESSED_TENSORS or (own_problem is not None and problem is not None):
        raise RecipeError(problem or own_problem or "")
    if own_problem is not None:
        raise RecipeError(own_problem)
    return dict.fromkeys(chosen, own.NAME)


def refuse_transposed(quantized: Iterable[Site]) -> None:
    """Raises ShapeError for a site that no layout holds."""
    for site in quantized:
        if site.transposed:
            raise ShapeError(
                f"{site.name}: stored as [in, out] (GPT-2's Conv1D, experts of gpt-oss), which no layout holds. "
                "Ignore it, or convert the model to Linear weights first."
            )


def carried_by(scheme: Scheme) -> tuple[str, ...]:
    """Names of the exports that hold a scheme in a bfloat16 model, on rows that its groups divide."""
    sizes = [scheme.weights.granularity.group_size or 1]
    if scheme.activations is not None:
        sizes.append(scheme.activations.granularity.group_size or 1)
    layout = layout_of(scheme, math.lcm(*sizes), torch.bfloat16)
    return (own.NAME,) if layout is None else (f"{COMPRESSED_TENSORS} ({layout})", own.NAME)


def _ct_problem(
    sites: Sequence[Site],
    plan: Mapping[str, SitePlan],
    quantized: Mapping[Site, Scheme],
    chosen: Mapping[str, str | None],
    dtype: torch.dtype,
) -> str | None:
    """Why compressed-tensors cannot hold the plan, or transformers (5.23) not read it; None if all is well.

    Transformers reads the experts of a 3-D parameter by one symmetric scheme of weights alone, and other weights with
    packed zero points by one scheme.
    """
    experts = {plan[site.name].effective for site in sites if site.index is not None}
    if len(experts) > 1 or any(scheme is None or _has_zero_point(scheme) for scheme in experts):
        names = ", ".join(sorted(KEPT if scheme is None else str(scheme) for scheme in experts))
        return (
            f"experts: {names}. Transformers reads the experts of this model only if all are quantized by one "
            "symmetric scheme. Give them one, by a rule if the other sites have another."
        )
    for site, scheme in quantized.items():
        if site.index is not None and (scheme.activations is not None or chosen[site.name] != PACKED):
            return (
                f"{site.name}: experts in one 3-D parameter can be W<bits>A16 only. Give them such a scheme by a "
                "rule, or ignore them."
            )
    for site, scheme in quantized.items():
        if chosen[site.name] is None:
            return (
                f"{site.name}: {scheme} with {site.in_features} columns, in a {_name(dtype)} model, cannot be held by "
                "compressed-tensors. Use layout bitwright, or a scheme that `bitwright formats` lists for it."
            )
    others = {scheme for site, scheme in quantized.items() if site.index is None}
    packed = {scheme for site, scheme in quantized.items() if site.index is None and chosen[site.name] == PACKED}
    if len(others) > 1 and any(_has_zero_point(scheme) for scheme in packed):
        return (
            f"schemes {', '.join(sorted(map(str, others)))}: transformers reads an asymmetric scheme only if all sites "
            "have it. Use symmetric ones, one scheme whose group size divides every row (or channel), or layout "
            "bitwright."
        )
    return None


def _dtype_problem(
    quantized: Mapping[Site, Scheme], dtype: torch.dtype, stored: Mapping[str, torch.dtype]
) -> str | None:
    """Readers round every scale to the model's dtype, which changes scales of another."""
    for site in quantized:
        if stored[site.name] != dtype:
            return (
                f"{site.name}: stored in {_name(stored[site.name])} in a {_name(dtype)} model, to which transformers "
                "rounds the scales. Use layout bitwright, or save the model in one dtype first."
            )
    return None


def _own_problem(quantized: Mapping[Site, Scheme]) -> str | None:
    for site, scheme in quantized.items():
        if site.index is not None:
            return (
                f"{site.name}: experts in one 3-D parameter cannot be {scheme}, which only bitwright's own layout "
                "holds. Give the experts a W<bits>A16 scheme and the other sites one that compressed-tensors holds."
            )
    return None


def _has_zero_point(scheme: Scheme) -> bool:
    return not scheme.weights.format.symmetric


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
