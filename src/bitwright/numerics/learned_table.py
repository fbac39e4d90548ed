"""One learned table for a whole weight, with a scale per group: the levels of NF4, fitted instead of assumed.

A codebook per row costs 2^b floats per row, which only long rows can afford. One table for the whole weight costs
nothing, and group scales bring all weights to one shape for it to fit. Both are fitted in turn: given the scales, the
table is a weighted k-means problem over all w / s, each with the weight importance · s² (its error counts in units of
w); given the table, each group's scale is searched like any other. Neither step can raise the error, so it falls until
it stands; the best state is kept.

Legend: O out features, I in features, R rows of scales, G groups, K levels.
"""

import torch
from torch import Tensor

from bitwright.numerics.codebook_grid import CodebookFormat, LearnedTableFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.kmeans import fit_codebook
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import ScaleFormat
from bitwright.numerics.table import NF4, TableFormat, normal_float

ROUNDS = 4
BINS = 2**13
"""Values of w / s, which lie between -1 and 1, are summed into bins: much finer than the levels lie apart."""


def table_format(bits: int, levels: Tensor) -> TableFormat:
    """Return the format of a learned table [K] of ascending levels."""
    return TableFormat(name=f"lut{bits}", values=tuple(levels.tolist()))


def fit_learned_table(
    weight: Tensor,
    format: LearnedTableFormat,
    granularity: Granularity,
    *,
    importance: Tensor | None = None,
    scale: ScaleFormat,
) -> Grid:
    """Fit table and scales of a weight.

    Args:
        weight: [O, I], any float dtype; not modified.
        format: how many levels.
        granularity: which weights share a scale.
        importance: [I], E[x_i²] of the inputs; None when all columns count the same.
        scale: how the scales are stored; the table is stored in float32.
    Returns:
        A grid whose format is the learned `TableFormat`.
    Raises:
        As `fit_grid`.
    """
    start = NF4 if format.bits == 4 else normal_float(format.bits)
    grid = fit_grid(weight, start, granularity, method="mse", importance=importance, scale=scale)
    best, best_error = grid, _error(weight, grid, importance)
    for _ in range(ROUNDS):
        learned = table_format(format.bits, _fit_levels(weight, grid, importance, format.bits))
        grid = fit_grid(weight, learned, granularity, method="mse", importance=importance, scale=scale)
        error = _error(weight, grid, importance)
        if error >= best_error:
            break
        best, best_error = grid, error
    return best


def _fit_levels(weight: Tensor, grid: Grid, importance: Tensor | None, bits: int) -> Tensor:
    """Return the levels [K] of least error for the weights as the grid scales them."""
    device, wide = weight.device, wide_dtype(weight.device)
    mass = torch.zeros(BINS, dtype=wide, device=device)
    moment = torch.zeros(BINS, dtype=wide, device=device)
    counts = (
        torch.ones(1, weight.shape[1], device=device) if importance is None else importance[None].to(device).float()
    )
    for rows in grid.granularity.row_chunks(weight):
        factors = grid.scale[grid.granularity.scale_rows(rows)].float().unsqueeze(-1)
        split = grid.granularity.split(weight[rows].float())
        scaled = (split / factors).clamp_(-1, 1)
        # Padding has the importance 0, as `split` pads with it.
        share = grid.granularity.split(counts.expand(rows.stop - rows.start, -1)) * factors.square()
        index = ((scaled + 1) * ((BINS - 1) / 2)).round().long().flatten()
        mass.index_add_(0, index, share.expand_as(scaled).flatten().to(wide))
        moment.index_add_(0, index, (share * scaled).flatten().to(wide))
    filled = mass > 0
    values = (moment[filled] / mass[filled]).float()
    tensor = Granularity(kind="tensor")
    fitted = fit_codebook(
        values[None], CodebookFormat(bits=bits), tensor, importance=(mass[filled] / mass.max()).float()
    )
    return fitted.codebook.flatten()


def _error(weight: Tensor, grid: Grid, importance: Tensor | None) -> float:
    """Σ importance · (w - ŵ)² over the weight."""
    squares = (weight.float() - grid.fake_quantize(weight.float())).square()
    if importance is not None:
        squares *= importance.to(weight.device)
    return float(squares.sum(dtype=wide_dtype(weight.device)))
