"""GPTQ with a Hessian for each group of output channels, in which tokens count as the loss of the model minds them.

Legend: O out features, I in features, C groups of output channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitwright.methods.row_choice import has_scales_of_rows, stacked
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.qtensor import QTensor


def by_rows(
    weight: Tensor,
    hessians: Sequence[tuple[slice, Tensor]],
    grids: Sequence[AnyGrid],
    solve: Callable[[Tensor, Tensor, Sequence[AnyGrid]], QTensor],
) -> QTensor:
    """Solve each group of rows with its own Hessian.

    Args:
        weight: [O, I].
        hessians: rows -> [I, I]; together all rows, in order.
        grids: the levels of every weight; of one granularity, where there are several to choose from.
        solve: (rows of the weight, their Hessian, their grids) -> their codes, on one of the grids or one refitted.
    Reference:
        arXiv:2505.07004 (GuidedQuant), with GPTQ as the layer-wise method. Hessians: see
        `calibration.output_gradients`.
    """
    height = grids[0].granularity.block_rows or 1
    codes: list[Tensor] = []
    chosen: list[AnyGrid] = []
    for rows, hessian in hessians:
        # Rows do not depend on each other: where a group cuts a tile that shares its scale, solve the whole tiles.
        start = rows.start // height * height
        stop = min(-(-rows.stop // height) * height, weight.shape[0])
        part = solve(weight[start:stop], hessian, [grid.rows(start, stop) for grid in grids])
        codes.append(part.codes[rows.start - start : rows.stop - start])
        chosen.append(part.grid)
    return QTensor(codes=torch.cat(codes), grid=_stacked(chosen, grids[0]))


def _stacked(parts: list[AnyGrid], whole: AnyGrid) -> AnyGrid:
    """The grid of all rows; only scales of rows and of groups within them may be others."""
    if not isinstance(whole, Grid) or not has_scales_of_rows(whole):
        return whole
    return stacked([part for part in parts if isinstance(part, Grid)])
