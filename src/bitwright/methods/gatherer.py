"""Gather what the methods of a plan must know of the inputs, in passes that fit into memory.

Shapes: I in features.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from bitwright.calibration.collect import SiteStats
from bitwright.calibration.output_gradients import load_output_gradients
from bitwright.methods.composition import needs_of_site
from bitwright.methods.solvers import SOLVERS, Need, Solver
from bitwright.methods.stage import BlockStage
from bitwright.model.structure import BlockStructure, collection_passes
from bitwright.numerics.inputs import InputQuantizer
from bitwright.recipe import Plan, Recipe
from bitwright.schemes import ActivationScheme

STATISTICS_BYTES = 1_000_000_000
"""Memory that the Hessians collected in one pass over a block may take; more sites than fit take more passes."""

Groups = list[tuple[str, ...]]


class Gatherer:
    """Collects statistics for the sites of a plan.

    Args:
        recipe: how many groups of output channels have a Hessian of their own.
        plan: what becomes of each site, and by which method.
        guided: file of the tokens' weights, where a method needs them.
    """

    def __init__(self, recipe: Recipe, plan: Plan, guided: Path) -> None:
        self.recipe, self.plan, self.guided = recipe, plan, guided

    def solver(self, site: str) -> Solver:
        """The solver of a site that is quantized."""
        method = self.plan.sites[site].method
        assert method is not None
        return SOLVERS[method]

    def passes(self, structure: BlockStructure) -> Iterator[Groups]:
        """Cut each sub-step of a block into passes whose sums fit the memory limit; only sites that are quantized."""
        width = {site.name: site.in_features for site in structure.sites}
        for groups in collection_passes(structure):
            batch: Groups = []
            used = 0
            for group in groups:
                wanted = tuple(name for name in group if self.plan.sites[name].scheme is not None)
                if not wanted:
                    continue
                needed = 8 * width[wanted[0]] ** 2 * self._num_sums(wanted)
                if batch and used + needed > STATISTICS_BYTES:
                    yield batch
                    batch, used = [], 0
                batch.append(wanted)
                used += needed
            if batch:
                yield batch

    def collect(self, stage: BlockStage, groups: Groups) -> dict[str, SiteStats]:
        """Return statistics per site; without calibration text they are empty."""
        names = [name for group in groups for name in group]
        if stage.inputs is None:
            return {name: SiteStats(transform=stage.input_transforms.get(name)) for name in names}
        needs: set[Need] = {need for name in names for need in needs_of_site(self.plan.sites[name])}
        calibrated = self._calibrated(names)
        if "hessian" not in needs:
            return stage.collect(groups, with_gram=False, calibrated=calibrated)
        # What inputs will be rounded to must be known before products are formed of it.
        observed = stage.collect(groups, with_gram=False, calibrated=calibrated) if calibrated else {}
        stats = stage.collect(
            groups,
            with_gram=True,
            quantizers=self._quantizers(stage, groups, observed),
            with_cross="cross" in needs,
            weights=load_output_gradients(self.guided, names) if "guided" in needs else None,
        )
        for name, each in observed.items():
            stats[name].observers = each.observers
        return stats

    def _quantizers(
        self, stage: BlockStage, groups: Groups, observed: Mapping[str, SiteStats]
    ) -> dict[str, InputQuantizer]:
        """What the inputs of each group will be rounded to; none where they stay floats, or sites round differently."""
        found: dict[str, InputQuantizer] = {}
        for group in groups:
            leader, stats = group[0], observed.get(group[0], SiteStats())
            acts = {self._activations(name) for name in group}
            unseen = leader in observed and stats.num_tokens == 0
            quantizer = None if len(acts) > 1 or unseen else stage.input_quantizer(stage.sites[leader], stats)
            if quantizer is not None:
                found[leader] = quantizer
        return found

    def _num_sums(self, group: tuple[str, ...]) -> int:
        """How many matrices [I, I] are collected for a group."""
        guided = [name for name in group if "guided" in self.solver(name).needs]
        crossed = any("cross" in self.solver(name).needs for name in group)
        rounded = any(self._activations(name) is not None for name in group)
        return 1 + crossed + rounded + len(guided) * self.recipe.gptq.guided_groups

    def _calibrated(self, names: list[str]) -> dict[str, ActivationScheme]:
        """Sites whose inputs are quantized with scales from calibration."""
        schemes = {name: self._activations(name) for name in names}
        return {name: acts for name, acts in schemes.items() if acts is not None and acts.observer is not None}

    def _activations(self, site: str) -> ActivationScheme | None:
        scheme = self.plan.sites[site].scheme
        return None if scheme is None else scheme.activations
