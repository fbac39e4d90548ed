"""Quantize the sites of one group: fit the grid, solve, put the result into the block, say what became of each site."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.collect import SiteStats
from bitwright.errors import SingularHessian, VerificationError
from bitwright.methods.solvers import SOLVERS
from bitwright.model.sites import Site, weight_view
from bitwright.model.skeleton import Skeleton
from bitwright.numerics.grid import Grid
from bitwright.numerics.metrics import sqnr_db
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.recipe import Plan, Recipe, SitePlan


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteResult:
    """What became of one site.

    Attributes:
        weight_sqnr_db: signal to noise of the weights; None where they are exact or all zero.
        output_sqnr_db: signal to noise of the site's output on the calibration inputs; None without Hessian.
        saturated: fraction of codes at the ends of the range.
        num_tokens: calibration tokens that reached the site.
    """

    site: str
    scheme: str
    method: str
    bits_per_weight: float
    num_weights: int
    weight_sqnr_db: float | None
    output_sqnr_db: float | None
    saturated: float
    num_tokens: int
    reason: str


class GroupSolver:
    """Quantizes groups of sites by a plan. Shapes: O out features, I in features."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, plan: Plan) -> None:
        self.skeleton, self.recipe, self.plan = skeleton, recipe, plan

    def solve(
        self, block: nn.Module, prefix: str, members: list[Site], stats: SiteStats
    ) -> Iterator[tuple[Site, QTensor, SiteResult]]:
        """Solve the sites of a group, those planned alike as one stacked weight: rows do not depend on each other."""
        for stack in self._planned_alike(members):
            views = [weight_view(block, site, prefix) for site in stack]
            weight = torch.cat([view.float() for view in views])
            result, method, reason = self._solve_stack(stack, weight, stats)
            first = 0
            for site, view in zip(stack, views, strict=True):
                part = result.rows(first, first + site.out_features)
                dense = part.dequantize(part.grid.scale.dtype).float()
                detail = _describe(site, self.plan.sites[site.name], method, reason, part, view.float(), dense, stats)
                view.copy_(dense)
                first += site.out_features
                yield site, part, detail

    def _planned_alike(self, members: list[Site]) -> list[list[Site]]:
        """Sites with the same scheme and method; a scale for a whole tensor is never shared between sites."""
        alike: dict[Any, list[Site]] = {}
        for site in members:
            entry = self.plan.sites[site.name]
            own = site.name if entry.granularity is not None and entry.granularity.kind == "tensor" else ""
            alike.setdefault((entry.scheme, entry.group_size, entry.method, own), []).append(site)
        return list(alike.values())

    def _solve_stack(self, stack: list[Site], weight: Tensor, stats: SiteStats) -> tuple[QTensor, str, str]:
        """Return the result [O, I], and the method and reason that were really at work."""
        entry = self.plan.sites[stack[0].name]
        assert entry.method is not None
        method, reason = entry.method, entry.reason
        if SOLVERS[method].needs_hessian and stats.num_tokens == 0:
            if stack[0].kind != "expert":
                raise VerificationError(f"{stack[0].name}: no calibration token reached it, so {method} cannot work.")
            method, reason = "rtn", f"no calibration token reached this expert: rounded to nearest. {reason}".strip()

        def fit(current: Tensor, first: int, end: int) -> Grid:
            return self._fit(entry, current, stats, first, end, self._scale_dtype(stack[0]))

        grid = fit(weight, 0, weight.shape[1])
        try:
            return SOLVERS[method].solve(weight, grid, stats, self.recipe.gptq, fit), method, reason
        except SingularHessian as error:
            raise SingularHessian(f"{stack[0].name}: {error} It saw {stats.num_tokens} tokens.") from None

    def _fit(
        self, entry: SitePlan, weight: Tensor, stats: SiteStats, first: int, end: int, scale_dtype: torch.dtype
    ) -> Grid:
        """Fit a grid to the columns first … end, whose current weights are `weight`."""
        assert entry.scheme is not None
        assert entry.granularity is not None
        importance = stats.mean_square
        range_method = self.recipe.range_method_for(has_statistics=importance is not None)
        weighted = importance is not None and range_method == "importance"
        return fit_grid(
            weight,
            entry.scheme.weight_format,
            entry.granularity,
            method="mse" if range_method == "importance" else range_method,
            importance=importance[first:end] if weighted and importance is not None else None,
            scale_dtype=scale_dtype,
        )

    def _scale_dtype(self, site: Site) -> torch.dtype:
        return self.skeleton.checkpoint.stored[self.skeleton.sources[site.parameter][0]].dtype


def _describe(
    site: Site,
    entry: SitePlan,
    method: str,
    reason: str,
    result: QTensor,
    weight: Tensor,
    dense: Tensor,
    stat: SiteStats,
) -> SiteResult:
    output_sqnr = None
    if stat.gram is not None and stat.num_tokens:
        gram = stat.gram.to(weight.dtype)
        error = weight - dense
        signal, noise = ((weight @ gram) * weight).sum(), ((error @ gram) * error).sum()
        output_sqnr = _finite(float(10 * torch.log10(signal / noise)))
    return SiteResult(
        site=site.name,
        scheme=str(entry.scheme),
        method=method,
        bits_per_weight=result.bits_per_weight,
        num_weights=weight.numel(),
        weight_sqnr_db=_finite(sqnr_db(weight, dense)),
        output_sqnr_db=output_sqnr,
        saturated=result.saturated_fraction,
        num_tokens=stat.num_tokens,
        reason=reason,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
