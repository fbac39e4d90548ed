"""What a weight solver is, and the table of those that exist."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.gptq import Refit, gptq
from bitwright.methods.lnq import lnq
from bitwright.methods.rtn import rtn
from bitwright.methods.stage import BlockStage, BlockTask
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.formats import Format
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.recipe import Recipe
from bitwright.registry import Registry

Need = Literal["moments", "hessian", "teacher", "cross", "guided"]
"""What a method must be given: E[x²] of a site's inputs; also Σ x xᵀ; the outputs of the unquantized block; how the
inputs of the unquantized model differ; Hessians weighted by end-loss gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """All that a solver may know beside the weight and its grid.

    Attributes:
        stats: of the inputs, as they will be at inference.
        recipe: holds the options of every method.
        refit: fits a new grid to the current weights [O, g] of columns first … end.
    """

    stats: SiteStats
    recipe: Recipe
    refit: Refit


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """Chooses codes: for one weight at a time (`solve`), or for all sites of a block together (`solve_block`).

    Attributes:
        solve: (weight [O, I], grid, problem) -> QTensor.
        solve_block: (stage, tasks) -> QTensor per site name.
        needs: what must have been collected; anything at all requires a calibration text.
        accepts: the number formats it works on.
        hint: what to do where it does not.
    """

    solve: Callable[[Tensor, AnyGrid, Problem], QTensor] | None = None
    solve_block: Callable[[BlockStage, list[BlockTask]], dict[str, QTensor]] | None = None
    needs: frozenset[Need] = frozenset()
    accepts: Callable[[Format], bool] = lambda _: True
    hint: str = "Use gptq or rtn."

    @property
    def needs_hessian(self) -> bool:
        """Whether the statistics must include Σ x xᵀ."""
        return "hessian" in self.needs


def _rtn(weight: Tensor, grid: AnyGrid, _problem: Problem) -> QTensor:
    return rtn(weight, grid)


def _gptq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    hessian, options = problem.stats.hessian, problem.recipe.gptq
    assert hessian is not None
    has_float_scales = isinstance(grid, Grid) and grid.stored is None
    refits = has_float_scales and grid.granularity.kind == "group" and not options.act_order
    return gptq(
        weight,
        hessian,
        grid,
        damp=options.damp,
        block=options.block,
        act_order=options.act_order,
        refit=problem.refit if refits else None,
    )


def _lnq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    hessian = problem.stats.hessian
    assert hessian is not None
    assert isinstance(grid, CodebookGrid)
    return lnq(weight, hessian, grid, damp=problem.recipe.gptq.damp)


def has_own_tables(format: Format) -> bool:
    """Whether the levels are tables learned per row or group."""
    return isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat)


HESSIAN: frozenset[Need] = frozenset({"moments", "hessian"})
SOLVERS: Registry[Solver] = Registry("method")
SOLVERS.register("rtn", Solver(solve=_rtn))
SOLVERS.register("gptq", Solver(solve=_gptq, needs=HESSIAN))
SOLVERS.register(
    "lnq",
    Solver(
        solve=_lnq, needs=HESSIAN, accepts=has_own_tables,
        hint="It learns the tables of kmeans schemes; use gptq or rtn for others.",
    ),
)  # fmt: skip
# Never asked to solve: `automatic` puts another solver in its place before any block is quantized.
SOLVERS.register("auto", Solver(needs=frozenset({"moments", "hessian", "teacher", "cross"})))
