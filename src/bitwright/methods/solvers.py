"""What a weight solver is, and the table of those that exist."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.gptq import Refit, gptq
from bitwright.methods.lnq import lnq
from bitwright.methods.rtn import rtn
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.formats import Format
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.recipe import GptqOptions
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """Rounds a weight to a grid.

    Attributes:
        solve: (weight [O, I], grid, statistics of the inputs, options, refit) -> QTensor; `refit` fits a new grid to
            the current weights [O, g] of columns first … end.
        needs_hessian: the statistics must include Σ x xᵀ, so a calibration text is required.
        accepts: the number formats it works on.
    """

    solve: Callable[[Tensor, AnyGrid, SiteStats, GptqOptions, Refit], QTensor]
    needs_hessian: bool
    accepts: Callable[[Format], bool] = lambda _: True


def _rtn(weight: Tensor, grid: AnyGrid, _stats: SiteStats, _options: GptqOptions, _refit: Refit) -> QTensor:
    return rtn(weight, grid)


def _gptq(weight: Tensor, grid: AnyGrid, stats: SiteStats, options: GptqOptions, refit: Refit) -> QTensor:
    hessian = stats.hessian
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
        refit=refit if refits else None,
    )


def _lnq(weight: Tensor, grid: AnyGrid, stats: SiteStats, options: GptqOptions, _refit: Refit) -> QTensor:
    hessian = stats.hessian
    assert hessian is not None
    assert isinstance(grid, CodebookGrid)
    return lnq(weight, hessian, grid, damp=options.damp)


def has_own_tables(format: Format) -> bool:
    """Whether the levels are tables learned per row or group."""
    return isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat)


SOLVERS: Registry[Solver] = Registry("method")
SOLVERS.register("rtn", Solver(solve=_rtn, needs_hessian=False))
SOLVERS.register("gptq", Solver(solve=_gptq, needs_hessian=True))
SOLVERS.register("lnq", Solver(solve=_lnq, needs_hessian=True, accepts=has_own_tables))
