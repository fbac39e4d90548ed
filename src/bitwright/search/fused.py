"""Sites that an engine runs as one product, and so must share a scheme.

vLLM joins the projections that read one input: q, k and v become `qkv_proj`, gate and up become `gate_up_proj`, and all
projections of all experts of a layer become one kernel (`packed_modules_mapping`, `FusedMoE`). Its compressed-tensors
loader refuses a model whose parts differ ("requires all to use the same scheme", "All MoE projections need to have same
quantization scheme"). It also looks up a joined product by its class before its parts by their names, so that a config
group for `Linear` takes it away from a group that names the parts.

Two views of the same rule. Before a run, the sets come from the structure: sites of one group read one input. Of a
finished export, the check reads what the engine reads: the config groups, targets and ignored modules.

Reference:
    vLLM, model_executor/layers/quantization/compressed_tensors: utils.should_ignore_layer, utils.find_matched_target,
    CompressedTensorsMoEMethod.get_moe_method. Differs: the class of every module is taken to be Linear.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from bitwright.model.sites import Site
from bitwright.model.structure import BlockStructure, ModelStructure
from bitwright.recipe import SitePlan
from bitwright.schemes import Scheme

PACKED_MODULES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's `packed_modules_mapping` of Llama, Mistral, Qwen, Gemma and their like."""
_EXPERT = re.compile(r"(?P<place>.*\.experts)\.\d+\.[^.]+")
_LINEAR = "Linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionViolation:
    """Parts of one fused product with different schemes.

    Attributes:
        parts: names of the parts that differ, with what each has; None is 16 bit.
    """

    parts: Mapping[str, str | None]

    def __str__(self) -> str:
        schemes = sorted({scheme or "16 bit" for scheme in self.parts.values()})
        first, *_, last = self.parts
        return (
            f"{first} … {last}: an engine runs these as one product, and they are {' and '.join(schemes)}. "
            "Give them one scheme."
        )


def fused_sets(structure: ModelStructure) -> tuple[tuple[str, ...], ...]:
    """Return every site of a model exactly once, in sets that must share a scheme."""
    return tuple(names for block in structure.blocks for names in block_sets(block))


def join_stacks(sets: Sequence[tuple[str, ...]], sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
    """Join the sets of all experts in 3-D parameters, which transformers reads by one scheme for the whole model."""
    stacked = {site.name for site in sites if site.index is not None}
    joined = tuple(name for names in sets if stacked.intersection(names) for name in names)
    others = [names for names in sets if not stacked.intersection(names)]
    return (*others, joined) if joined else tuple(others)


def block_sets(block: BlockStructure) -> tuple[tuple[str, ...], ...]:
    """Return the sites of one block in sets: those of a group that are alike, and all experts together.

    A router reads what the experts read, and so may a shared expert. Both are products of their own: sites of one group
    are joined only within one module.
    """
    sites = {site.name: site for site in block.sites}
    sets: dict[tuple[str, ...], list[str]] = {}
    for group in block.groups:
        for name in group.sites:
            sets.setdefault(_key(sites[name], group.sites[0]), []).append(name)
    for name in block.uncalled:
        if name in sites and not any(name in names for names in sets.values()):
            sets.setdefault(_key(sites[name], name), []).append(name)
    return tuple(tuple(names) for names in sets.values())


def fusion_violations(
    plan: Mapping[str, SitePlan] | Mapping[str, Scheme | None], groups: Iterable[Sequence[str]]
) -> tuple[FusionViolation, ...]:
    """Return the sets whose sites differ.

    Args:
        plan: site -> what it becomes; a site that is not in it stays in 16 bit.
        groups: as `fused_sets` returns them.
    """
    found: list[FusionViolation] = []
    for names in groups:
        parts = {name: _scheme_name(plan.get(name)) for name in names}
        if len(set(parts.values())) > 1:
            found.append(FusionViolation(parts=parts))
    return tuple(found)


def export_violations(config: Mapping[str, Any], modules: Iterable[str]) -> tuple[FusionViolation, ...]:
    """Return what vLLM would refuse in an exported model.

    Args:
        config: its config.json, with a `quantization_config` of compressed-tensors.
        modules: names of its linear modules as the checkpoint has them, experts one by one.
    """
    quantization = cast(Mapping[str, Any], config.get("quantization_config") or {})
    sets: dict[str, list[str]] = {}
    for module in modules:
        sets.setdefault(_fused_name(module), []).append(module)
    found: list[FusionViolation] = []
    for fused, names in sets.items():
        parts = {name: config_group(quantization, name) for name in names}
        joined = config_group({**quantization, "ignore": ()}, fused)
        if joined is not None and any(group is not None for group in parts.values()):
            parts[fused] = joined
        if len(set(parts.values())) > 1:
            found.append(FusionViolation(parts=parts))
    return tuple(found)


def config_group(quantization: Mapping[str, Any], module: str) -> str | None:
    """Return the config group that a module belongs to, as the engine looks it up; None where it is ignored.

    A name, or a pattern of names, goes before the class `Linear`, whatever the order of the groups.
    """
    if any(_matches(target, module) for target in cast(Sequence[str], quantization.get("ignore") or ())):
        return None
    groups = cast(Mapping[str, Mapping[str, Any]], quantization.get("config_groups") or {})
    by_class: str | None = None
    for name, entry in groups.items():
        targets = cast(Sequence[str], entry["targets"])
        if any(_matches(target, module) for target in targets):
            return name
        if by_class is None and _LINEAR in targets:
            by_class = name
    return by_class


def _key(site: Site, first_of_group: str) -> tuple[str, ...]:
    """Equal for the sites of a block that an engine joins."""
    if site.kind == "router":
        return ("router", site.name)
    module = site.name.rpartition(".")[0]
    if site.index is not None:
        return ("experts", module)
    if match := _EXPERT.fullmatch(site.name):
        return ("experts", match["place"])
    return ("group", first_of_group, module)


def _fused_name(module: str) -> str:
    """The engine's name of the product that a module is part of; the same for all experts of a layer."""
    if match := _EXPERT.fullmatch(module):
        return match["place"]
    place, _, leaf = module.rpartition(".")
    joined = next((fused for fused, parts in PACKED_MODULES.items() if leaf in parts), leaf)
    return f"{place}.{joined}" if place else joined


def _scheme_name(entry: SitePlan | Scheme | None) -> str | None:
    scheme = entry.effective if isinstance(entry, SitePlan) else entry
    return None if scheme is None else str(scheme)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module
