"""Quantize the sites of one group: fit the grid, solve, put the result into the block, say what became of each site."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.errors import CheckpointError, SingularHessian, VerificationError
from bitwright.methods.repairs import REPAIRS, RepairTask
from bitwright.methods.solvers import SOLVERS, TRAINED_ELSEWHERE, Problem
from bitwright.methods.stage import BlockStage, BlockTask
from bitwright.model.layouts.own import input_scale
from bitwright.model.sites import Site, weight_view
from bitwright.model.skeleton import Skeleton
from bitwright.numerics.block_scales import FixedFp8Scale
from bitwright.numerics.entropy import ideal_bits_per_weight
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import Format
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.inputs import FloatColumns, InputQuantizer, QuantizedSite, static_grid
from bitwright.numerics.metrics import sqnr_db
from bitwright.numerics.outliers import SparseOutliers, split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import RangeMethod, store_scale
from bitwright.numerics.scales import FloatScale
from bitwright.recipe import Plan, Recipe, SitePlan
from bitwright.schemes import ActivationScheme, WeightScheme
from bitwright.site_histogram import SiteHistogram, site_histogram
from bitwright.train.given_sites import GivenSites


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteResult:
    """What became of one site.

    Attributes:
        method: the solver, and the repairs after it.
        weight_sqnr_db: signal to noise of the weights, repaired; None where they are exact or all zero.
        output_sqnr_db: signal to noise of the site's output on the calibration inputs; None without Hessian.
        saturated: fraction of codes at the ends of the range.
        ideal_bits_per_weight: bits per weight if the codes were entropy coded, scales included.
        num_tokens: calibration tokens that reached the site.
        histogram: of the weights as they were coded, and the levels of the grid; None where all weights are equal.
    """

    site: str
    scheme: str
    method: str
    bits_per_weight: float
    num_weights: int
    weight_sqnr_db: float | None
    output_sqnr_db: float | None
    saturated: float
    ideal_bits_per_weight: float
    num_tokens: int
    reason: str
    histogram: SiteHistogram | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Start:
    """What a solver starts from: sites planned alike, their stacked weight [O, I] and grid, and what stays apart."""

    stack: list[Site]
    entry: SitePlan
    method: str
    reason: str
    weight: Tensor
    grid: AnyGrid
    stats: SiteStats
    outliers: SparseOutliers | None
    columns: FloatColumns | None

    @property
    def weights(self) -> WeightScheme:
        assert self.entry.scheme is not None
        return self.entry.scheme.weights


class GroupSolver:
    """Quantizes groups of sites by a plan. Shapes: O out features, I in features.

    Args:
        fisher: file of E[g²] per parameter, where the recipe weighs by it.
        given: sites whose codes training has found.
    """

    def __init__(
        self, skeleton: Skeleton, recipe: Recipe, plan: Plan, fisher: Path, given: GivenSites | None = None
    ) -> None:
        self.skeleton, self.recipe, self.plan, self.fisher, self.given = skeleton, recipe, plan, fisher, given

    def solve(
        self, stage: BlockStage, members: list[Site], stats: SiteStats
    ) -> Iterator[tuple[Site, QuantizedSite, SiteResult]]:
        """Solve the sites of a group, those planned alike as one stacked weight: rows do not depend on each other."""
        for stack in self._planned_alike(members):
            if self.plan.sites[stack[0].name].method == TRAINED_ELSEWHERE:
                yield from (self._take(stage, site, stats) for site in stack)
                continue
            start = self._start(stage, stack, stats)
            result = self._solve_stack(start)
            first = 0
            for site in stack:
                rows = slice(first, first + site.out_features)
                yield self._finish(stage, start, site, rows, result.rows(rows.start, rows.stop))
                first = rows.stop

    def solve_block(
        self, stage: BlockStage, members: list[Site], stats: Mapping[str, SiteStats]
    ) -> Iterator[tuple[Site, QuantizedSite, SiteResult]]:
        """Solve sites of a block whose methods work on the block as a whole, those with one method together."""
        by_method: dict[str, list[_Start]] = {}
        for site in members:
            start = self._start(stage, [site], stats[site.name])
            by_method.setdefault(start.method, []).append(start)
        for method, starts in by_method.items():
            together = SOLVERS[method].solve_block
            tasks = [self._task(start) for start in starts]
            found = together(stage, tasks) if together else {s.stack[0].name: self._solve_stack(s) for s in starts}
            for start in starts:
                site = start.stack[0]
                yield self._finish(stage, start, site, slice(0, site.out_features), found[site.name])

    def fake_quantize(
        self, site: Site, weight: Tensor, mean_square: Tensor | None, *, method: RangeMethod | None = None
    ) -> Tensor:
        """Round a weight [O, I] to nearest as the plan of its site says; see `stage.FakeQuantize`."""
        entry = self.plan.sites[site.name]
        assert entry.scheme is not None
        dtype = self._stored_dtype(site)
        grid = self._fit(entry, entry.scheme.weights.format, weight, mean_square, dtype, method=method)
        return grid.dequantize(grid.quantize(weight))

    def _start(self, stage: BlockStage, stack: list[Site], stats: SiteStats) -> "_Start":
        """Gather what the solver works on: the weight as it will be coded, its grid, and what stays apart."""
        entry = self.plan.sites[stack[0].name]
        assert entry.method is not None
        assert entry.scheme is not None
        method, reason = entry.method, entry.reason
        if SOLVERS[method].needs and stats.num_tokens == 0:
            if stack[0].kind != "expert":
                raise VerificationError(f"{stack[0].name}: no calibration token reached it, so {method} cannot work.")
            method, reason = "rtn", f"no calibration token reached this expert: rounded to nearest. {reason}".strip()
        elif stats.is_routed and {"cross", "guided"} & SOLVERS[method].needs:
            note = "an expert sees other tokens in the unquantized model, which cannot be matched: gptq."
            method, reason = "gptq", f"{note} {reason}".strip()
        elif "cross" in SOLVERS[method].needs and stats.num_tokens <= stack[0].in_features:
            note = f"{stats.num_tokens} tokens do not tell how {stack[0].in_features} inputs have moved."
            reason = f"{note} {reason}".strip()
        weight = torch.cat([stage.weight(site) for site in stack])
        if stats.transform is not None:
            weight = stats.transform.to_weight(weight)
        dtype = self._stored_dtype(stack[0])
        columns: FloatColumns | None = None
        index = stats.float_columns
        if index is not None:
            columns = FloatColumns(index=index.to(torch.int32), weight=weight[:, index].to(dtype))
            weight[:, index] = 0.0
        outliers: SparseOutliers | None = None
        if entry.scheme.weights.outliers:
            fraction = entry.scheme.weights.outliers
            weight, outliers = split_outliers(weight, fraction, importance=stats.mean_square, dtype=dtype)
        importance = self._weight_importance(stack, weight, outliers)
        grid = self._fit(entry, entry.scheme.weights.format, weight, stats.mean_square, dtype, importance)
        return _Start(
            stack=stack, entry=entry, method=method, reason=reason, weight=weight, grid=grid, stats=stats,
            outliers=outliers, columns=columns,
        )  # fmt: skip

    def _take(self, stage: BlockStage, site: Site, stats: SiteStats) -> tuple[Site, QuantizedSite, SiteResult]:
        """Put a given site into the block and describe it."""
        assert self.given is not None
        entry, quantized = self.plan.sites[site.name], self.given.read(site.name).to(self.skeleton.device)
        if self.given.schemes[site.name] != entry.effective:
            raise CheckpointError(
                f"{site.name}: was trained as {self.given.schemes[site.name]}, not as {entry.effective}."
            )
        weight, dtype = stage.weight(site), self._stored_dtype(site)
        start = _Start(
            stack=[site], entry=entry, method=TRAINED_ELSEWHERE, reason=entry.reason, weight=weight,
            grid=quantized.weight.grid, stats=stats, outliers=quantized.weight.outliers, columns=quantized.columns,
        )  # fmt: skip
        detail = _describe(site, start, quantized, weight, quantized.weight.dequantize(dtype).float())
        weight_view(stage.block, site, stage.name).copy_(quantized.dense(dtype))
        return site, quantized, detail

    def _finish(
        self, stage: BlockStage, start: "_Start", site: Site, rows: slice, result: QTensor
    ) -> tuple[Site, QuantizedSite, SiteResult]:
        """Make the site of its codes, repair it, put it into the block and describe it."""
        weight = start.weight[rows]
        if result.outliers is not None:  # apart from the codes, but part of what these and the outliers stand for
            weight = result.outliers.add_to(weight.clone())
        quantized = QuantizedSite(
            weight=result,
            inputs=self.input_quantizer(site, start.stats),
            transform=start.stats.transform,
            columns=None if start.columns is None else start.columns.rows(rows.start, rows.stop),
        )
        dtype = self._stored_dtype(site)
        task = RepairTask(weight=weight, stats=start.stats, recipe=self.recipe, dtype=dtype)
        for name in start.entry.repairs:
            quantized = REPAIRS[name].apply(quantized, task)
        coded = quantized.coded(dtype).float()
        detail = _describe(site, start, quantized, weight, coded)
        weight_view(stage.block, site, stage.name).copy_(quantized.dense(dtype))
        return site, quantized, detail

    def _task(self, start: "_Start") -> BlockTask:
        site = start.stack[0]
        inputs = self.input_quantizer(site, start.stats)
        return BlockTask(
            site=site, weight=start.weight, grid=start.grid, stats=start.stats, inputs=inputs, columns=start.columns
        )

    def _planned_alike(self, members: list[Site]) -> list[list[Site]]:
        """Sites planned alike, by scheme, method and repairs; what one weight shares as a whole stays apart.

        NVFP4's global scale is shared on purpose: engines fuse these sites into one weight.
        """
        alike: dict[Any, list[Site]] = {}
        for site in members:
            entry = self.plan.sites[site.name]
            granularity, scheme = entry.granularity, entry.scheme
            assert scheme is not None
            assert granularity is not None
            cuts_a_tile = site.out_features % (granularity.block_rows or 1) != 0
            alone = granularity.kind == "tensor" or cuts_a_tile or scheme.weights.scale == "nested"
            key = (scheme, entry.group_size, entry.method, entry.repairs, site.name if alone else "")
            alike.setdefault(key, []).append(site)
        return list(alike.values())

    def _solve_stack(self, start: "_Start") -> QTensor:
        """Return the result [O, I] of a solver that works on single weights."""
        weights, stats = start.weights, start.stats
        site, dtype = start.stack[0], self._stored_dtype(start.stack[0])

        def refit(current: Tensor, first: int, end: int) -> AnyGrid:
            # The grid's own format: a table learned for the whole weight stays, only scales are fitted again.
            moments = None if stats.mean_square is None else stats.mean_square[first:end]
            return self._fit(start.entry, start.grid.format, current, moments, dtype)

        def fit_by(method: RangeMethod) -> AnyGrid:
            return self._fit(start.entry, start.grid.format, start.weight, None, dtype, method=method)

        solve = SOLVERS[start.method].solve
        assert solve is not None
        try:
            problem = Problem(stats=stats, recipe=self.recipe, refit=refit, fit=fit_by, rows=_rows_of(start.stack))
            result = solve(start.weight, start.grid, problem)
        except SingularHessian as error:
            raise SingularHessian(f"{site.name}: {error} It saw {stats.num_tokens} tokens.") from None
        scale = weights.stored_scale(dtype)
        if isinstance(result.grid, Grid) and scale.stored_afterwards:
            result = QTensor(codes=result.codes, grid=store_scale(result.grid, scale))
        return QTensor(codes=result.codes, grid=result.grid, outliers=start.outliers)

    def _fit(
        self,
        entry: SitePlan,
        format: Format,
        weight: Tensor,
        mean_square: Tensor | None,
        dtype: torch.dtype,
        weight_importance: Tensor | None = None,
        *,
        method: RangeMethod | None = None,
    ) -> AnyGrid:
        """Fit a grid to columns with E[x²] `mean_square`; `weight_importance` [O, I] adds to their importance."""
        assert entry.scheme is not None
        assert entry.granularity is not None
        range_method = self.recipe.range_method_for(has_statistics=mean_square is not None)
        importance = mean_square if method is not None or range_method == "importance" else None
        if weight_importance is not None:
            by_fisher = importance is None or self.recipe.importance == "fisher"
            importance = weight_importance if by_fisher else weight_importance * cast(Tensor, importance)
        return fit(
            weight,
            format,
            entry.granularity,
            method=method or ("mse" if range_method == "importance" else range_method),
            importance=importance,
            scale=entry.scheme.weights.stored_scale(dtype),
        )

    def _weight_importance(self, stack: list[Site], weight: Tensor, outliers: SparseOutliers | None) -> Tensor | None:
        """Factor [O, I] on the importance of single weights: Fisher information; 0 for what is stored apart."""
        by_fisher = self.recipe.importance == "fisher"
        if not by_fisher and outliers is None:
            return None
        importance = torch.ones_like(weight)
        if by_fisher:
            with safe_open(self.fisher, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                importance = torch.cat([cast(Tensor, handle.get_tensor(site.parameter)) for site in stack])
            importance = importance.to(weight.device)
        if outliers is not None:
            importance.view(-1)[outliers.index.long()] = 0
        return importance

    def input_quantizer(self, site: Site, stats: SiteStats) -> InputQuantizer | None:
        """What happens to the inputs of a site at inference."""
        scheme = self.plan.sites[site.name].scheme
        acts = None if scheme is None else scheme.activations
        if acts is None:
            return None
        scale = input_scale(acts)
        if acts.observer is None:
            return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale)
        low, high = self._observed(site, acts, stats)
        if not acts.is_static:
            amax = torch.maximum(-low, high).max()
            scale = FixedFp8Scale.for_largest(amax / acts.format.max_value)
            return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale)
        # Engines keep the scale in the model's dtype: in float32 it is what they will have.
        rounded = FloatScale(self._stored_dtype(site))
        static = static_grid(low, high, acts.format, acts.granularity, site.in_features, scale=rounded)
        static = static.to(self.skeleton.device)
        static = replace(static, scale=static.scale.float())
        return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale, static=static)

    def _observed(self, site: Site, acts: ActivationScheme, stats: SiteStats) -> tuple[Tensor, Tensor]:
        if stats.num_tokens == 0:
            raise VerificationError(
                f"{site.name}: no calibration token reached it, so its inputs have no range. Use dynamic activations."
            )
        return stats.observers[acts].range(acts.format)

    def _stored_dtype(self, site: Site) -> torch.dtype:
        return self.skeleton.stored_dtype(site.parameter)


def _rows_of(stack: list[Site]) -> dict[str, slice]:
    """Which rows of a stacked weight belong to each site."""
    ends = list(accumulate(site.out_features for site in stack))
    return {site.name: slice(end - site.out_features, end) for site, end in zip(stack, ends, strict=True)}


def _describe(site: Site, start: "_Start", quantized: QuantizedSite, weight: Tensor, coded: Tensor) -> SiteResult:
    result, stats = quantized.weight, start.stats
    output_sqnr = None
    if stats.gram is not None and stats.num_tokens:
        gram = stats.gram.to(weight.dtype)
        error = weight - coded
        signal, noise = ((weight @ gram) * weight).sum(), ((error @ gram) * error).sum()
        output_sqnr = _finite(float(10 * torch.log10(signal / noise)))
    return SiteResult(
        site=site.name,
        scheme=str(start.entry.effective),
        method="+".join((start.method, *start.entry.repairs)),
        bits_per_weight=quantized.num_bits_total / weight.numel(),
        num_weights=weight.numel(),
        weight_sqnr_db=_finite(sqnr_db(weight, coded)),
        output_sqnr_db=output_sqnr,
        saturated=result.saturated_fraction,
        ideal_bits_per_weight=ideal_bits_per_weight(result.codes, quantized.num_bits_total - result.num_code_bits),
        num_tokens=stats.num_tokens,
        reason=start.reason,
        histogram=site_histogram(weight, result),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
