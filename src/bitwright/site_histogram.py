"""How the weights of a site lie between the levels of its grid: a histogram small enough to be kept for every site.

A site has one grid per group, so there is no one set of levels to draw. What is kept are the levels of a typical group:
the one whose scale is the median of all. Weights come as they are coded: after transforms, without what is stored
apart.

Legend: O out features, I in features, R rows of scales, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.codebook_grid import CodebookGrid
from bitwright.numerics.formats import Format
from bitwright.numerics.granularity import row_chunks
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.qtensor import QTensor

NUM_BINS = 64
MAX_LEVELS = 32
"""A grid of 6 or more bits has levels so close that they say nothing in a picture."""
REACH = 6.0
"""Half the width in standard deviations: a single outlier must not push all other weights into one bin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteHistogram:
    """Where the weights of a site lie.

    Attributes:
        low: lower end of the first bin; weights below it are counted in that bin.
        high: upper end of the last bin; weights above it are counted there.
        counts: weights per bin, bins of equal width.
        levels: ascending levels of a typical group; None where there are more than `MAX_LEVELS`.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    levels: tuple[float, ...] | None


def site_histogram(weight: Tensor, quantized: QTensor) -> SiteHistogram | None:
    """Count the weights [O, I] of a site, and find the levels of a typical group.

    Args:
        weight: as it was coded; float32.
        quantized: what became of it.
    Returns:
        None where all weights are equal.
    """
    low, high = _ends(weight)
    if not low < high:
        return None
    counts = torch.zeros(NUM_BINS, dtype=torch.int64)
    for rows in row_chunks(weight):  # float32 counts whole numbers exactly only as far as one chunk goes
        inside = weight[rows].float().clamp(low, high)
        counts += torch.histc(inside, bins=NUM_BINS, min=low, max=high).cpu().to(torch.int64)
    levels = typical_levels(quantized.grid)
    return SiteHistogram(low=low, high=high, counts=tuple(counts.tolist()), levels=levels)


def typical_levels(grid: AnyGrid) -> tuple[float, ...] | None:
    """Return the ascending levels of the group whose scale is the median of all; None where they are many.

    Of two groups in the middle it is the one with the smaller scale. A grid that is neither of codes and scales nor of
    tables has no levels to tell.
    """
    if grid.format.num_codes > MAX_LEVELS:
        return None
    if isinstance(grid, CodebookGrid):
        row, group = _median_place(grid.codebook.float().abs().amax(-1))
        return _ascending(grid.codebook[row, group])
    if not isinstance(grid, Grid):
        return None
    row, group = _median_place(grid.scale.float().abs())
    zero_point = None if grid.zero_point is None else grid.zero_point[row, group].float()
    values = grid.format.decode(_used_codes(grid.format).to(grid.device), zero_point)
    return _ascending(values * grid.scale[row, group].float())


def _used_codes(format: Format) -> Tensor:
    if isinstance(format, MinifloatFormat):  # bit patterns: the sign is the first bit, and -0 is not used
        positive = torch.arange(format.max_code + 1)
        return torch.cat([positive, positive[1:] + 2 ** (format.bits - 1)]).to(format.code_dtype)
    first = format.qmin if isinstance(format, IntegerFormat) else format.min_code
    return torch.arange(first, first + format.num_codes).to(format.code_dtype)


def _median_place(sizes: Tensor) -> tuple[int, int]:
    """Row and group of the lower median of sizes [R, G]."""
    place = int(sizes.flatten().argsort(stable=True)[(sizes.numel() - 1) // 2])
    return divmod(place, sizes.shape[1])


def _ascending(levels: Tensor) -> tuple[float, ...]:
    return tuple(sorted(set(levels.float().tolist())))


def _ends(weight: Tensor) -> tuple[float, float]:
    """`REACH` standard deviations to either side of the mean, but no further than the weights go."""
    deviation, mean = torch.std_mean(weight.float(), correction=0)
    spread = REACH * float(deviation)
    return max(float(weight.min()), float(mean) - spread), min(float(weight.max()), float(mean) + spread)
