"""What sites cost in each scheme, what a budget leaves for them, and in the budget's own units what they would need."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from bitwright.budget import Budget
from bitwright.model.sites import Site
from bitwright.recipe import Recipe, resolve
from bitwright.schemes import Scheme
from bitwright.search.allocate import Choice, Infeasible, Limits
from bitwright.search.cost import memory, resident_bytes, site_latency, speed
from bitwright.search.model_shape import ModelShape
from bitwright.search.stored_size import exported_bytes, site_bytes

ROUNDED = 1e-3
"""A speed that is said to be possible is lower by this share, so that its four digits are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCosts:
    """Costs of a model's sites under a budget.

    Attributes:
        shape: of the model.
        sites: those that can be quantized.
        recipe: decides about ragged rows and ranks of addends.
        budget: the limits.
        header_bytes: by how much a mix has made the files' headers longer than those of the original.
    """

    shape: ModelShape
    sites: Sequence[Site]
    recipe: Recipe
    budget: Budget
    header_bytes: int = 0

    def with_addends(self, sites: Collection[str]) -> "SiteCosts":
        """The same with low-rank addends at some sites more."""
        ranks = {**self.shape.ranks, **dict.fromkeys(sites, self.recipe.low_rank.rank)}
        return replace(self, shape=replace(self.shape, ranks=ranks))

    def choice(self, members: Sequence[Site], scheme: str | None) -> Choice:
        """What sites cost together in a scheme, whatever they lose."""
        shape, hardware = self.shape, self.budget.hardware
        latency = 0.0
        size = resident = 0
        for site in members:
            real = self.effective(site, scheme)
            rank = shape.ranks.get(site.name, 0)
            size += site_bytes(site, real, shape.site_dtypes[site.name], shape.dtype, rank=rank)
            resident += resident_bytes(shape, site, real, hardware)
            if hardware is not None:
                latency += site_latency(shape, site, real, hardware, tokens=self.budget.work.batch)
        return Choice(scheme=scheme, loss=0.0, size_bytes=size, memory_bytes=resident, latency_s=latency)

    def effective(self, site: Site, scheme: str | None) -> Scheme | None:
        """A scheme with the group size that a site really gets."""
        if scheme is None:
            return None
        wished = Recipe(scheme=Scheme.parse(scheme), ignore=(), ragged=self.recipe.ragged)
        return resolve(wished, [site]).sites[site.name].effective

    def assignment(self, schemes: Mapping[str, str | None]) -> dict[str, Scheme | None]:
        """Schemes with the group sizes that each site really gets."""
        return {site.name: self.effective(site, schemes[site.name]) for site in self.sites}

    def longer_headers(self, schemes: Mapping[str, str | None]) -> int:
        """By how much the headers of a mix are longer than those of the original: it has more tensors."""
        size = sum(self.choice([site], schemes[site.name]).size_bytes for site in self.sites)
        whole = exported_bytes(self.shape, self.assignment(schemes), layout=self.recipe.layout)
        return whole - size - (self._other_bytes - self.header_bytes)

    @property
    def num_weights(self) -> int:
        """Of all sites."""
        return sum(site.out_features * site.in_features for site in self.sites)

    def limits(self) -> Limits:
        """The budget on anything but quality, less what no choice changes."""
        budget = self.budget
        sizes: list[float] = []
        if budget.size_bytes is not None:
            sizes.append(budget.size_bytes - self._other_bytes)
        if budget.average_bits is not None:
            sizes.append(budget.average_bits * self.num_weights / 8)
        fit, speed_asked = budget.fit_bytes, budget.min_tokens_per_s
        return Limits(
            max_size_bytes=min(sizes, default=None),
            max_memory_bytes=None if fit is None else float(fit - self._other_memory),
            max_latency_s=None if speed_asked is None else budget.work.batch / speed_asked - self._other_seconds,
        )

    def in_units(self, found: Infeasible) -> str:
        """Say in the units of the budget which limit cannot be kept, and what could be."""
        needed = " or ".join(self._needed(found.needed))
        if not needed:
            return str(found)
        if found.is_joint:
            return f"the limits cannot be kept together, though each can alone: with the others as they are, {needed}."
        return f"no mix keeps the budget: {needed}. Raise that, or offer smaller schemes."

    def _needed(self, needed: Mapping[str, float]) -> list[str]:
        budget, texts = self.budget, list[str]()
        for resource, least in needed.items():
            if resource == "size_bytes":
                size, bits = least + self._other_bytes, 8 * least / self.num_weights
                if budget.size_bytes is not None and size > budget.size_bytes:
                    texts.append(f"--size {_mb(budget.size_bytes)} would have to be {_mb(size)}")
                if budget.average_bits is not None and bits > budget.average_bits:
                    enough = math.ceil(1e3 * bits) / 1e3
                    texts.append(f"--average-bits {budget.average_bits:g} would have to be {enough:.3f}")
            elif resource == "memory_bytes" and budget.fit_bytes is not None:
                texts.append(f"--fit {_mb(budget.fit_bytes)} would have to be {_mb(least + self._other_memory)}")
            elif resource == "latency_s" and budget.min_tokens_per_s is not None:
                reached = budget.work.batch / (least + self._other_seconds) * (1 - ROUNDED)
                texts.append(f"--min-tokens-per-s {budget.min_tokens_per_s:g} would have to be {reached:.4g}")
        return texts

    @property
    def _dense_bytes(self) -> int:
        return sum(site_bytes(s, None, self.shape.site_dtypes[s.name], self.shape.dtype) for s in self.sites)

    @property
    def _other_bytes(self) -> int:
        """Of the files: embeddings, norms, head and headers."""
        return exported_bytes(self.shape, self._nothing) - self._dense_bytes + self.header_bytes

    @property
    def _other_memory(self) -> int:
        """Of the memory: the same without headers, the cache and the workspace."""
        whole = memory(self.shape, self._nothing, self.budget.work, self.budget.hardware).total_bytes
        return whole - self._dense_bytes

    @property
    def _other_seconds(self) -> float:
        """Of a step of decoding: all that is no site."""
        hardware, work = self.budget.hardware, self.budget.work
        assert hardware is not None  # a budget of speed has one
        step = speed(self.shape, self._nothing, work, hardware).decode_s
        return step - sum(site_latency(self.shape, site, None, hardware, tokens=work.batch) for site in self.sites)

    @property
    def _nothing(self) -> dict[str, Scheme | None]:
        return dict.fromkeys((site.name for site in self.sites), None)


def _mb(num_bytes: float) -> str:
    """As `--size` takes it, and enough."""
    return f"{math.ceil(num_bytes / 1e3) / 1e3:.3f} MB"
