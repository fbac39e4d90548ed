"""What a weight solver is, and the table of those that exist."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.calibration.output_gradients import channel_groups
from bitwright.methods.block_ap import block_ap
from bitwright.methods.gptaq import asymmetric_target
from bitwright.methods.gptq import Refit, gptq
from bitwright.methods.guided import by_rows
from bitwright.methods.hqq import hqq
from bitwright.methods.lnq import lnq
from bitwright.methods.row_choice import has_scales_of_rows, solve_on_each
from bitwright.methods.rtn import rtn
from bitwright.methods.signround import signround
from bitwright.methods.stage import BlockStage, BlockTask
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.formats import Format
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import RangeMethod, centred, minmax
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
        fit: fits a new grid to the weight by another range method.
        rows: site -> its rows of the weight, in order; sites with the same inputs are solved as one weight.
    """

    stats: SiteStats
    recipe: Recipe
    refit: Refit
    fit: Callable[[RangeMethod], AnyGrid]
    rows: Mapping[str, slice] = field(default_factory=dict[str, slice])

    @property
    def guided_hessians(self) -> list[tuple[slice, Tensor]]:
        """Rows of the weight and the Hessian [I, I] of each group of output channels, in order."""
        found: list[tuple[slice, Tensor]] = []
        for site, rows in self.rows.items():
            hessians = self.stats.guided_hessians(site)
            assert hessians is not None
            groups = channel_groups(rows.stop - rows.start, len(hessians))
            found += [
                (slice(rows.start + group.start, rows.start + group.stop), hessian)
                for group, hessian in zip(groups, hessians, strict=True)
            ]
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """Chooses codes: for one weight at a time (`solve`), or for all sites of a block together (`solve_block`).

    Attributes:
        about: what it does, in a few words.
        solve: (weight [O, I], grid, problem) -> QTensor.
        solve_block: (stage, tasks) -> QTensor per site name.
        needs: what must have been collected; anything at all requires a calibration text.
        accepts: the number formats it works on.
        moves_scales: scales are part of its result, and must be stored as the floats they are.
        hint: what to do where it does not.
    """

    about: str
    solve: Callable[[Tensor, AnyGrid, Problem], QTensor] | None = None
    solve_block: Callable[[BlockStage, list[BlockTask]], dict[str, QTensor]] | None = None
    needs: frozenset[Need] = frozenset()
    accepts: Callable[[Format], bool] = lambda _: True
    moves_scales: bool = False
    hint: str = "Use gptq or rtn."


def _rtn(weight: Tensor, grid: AnyGrid, _problem: Problem) -> QTensor:
    return rtn(weight, grid)


def _hqq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    options = problem.recipe.hqq
    return hqq(
        weight, grid, p=options.p, beta=options.beta, kappa=options.kappa, iterations=options.iterations
    )  # fmt: skip


def _gptq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    return _towards(weight, grid, problem, asymmetry=0.0)


def _gptaq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    return _towards(weight, grid, problem, asymmetry=problem.recipe.gptq.asymmetry)


def _towards(weight: Tensor, grid: AnyGrid, problem: Problem, *, asymmetry: float) -> QTensor:
    """GPTQ; its target makes up for what the rounding of inputs does, and for a part of what the prefix has done."""
    hessian = problem.stats.hessian
    assert hessian is not None
    target = asymmetric_target(weight, hessian, problem.stats.drift(asymmetry), damp=problem.recipe.gptq.damp)
    return _swept(target, hessian, _grids(grid, problem), _sweep(grid, problem))


def _swept(target: Tensor, hessian: Tensor, grids: Sequence[AnyGrid], sweep: Mapping[str, Any]) -> QTensor:
    """GPTQ on each of the grids; every row takes the one that serves it best."""
    if len(grids) == 1:
        return gptq(target, hessian, grids[0], **sweep)
    choices = [grid for grid in grids if isinstance(grid, Grid)]
    return solve_on_each(target, hessian, choices, partial(gptq, **sweep))


MANY_LEVELS = 8
"""From here on a level more or less on one side makes no difference that was measured."""


def _grids(grid: AnyGrid, problem: Problem) -> list[AnyGrid]:
    """The grids of which each row may take the one that serves it best."""
    recipe = problem.recipe
    if recipe.range_method != "auto" or not recipe.gptq.act_order or not has_scales_of_rows(grid):
        return [grid]
    assert isinstance(grid, Grid)
    methods = [minmax]
    if grid.format.symmetric and grid.format.max_value - grid.format.min_value < MANY_LEVELS:
        methods.append(centred)
    return [grid, *(problem.fit(method) for method in methods)]


def _guided(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    return _guided_towards(weight, grid, problem, asymmetry=0.0)


def _guided_gptaq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    return _guided_towards(weight, grid, problem, asymmetry=problem.recipe.gptq.asymmetry)


def _guided_towards(weight: Tensor, grid: AnyGrid, problem: Problem, *, asymmetry: float) -> QTensor:
    hessian = problem.stats.hessian
    assert hessian is not None
    drift, damp = problem.stats.drift(asymmetry), problem.recipe.gptq.damp
    target = asymmetric_target(weight, hessian, drift, damp=damp)
    sweep = partial(_swept, sweep=_sweep(grid, problem))
    return by_rows(target, problem.guided_hessians, _grids(grid, problem), sweep)


def _sweep(grid: AnyGrid, problem: Problem) -> dict[str, Any]:
    """How columns are swept: the keyword arguments of `gptq` and its relatives."""
    options = problem.recipe.gptq
    has_float_scales = isinstance(grid, Grid) and grid.stored is None
    refits = has_float_scales and grid.granularity.kind == "group" and not options.act_order
    return {
        "damp": options.damp,
        "block": options.block,
        "act_order": options.act_order,
        "refit": problem.refit if refits else None,
    }


def _lnq(weight: Tensor, grid: AnyGrid, problem: Problem) -> QTensor:
    hessian = problem.stats.hessian
    assert hessian is not None
    assert isinstance(grid, CodebookGrid)
    return lnq(weight, hessian, grid, damp=problem.recipe.gptq.damp)


def has_own_tables(format: Format) -> bool:
    """Whether the levels are tables learned per row or group."""
    return isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat)


def has_integer_codes(format: Format) -> bool:
    """Whether codes are integers, whose steps can be trained."""
    return isinstance(format, IntegerFormat)


HESSIAN: frozenset[Need] = frozenset({"moments", "hessian"})
CROSS: frozenset[Need] = frozenset({"cross"})
GUIDED: frozenset[Need] = frozenset({"guided"})
SOLVERS: Registry[Solver] = Registry("method")
SOLVERS.register("rtn", Solver(about="the nearest level", solve=_rtn))
SOLVERS.register(
    "hqq",
    Solver(
        about="zero points (or scales) of the least l_0.7 error, without text",
        solve=_hqq, accepts=has_integer_codes, moves_scales=True,
        hint="It moves float scales and zero points of integers; use rtn for others without text, gptq with.",
    ),
)  # fmt: skip
SOLVERS.register(
    "gptq", Solver(about="columns in turn, later ones make up for each error", solve=_gptq, needs=HESSIAN)
)  # fmt: skip
SOLVERS.register(
    "gptaq",
    Solver(about="gptq, which also makes up for the quantized blocks before", solve=_gptaq, needs=HESSIAN | CROSS),
)
SOLVERS.register(
    "guided", Solver(about="gptq on Hessians weighted by the end loss", solve=_guided, needs=HESSIAN | GUIDED)
)
SOLVERS.register(
    "guided_gptaq",
    Solver(about="gptaq on Hessians weighted by the end loss", solve=_guided_gptaq, needs=HESSIAN | CROSS | GUIDED),
)
SOLVERS.register(
    "lnq",
    Solver(
        about="learns the tables of kmeans schemes for the output",
        solve=_lnq, needs=HESSIAN, accepts=has_own_tables,
        hint="It learns the tables of kmeans schemes; use gptq or rtn for others.",
    ),
)  # fmt: skip
TRAINED: frozenset[Need] = frozenset({"moments", "hessian", "teacher"})
SOLVERS.register(
    "signround",
    Solver(
        about="learns the roundings and ranges of a whole block by signed gradients",
        solve_block=signround, needs=TRAINED, accepts=has_integer_codes,
        hint="It learns how integers are rounded; use gptq or rtn for others.",
    ),
)  # fmt: skip
SOLVERS.register(
    "block_ap",
    Solver(
        about="trains the weights, scales and zero points of a whole block",
        solve_block=block_ap, needs=TRAINED, accepts=has_integer_codes,
        hint="It trains integer grids; use gptq or rtn for others.",
    ),
)  # fmt: skip
TRAINED_ELSEWHERE = "trained"
# Never asked to solve: `GroupSolver` takes the codes from where training left them.
SOLVERS.register(TRAINED_ELSEWHERE, Solver(about="codes that `bitwright train` has found; not for quantize"))
AUTO = "auto"
# Never asked to solve: `chooser` puts another solver in its place before any block is quantized.
SOLVERS.register(
    AUTO,
    Solver(
        about="tries candidates on some blocks, picks per site, keeps gptq if nothing is better",
        needs=frozenset({"moments", "hessian", "teacher", "cross"}),
    ),
)  # fmt: skip
