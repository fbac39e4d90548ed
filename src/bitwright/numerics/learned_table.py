"""One learned table for a whole weight, with a scale per group: the levels of NF4, fitted instead of assumed.

A codebook per row costs 2^b floats per row, which only long rows can afford. One table for the whole weight costs
nothing, and group scales bring all weights to one shape for it to fit. Both are fitted in turn: given the scales, the
table is a weighted k-means problem over all w / s, each with the weight importance · s² (its error counts in units of
w); given the table, each group's scale is searched like any other. The start is NormalFloat. Neither step is sure to
lower the error (k-means may end in a local optimum, and the search need not try the old scale), so the error is
measured after each round, and the best table and scales are kept.

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
BINS = 2**13
"""Values of w / s are summed into bins, much narrower than the distance between levels."""


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
    levels = torch.tensor(normal_float(format.bits).levels)
    best: Grid | None = None
    best_error = float("inf")
    for _ in range(1 + ROUNDS):
        learned = table_format(format.bits, levels)
        grid = fit_grid(weight, learned, granularity, method="mse", importance=importance, scale=scale)
        error = _error(weight, grid, importance)
        if best is not None and error >= best_error:
            break
        best, best_error = grid, error
        if error == 0:
            break
        levels = _fit_levels(weight, grid, importance, format.bits)
    assert best is not None  # The first round always sets it.
    return best


def _fit_levels(weight: Tensor, grid: Grid, importance: Tensor | None, bits: int) -> Tensor:
    """Return the levels [K] of least error for the weights as the grid scales them."""
    device, wide = weight.device, wide_dtype(weight.device)
    low, high = grid.format.min_value, grid.format.max_value
    mass = torch.zeros(BINS, dtype=wide, device=device)
    moment = torch.zeros(BINS, dtype=wide, device=device)
    counts = _counts(weight, importance)
    span = (high - low) or 1.0  # One value only: all weights are alike, and every bin will do.
    largest = grid.scale.abs().max().to(wide)
    for rows in grid.granularity.row_chunks(weight):
        factors = grid.scale[grid.granularity.scale_rows(rows)].float().unsqueeze(-1)
        scaled = grid.granularity.split(weight[rows].float()) / factors
        # Padding has the importance 0, as `split` pads with it. A common factor of the importance changes nothing.
        share = grid.granularity.split(counts.expand(rows.stop - rows.start, -1))
        share = share * (factors.to(wide) / largest).square()
        # Clipped weights fall into the outermost bins, but count there with their own values.
        position = (scaled - low) * ((BINS - 1) / span)
        index = position.round_().clamp_(0, BINS - 1).long().flatten()
        mass.index_add_(0, index, share.expand_as(scaled).flatten())
        moment.index_add_(0, index, (share * scaled).flatten())
    filled = mass > 0
    values, weights = (moment[filled] / mass[filled]).float(), (mass[filled] / mass.max()).float()
    table = CodebookFormat(bits=bits)
    return fit_codebook(values[None], table, Granularity(kind="tensor"), importance=weights).codebook.flatten()


def _counts(weight: Tensor, importance: Tensor | None) -> Tensor:
    """What each column counts, [1, I] in the widest float; all the same where none is important, as in `fit_grid`."""
    wide = wide_dtype(weight.device)
    if importance is None or not bool((importance > 0).any()):
        return torch.ones(1, weight.shape[1], dtype=wide, device=weight.device)
    return (importance.to(device=weight.device, dtype=wide) / importance.max())[None]


def _error(weight: Tensor, grid: Grid, importance: Tensor | None) -> float:
    """Σ importance · (w - ŵ)² over the weight, up to a common factor of the importance."""
    counts = _counts(weight, importance)
    total = torch.zeros((), dtype=counts.dtype, device=weight.device)
    for rows in grid.granularity.row_chunks(weight):
        dense = weight[rows].float()
        residual = dense - grid.rows(rows.start, rows.stop).fake_quantize(dense)
        total += (residual.to(counts.dtype).square() * counts).sum()
    return float(total)
