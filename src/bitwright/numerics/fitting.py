"""One door to every way of fitting a grid: which one depends on where the format's levels come from.

levels fixed by the format          scales are searched           ranges.fit_grid
-1, 0, 1 and -1, 1                  scales in closed form         level_ranges, where the search says "mse"
a table learned per row or group    weighted k-means              kmeans.fit_codebook
one table learned for the weight    both in turn                  learned_table.fit_learned_table
"""

from typing import cast

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.codebook_grid import CodebookFormat, LearnedTableFormat
from bitwright.numerics.formats import Format, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.kmeans import fit_codebook
from bitwright.numerics.learned_table import fit_learned_table
from bitwright.numerics.level_ranges import optimal_binary, optimal_ternary
from bitwright.numerics.ranges import RangeMethod, fit_grid
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.ternary import BinaryFormat, TernaryFormat

CLOSED_FORMS: dict[type, RangeMethod] = {TernaryFormat: optimal_ternary, BinaryFormat: optimal_binary}


def fit(
    weight: Tensor,
    format: Format,
    granularity: Granularity,
    *,
    method: RangeMethod | str,
    importance: Tensor | None,
    scale: ScaleFormat,
) -> AnyGrid:
    """Choose the grid of a weight [O, I] in any format.

    Args:
        weight: not modified.
        format: a row of `FORMATS`.
        granularity: which weights share a scale or a table.
        method: a name in `RANGE_METHODS` or a method; learned tables always minimise the squared error.
        importance: [I] E[x_i²] of the inputs, or for codebooks also [O, I]; None when all weights count the same.
        scale: how scales are stored; its dtype is that of codebooks.
    Raises:
        RecipeError: a codebook with scales that are not plain floats; otherwise as the functions above.
    """
    if isinstance(format, LearnedTableFormat):
        return fit_learned_table(weight, format, granularity, importance=importance, scale=scale)
    if isinstance(format, CodebookFormat):
        if not isinstance(scale, FloatScale):
            raise RecipeError(f"{format.name}: its tables are stored as plain floats, not as {scale.name}.")
        # Its searches want rows that lie in one piece; the weight of a transposed site does not.
        return fit_codebook(weight.contiguous(), format, granularity, importance=importance, dtype=scale.dtype)
    return _fit_levels(weight, cast(LevelFormat, format), granularity, method, importance, scale)


def _fit_levels(
    weight: Tensor,
    format: LevelFormat,
    granularity: Granularity,
    method: RangeMethod | str,
    importance: Tensor | None,
    scale: ScaleFormat,
) -> AnyGrid:
    closed_form = CLOSED_FORMS.get(type(format)) if method == "mse" else None
    return fit_grid(weight, format, granularity, method=closed_form or method, importance=importance, scale=scale)
