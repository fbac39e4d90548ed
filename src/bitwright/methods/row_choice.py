"""Several results for one weight, of which each row takes its best: rows of a weight do not depend on each other.

The range that rounds to nearest with the least error is not always the one with which GPTQ ends lowest: GPTQ moves the
weights on its way, and those of a clipped range can no longer follow. Which range wins differs from row to row. All are
tried in one sweep, as rows of one weight: a column costs little more for many rows than for few.

Legend: O out features, I in features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.numerics.grid import Grid
from bitwright.numerics.qtensor import QTensor


def solve_on_each(
    target: Tensor, hessian: Tensor, grids: Sequence[Grid], solve: Callable[[Tensor, Tensor, Grid], QTensor]
) -> QTensor:
    """Solve a weight on each of the grids and let every row take the one that serves it best.

    Args:
        target: [O, I].
        hessian: [I, I].
        grids: of one format and granularity; see `has_scales_of_rows`.
        solve: (weight [N, I], hessian, grid of its rows) -> their codes, on that grid; row by row.
    """
    num_rows = target.shape[0]
    result = solve(target.repeat(len(grids), 1), hessian, stacked(grids))
    starts = range(0, num_rows * len(grids), num_rows)
    return best_rows(target, hessian, [result.rows(start, start + num_rows) for start in starts])


def best_rows(target: Tensor, hessian: Tensor, results: Sequence[QTensor]) -> QTensor:
    """Return, row by row, the result of the least squared error of the outputs; the first where they tie.

    Args:
        target: [O, I], what the results stand in for.
        hessian: [I, I], a multiple of X^T X.
        results: codes on grids of one format and granularity whose scales belong to single rows and are stored as
            floats.
    """
    losses = torch.stack([_row_losses(target - result.dequantize(target.dtype), hessian) for result in results])
    choice = losses.nan_to_num(math.inf).argmin(0)
    grids = [result.grid for result in results if isinstance(result.grid, Grid)]
    zero_points = [grid.zero_point for grid in grids if grid.zero_point is not None]
    grid = replace(
        grids[0],
        scale=_picked(choice, [grid.scale for grid in grids]),
        zero_point=_picked(choice, zero_points) if zero_points else None,
    )
    return QTensor(codes=_picked(choice, [result.codes for result in results]), grid=grid)


def stacked(grids: Sequence[Grid]) -> Grid:
    """Return the grid of the rows of all these grids, one after the other; see `has_scales_of_rows`."""
    zero_points = [grid.zero_point for grid in grids if grid.zero_point is not None]
    return replace(
        grids[0],
        scale=torch.cat([grid.scale for grid in grids]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )


def has_scales_of_rows(grid: object) -> bool:
    """Whether every scale belongs to one row and is stored as the float it is."""
    if not isinstance(grid, Grid) or grid.stored is not None:
        return False
    return grid.granularity.kind in ("channel", "group") and grid.granularity.block_rows is None


def _row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T of every row [O]."""
    return ((error @ hessian.to(error.dtype)) * error).sum(-1)


def _picked(choice: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    picked = tensors[0].clone()
    for index, tensor in enumerate(tensors[1:], start=1):
        rows = choice == index
        picked[rows] = tensor[rows]
    return picked
