"""Which layout a run's model is written in, decided before any work.

compressed-tensors, where it holds every site, since transformers and vLLM read it without us; otherwise bitwright's
own, for the whole model. A model has one quantization method.
"""

from collections.abc import Mapping, Sequence

from bitwright.errors import RecipeError, ShapeError
from bitwright.model.layouts import own
from bitwright.model.layouts.compressed_tensors import layout_of
from bitwright.model.layouts.stored import COMPRESSED_TENSORS
from bitwright.model.sites import Site
from bitwright.recipe import Layout, SitePlan
from bitwright.schemes import Scheme

KEPT = "kept in 16 bit"


def choose_layouts(sites: Sequence[Site], plan: Mapping[str, SitePlan], asked: Layout) -> dict[str, str]:
    """Return the layout of every quantized site: names of compressed-tensors' layouts, or `bitwright` for all.

    Raises:
        ShapeError: transposed weights (GPT-2's Conv1D), which no layout holds.
        RecipeError: the layout asked for cannot hold a site, or transformers could not read it back.
    """
    quantized = {site: scheme for site in sites if (scheme := plan[site.name].effective) is not None}
    for site in quantized:
        if site.transposed:
            raise ShapeError(
                f"{site.name}: stored as [in, out] (Conv1D), which compressed-tensors cannot hold. "
                "Ignore it, or convert the model to Linear weights first."
            )
    chosen = {site.name: layout_of(scheme, site.in_features) for site, scheme in quantized.items()}
    problem = _ct_problem(sites, plan, quantized, chosen)
    if asked != own.NAME and problem is None:
        return {name: layout for name, layout in chosen.items() if layout is not None}
    own_problem = _own_problem(quantized)
    if asked == COMPRESSED_TENSORS or (own_problem is not None and problem is not None):
        raise RecipeError(problem or own_problem or "")
    if own_problem is not None:
        raise RecipeError(own_problem)
    return dict.fromkeys(chosen, own.NAME)


def carried_by(scheme: Scheme) -> tuple[str, ...]:
    """Names of the exports that hold a scheme, on rows that its groups divide."""
    size = scheme.weights.granularity.group_size or 1
    ct = layout_of(scheme, 4 * size)
    return (own.NAME,) if ct is None else (f"{COMPRESSED_TENSORS} ({ct})", own.NAME)


def _ct_problem(
    sites: Sequence[Site],
    plan: Mapping[str, SitePlan],
    quantized: Mapping[Site, Scheme],
    chosen: Mapping[str, str | None],
) -> str | None:
    """Why compressed-tensors cannot hold the plan, or transformers (5.23) not read it; None if all is well.

    Transformers reads the experts of a 3-D parameter by one symmetric scheme of weights alone, and other weights with
    zero points by one scheme.
    """
    experts = {_treatment(plan[site.name]) for site in sites if site.index is not None}
    if len(experts) > 1 or any(name == KEPT or "-asym" in name for name in experts):
        return (
            f"experts: {', '.join(sorted(experts))}. Transformers reads the experts of this model only if all are "
            "quantized by one symmetric scheme. Give them one, by a rule if the other sites have another."
        )
    for site, scheme in quantized.items():
        if chosen[site.name] is None:
            return (
                f"{site.name}: {scheme} with {site.in_features} columns cannot be held by compressed-tensors. "
                "Use layout bitwright, or a scheme that `bitwright formats` lists for compressed-tensors."
            )
        if site.index is not None and (scheme.activations is not None or chosen[site.name] != "pack-quantized"):
            return f"{site.name}: experts in one 3-D parameter can be W<bits>A16 only, not {scheme}."
    others = {str(scheme) for site, scheme in quantized.items() if site.index is None}
    if len(others) > 1 and any("-asym" in name for name in others):
        return (
            f"schemes {', '.join(sorted(others))}: transformers reads an asymmetric scheme only if all sites have it. "
            "Use symmetric ones, one scheme whose group size divides every row (or channel), or layout bitwright."
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


def _treatment(entry: SitePlan) -> str:
    return KEPT if entry.scheme is None else str(entry.effective)
