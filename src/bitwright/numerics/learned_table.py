"""One learned table for a whole weight, with a scale per group: the levels of NF4, fitted instead of assumed.

A codebook per row costs 2^b floats per row, which only long rows can afford. One table for the whole weight costs
nothing, and group scales bring all weights to one shape for it to fit. Both are fitted in turn: given the scales, the
table is a weighted k-means problem over all w / s, each with the weight importance · s² (its error counts in units of
w); given the table, each group's scale is searched like any other. The start is NormalFloat.

Searching scales is what takes time, and a table of 16 levels needs no millions of weights to be known well. So the
rounds work on a sample of rows, evenly spread. Only then are the scales of the whole weight searched, once below the
learned table and once below the start; the better pair is kept, so that a sample that misleads costs nothing.

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
from bitwright.numerics.table import TableFormat, normal_float

ROUNDS = 4
SAMPLE = 2**15
"""Weights that a table is learned on, about: two thousand for each of 16 levels."""
_GOLDEN = (5**0.5 - 1) / 2


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
    """Fit table and scales of a weight; never worse than NormalFloat of as many bits with searched scales.

    Args:
        weight: [O, I], any float dtype; not modified.
        format: how many levels.
        granularity: which weights share a scale.
        importance: [I], E[x_i²] of the inputs; None when all columns count the same.
        scale: how the scales are stored; the table is stored in float32.
    Returns:
        A grid whose format is the learned `TableFormat`.
    Raises:
        RecipeError: other than 2 to 4 bits.
        Otherwise as `fit_grid`.
    """
    start = table_format(format.bits, torch.tensor(normal_float(format.bits).levels))
    best, best_error = _search_scales(weight, start, granularity, importance, scale)
    learned = _learn(_sample(weight, granularity), start, granularity, importance, scale)
    if learned != start:
        grid, error = _search_scales(weight, learned, granularity, importance, scale)
        best = grid if error < best_error else best
    return best


def _search_scales(
    weight: Tensor, table: TableFormat, granularity: Granularity, importance: Tensor | None, scale: ScaleFormat
) -> tuple[Grid, float]:
    """Return the best scales below a table, and Σ importance · (w - ŵ)², up to a factor of the importance alone."""
    grid = fit_grid(weight, table, granularity, method="mse", importance=importance, scale=scale)
    counts = _counts(weight, importance)
    error = torch.zeros((), dtype=counts.dtype, device=weight.device)
    for rows in granularity.row_chunks(weight):
        dense = weight[rows].float()
        residual = dense - grid.rows(rows.start, rows.stop).fake_quantize(dense)
        error += (residual.to(counts.dtype).square() * counts).sum()
    return grid, float(error)


def _sample(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return about `SAMPLE` weights: whole rows, or whole tiles of rows where these share scales; at least one.

    The multiples of the golden ratio fill the unit interval evenly, and those of its first share belong to rows that
    are spread as evenly, without a period: rows at a fixed stride could all have one place in their attention heads.
    """
    share = SAMPLE / weight.numel()
    if share >= 1:
        return weight
    tile = torch.arange(weight.shape[0]) // (granularity.block_rows or 1)
    return weight[(tile * _GOLDEN % 1 < share).to(weight.device)]


def _learn(
    weight: Tensor, start: TableFormat, granularity: Granularity, importance: Tensor | None, scale: ScaleFormat
) -> TableFormat:
    """Fit scales and table in turn, and return the last table that was not seen to be worse than the one before.

    Neither step is sure to lower the error: k-means may end in a local optimum, and the search need not try the old
    scale. So the error is measured in each round, except for the last table, which the whole weight will judge.
    """
    table = best = start
    best_error = float("inf")
    for _ in range(ROUNDS):
        grid, error = _search_scales(weight, table, granularity, importance, scale)
        if error >= best_error:
            return best
        best, best_error = table, error
        if error == 0:
            return best
        levels = _fit_levels(weight, grid, importance, start.bits)
        largest = levels.abs().max()
        if largest == 0:  # Whatever counts vanishes beside the weights that share its scales.
            return best
        # Like the start's, the largest level is 1: what a table measures is left to its scales. No level is so near to
        # 0 that the scale which brings it to the largest weight would overflow.
        levels = levels / largest
        levels[levels.abs() < torch.finfo(levels.dtype).eps] = 0
        table = table_format(start.bits, levels)
    return table


def _fit_levels(weight: Tensor, grid: Grid, importance: Tensor | None, bits: int) -> Tensor:
    """Return the levels [K] of least error for the weights as the grid scales them."""
    split, factors = grid.granularity.split, grid.scale.float().unsqueeze(-1)
    scaled = split(weight.float()) / factors
    counts = split(_counts(weight, importance).expand(weight.shape))
    counts = counts * (factors.to(counts.dtype) / factors.abs().max()).square()
    # Padding has the importance 0, as `split` pads with it, and goes with the columns that do not count.
    counting = counts > 0
    values, counts = scaled[counting][None], counts[counting][None]
    table, whole = CodebookFormat(bits=bits), Granularity(kind="tensor")
    return fit_codebook(values, table, whole, importance=counts).codebook.flatten()


def _counts(weight: Tensor, importance: Tensor | None) -> Tensor:
    """What each column counts, [1, I] in the widest float; all the same where none is important, as in `fit_grid`."""
    wide = wide_dtype(weight.device)
    if importance is None or not bool((importance > 0).any()):
        return torch.ones(1, weight.shape[1], dtype=wide, device=weight.device)
    return (importance.to(device=weight.device, dtype=wide) / importance.max())[None]
