"""GPTQ with a Hessian for each group of output channels, in which tokens count as the loss of the model minds them.

Legend: O out features, I in features, C groups of output channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.qtensor import QTensor


def by_rows(
    weight: Tensor,
    hessians: Sequence[tuple[slice, Tensor]],
    grid: AnyGrid,
    solve: Callable[[Tensor, Tensor, AnyGrid], QTensor],
) -> QTensor:
    """Solve each group of rows with its own Hessian.

    Args:
        weight: [O, I].
        hessians: rows -> [I, I]; together all rows, in order.
        grid: the levels of every weight.
        solve: (rows of the weight, their Hessian, their grid) -> their codes, on that grid or one refitted.
    Reference:
        arXiv:2505.07004 (GuidedQuant), with GPTQ as the layer-wise method. Hessians: see
        `calibration.output_gradients`.
    """
    height = grid.granularity.block_rows or 1
    codes: list[Tensor] = []
    grids: list[AnyGrid] = []
    for rows, hessian in hessians:
        # Rows do not depend on each other: where a group cuts a tile that shares its scale, solve the whole tiles.
        start = rows.start // height * height
        stop = min(-(-rows.stop // height) * height, weight.shape[0])
        part = solve(weight[start:stop], hessian, grid.rows(start, stop))
        codes.append(part.codes[rows.start - start : rows.stop - start])
        grids.append(part.grid)
    return QTensor(codes=torch.cat(codes), grid=_stacked(grids, grid))


def _stacked(parts: list[AnyGrid], whole: AnyGrid) -> AnyGrid:
    """The grid of all rows; only scales of groups within rows may have been refitted."""
    if not isinstance(whole, Grid) or whole.granularity.kind != "group" or whole.stored is not None:
        return whole
    grids = [part for part in parts if isinstance(part, Grid)]
    zero_points = [part.zero_point for part in grids if part.zero_point is not None]
    return replace(
        whole,
        scale=torch.cat([part.scale for part in grids]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )
