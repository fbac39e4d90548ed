"""What a quantized product means: the arithmetic that every fast kernel must reproduce.

    y[t, o] = sum over groups k of  s_x[t, k] * s_w[o, k] * (sum over the group's columns i of (q_x - z_x)(q_w - z_w))

The inner sums are over codes, not over rounded floats. With integer codes they are integers and are computed exactly:
float32 holds every integer up to 2^24, so columns are taken in runs whose sums stay below it (a matrix product in
float32 is then exact in any order), and the runs are added in float64. With floating-point codes (FP8, FP4) every
single product is exact in float32 and the sum is accumulated in float32, as the hardware does.

Legend: T tokens, O out features, I in features.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.qtensor import QTensor

EXACT_FLOAT32 = 2**24


def linear(x: Tensor, site: QuantizedSite, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` [..., O] as a kernel on codes computes it, in the dtype of x [..., I].

    Raises:
        ShapeError: x has not I columns.
        VerificationError: NaN or Inf in x.
    """
    if site.inputs is None:
        return functional.linear(x, site.weight.dequantize(x.dtype), bias)
    rows = x.reshape(-1, x.shape[-1])
    result = product(site.inputs.quantize(rows), site.weight)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype).reshape(*x.shape[:-1], -1)


def product(x: QTensor, weight: QTensor) -> Tensor:
    """Return `x @ weight.T` [T, O] in float32 for codes x [T, I] and weight [O, I]."""
    x_values, weight_values = _Values(x), _Values(weight)
    exact = x_values.is_integer and weight_values.is_integer
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=_accumulator(exact, x), device=x.codes.device)
    for start, end in _segments(x_values, weight_values):
        columns = slice(start, end)
        partial = _sum_of_products(x_values.values[:, columns], weight_values.values[:, columns], exact)
        scale = x_values.scale(start, x.shape[0])[:, None] * weight_values.scale(start, weight.shape[0])[None]
        total += partial * scale
    return total.float()


class _Values:
    """Values `code - zero_point` of a quantized matrix and the scale of each column's group."""

    def __init__(self, matrix: QTensor) -> None:
        grid = matrix.grid
        self.in_features = grid.in_features
        # Learned levels are numbers of their own, and outliers replace them: both are floats of scale 1.
        self.grid = grid if isinstance(grid, Grid) and matrix.outliers is None else None
        if self.grid is None:
            self.values, self.width = matrix.dequantize(), self.in_features
        else:
            unscaled = Grid(
                format=self.grid.format,
                granularity=self.grid.granularity,
                in_features=self.in_features,
                scale=torch.ones_like(self.grid.scale, dtype=torch.float32),
                zero_point=self.grid.zero_point,
            )
            self.values = unscaled.dequantize(matrix.codes)
            self.width = self.grid.granularity.columns_per_group(self.in_features)

    @property
    def is_integer(self) -> bool:
        return self.grid is not None and isinstance(self.grid.format, IntegerFormat)

    def scale(self, column: int, num_rows: int) -> Tensor:
        """Scale of a column per row, or [1] for all rows."""
        if self.grid is None:
            return torch.ones(1, device=self.values.device)
        return self.grid.column(column, num_rows)[0]


def _segments(x: _Values, weight: _Values) -> Iterator[tuple[int, int]]:
    """Runs of columns over which neither scale changes."""
    borders = {0, x.in_features, *range(0, x.in_features, x.width), *range(0, x.in_features, weight.width)}
    yield from pairwise(sorted(borders))


def _sum_of_products(x: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """Return x [T, n] times weight [O, n] transposed, without rounding if `exact`."""
    if not exact:
        return x @ weight.T
    largest = float(x.abs().max()) * float(weight.abs().max())
    step = max(1, int(EXACT_FLOAT32 // max(largest, 1.0)))
    if step >= x.shape[1]:
        return x @ weight.T
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=wide_dtype(x.device), device=x.device)
    for start in range(0, x.shape[1], step):
        total += x[:, start : start + step] @ weight[:, start : start + step].T
    return total


def _accumulator(exact: bool, x: QTensor) -> torch.dtype:
    return wide_dtype(x.codes.device) if exact else torch.float32
