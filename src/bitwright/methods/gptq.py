"""GPTQ: round columns in turn and let the columns not yet rounded make up for each error.

Rounding column j by an error e changes the layer's output by e·x_j. Inputs are correlated, so later columns can cancel
most of it: the optimal update of the remaining weights is -e/U_jj · U_j,j: with U the upper Cholesky factor of the
inverse Hessian. Columns are worked through in blocks, and blocks in halves; a column is updated before it is rounded,
by matrix products of several errors at a time. That is a matter of speed only: the result does not depend on it.

Two ways of treating the scales of groups of columns exist. With `act_order` the columns are visited by descending
Hessian diagonal (the most active inputs are rounded first, while everything can still compensate), and all grids are
fixed beforehand, so that the checkpoint needs no permutation. Without it columns are visited in storage order and a
group's grid may be refitted, when the sweep reaches it, to the weights as the updates have left them.

Shapes: O out features, I in features, G groups.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.numerics.grid import AnyGrid, Grid, Rounder
from bitwright.numerics.linalg import damped_inverse_cholesky, dead_columns
from bitwright.numerics.qtensor import QTensor

Refit = Callable[[Tensor, int, int], AnyGrid]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: AnyGrid,
    *,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = True,
    refit: Refit | None = None,
) -> QTensor:
    """Round columns in turn, pushing each error onto the columns not yet rounded.

    Minimises tr(E H E^T), E = weight - result, greedily in column order.

    Args:
        weight: [O, I] float32 or float64; not modified.
        hessian: [I, I], (2/T) X^T X over T tokens; symmetric PSD; activation units squared.
        grid: the levels of every weight; fixed unless `refit` is given.
        damp: fraction of mean(diag H) added to the diagonal; > 0; raised in steps while no factor exists.
        block: columns per lazy update; a group where grids are refitted. Changes speed, never the result.
        act_order: visit columns by descending diag H.
        refit: (current weights of the group [O, g], first column, end column) -> grid of that group; only without
            act_order, and only for a `Grid` of float scales.
    Raises:
        SingularHessian: no Cholesky factor even with the largest damping.
    Reference:
        arXiv:2210.17323, Alg. 1. Differs: group scales see in-block updates; act-order keeps static groups (no g_idx).
    """
    if act_order and refit is not None:
        raise ValueError("act_order visits columns out of order, so groups cannot be refitted on the way")
    num_columns = weight.shape[1]
    dead = dead_columns(hessian)
    order, factor = _ordered_factor(hessian, dead, damp, act_order=act_order)
    work = weight.T.index_select(0, order)  # a column of the weight is contiguous
    work[dead[order]] = 0.0
    factor /= factor.diagonal().clone().unsqueeze(1)  # an error e then moves later columns by -e · U_j,j:
    sweep = _Sweep(work, factor.to(weight.dtype), order.tolist(), grid, refit)
    step = block if refit is None else sweep.group_size
    for start in range(0, num_columns, step):
        end = min(start + step, num_columns)
        if refit is not None:
            sweep.refit_group(start, end)
        sweep.round(start, end)
        sweep.update(start, end, num_columns)
    return sweep.result()


def compensated(weight: Tensor, result: QTensor, hessian: Tensor, *, damp: float, act_order: bool) -> Tensor:
    """Return the weight [O, I] as GPTQ's updates had left it when each column was rounded.

    Rounding it to nearest gives GPTQ's codes again. With U the factor and E the scaled errors of all columns, the
    updated weight is W' = W - E (U - diag U), and E diag U = W' - Q, so that E U = W - Q.

    Args:
        weight: [O, I], as given to `gptq`, like the other arguments.
        result: what `gptq` made of it, without `refit`.
        hessian: [I, I].
        damp: as given to `gptq`.
        act_order: as given to `gptq`.
    """
    dead = dead_columns(hessian)
    order, factor = _ordered_factor(hessian, dead, damp, act_order=act_order)
    wide = factor.dtype
    rounded = result.dequantize().to(wide)
    error = (weight.to(wide).masked_fill(dead, 0.0) - rounded)[:, order]
    scaled = torch.linalg.solve_triangular(factor, error, upper=True, left=False)
    moved = torch.empty_like(rounded)
    moved[:, order] = scaled * factor.diagonal()
    return (rounded + moved).to(weight.dtype)


def _ordered_factor(hessian: Tensor, dead: Tensor, damp: float, *, act_order: bool) -> tuple[Tensor, Tensor]:
    """The order of the columns and the upper Cholesky factor [I, I] of the inverse Hessian in that order."""
    diagonal, num_columns = hessian.diagonal(), hessian.shape[0]
    order = torch.arange(num_columns, device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order]
    ordered.diagonal()[dead[order]] = _stand_in(diagonal[~dead])
    return order, damped_inverse_cholesky(ordered, damp)


class _Sweep:
    """The columns in the order of their visit, the codes chosen so far and the grid they refer to.

    Args:
        work: [I, O] in that order; once a column is rounded, its error stands in its place.
        factor: [I, I], upper triangular with ones on the diagonal.
        order: which column of the weight each of `work` is.
    """

    def __init__(self, work: Tensor, factor: Tensor, order: list[int], grid: AnyGrid, refit: Refit | None) -> None:
        self.work, self.factor, self.order, self.grid, self.refit = work, factor, order, grid, refit
        self.own = _own_copy(grid) if refit is not None and isinstance(grid, Grid) else None
        self.group_size = grid.granularity.columns_per_group(grid.in_features)
        self.rounders: dict[int, Rounder] = {}  # by group, whose columns have the same levels
        self.codes = torch.empty(work.shape, dtype=grid.format.code_dtype, device=grid.device)

    def round(self, start: int, end: int) -> None:
        """Round the columns start … end; all updates from those before have been made.

        Halves, the first of which updates the second by one matrix product: memory is passed over a few times, where
        an update for every column would pass over all the columns that are left.
        """
        if end - start == 1:
            self._round_column(start)
            return
        middle = (start + end) // 2
        self.round(start, middle)
        self.update(start, middle, end)
        self.round(middle, end)

    def update(self, start: int, middle: int, end: int) -> None:
        """Let the columns middle … end make up for the errors of start … middle."""
        self.work[middle:end].addmm_(self.factor[start:middle, middle:end].T, self.work[start:middle], alpha=-1.0)

    def refit_group(self, start: int, end: int) -> None:
        """Fit the group's grid to its weights with every update applied."""
        assert self.refit is not None
        assert self.own is not None
        fitted = self.refit(self.work[start:end].T, start, end)
        assert isinstance(fitted, Grid)
        group = start // self.group_size
        self.own.scale[:, group] = fitted.scale[:, 0]
        if self.own.zero_point is not None and fitted.zero_point is not None:
            self.own.zero_point[:, group] = fitted.zero_point[:, 0]

    def result(self) -> QTensor:
        return QTensor(codes=self.codes.T.contiguous(), grid=self.own or self.grid)

    def _round_column(self, position: int) -> None:
        column, values = self.order[position], self.work[position]
        group = column // self.group_size
        if group not in self.rounders:
            self.rounders[group] = (self.own or self.grid).rounder(column, values.shape[0])
        self.codes[column], levels = self.rounders[group](values)
        values -= levels


def _stand_in(live: Tensor) -> Tensor:
    """What to put on the diagonal of dead columns: the mean of the others, which leaves the damping what it was."""
    return live.mean() if live.numel() else live.new_ones(())


def _own_copy(grid: Grid) -> Grid:
    zero_point = None if grid.zero_point is None else grid.zero_point.clone()
    return replace(grid, scale=grid.scale.clone(), zero_point=zero_point)
