"""What a quantized product means: the arithmetic that every fast kernel must reproduce.

    y[t, o] = sum over groups k of  s_x[t, k] * s_w[o, k] * (sum over the group's columns i of (q_x - z_x)(q_w - z_w))

With integer codes the inner sums are integers and are computed exactly: float32 holds every integer up to 2^24, so
columns are taken in runs whose sums stay below it (a matrix product in float32 is then exact in any order), and the
runs are added in float64. In float64 the product of two float32 scales is exact as well, so that each group rounds
once, and the result once more to float32.

With floating-point codes (FP8, FP4), tables or float zero points the hardware accumulates in float32. So does this: it
multiplies the dequantized values, which moves the scales into the sum, and rounds each value once more at most.

Inputs may be transformed before they become codes, some columns may stay floats (their inputs are then 0 among the
codes), a matrix of low rank may meet what the inputs' codes stand for, and a correction may be added: see
`QuantizedSite`.

Legend: T tokens, O out features, I in features.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import ShapeError
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
    if x.shape[-1:] != site.weight.shape[1:]:
        raise ShapeError(f"linear: inputs {list(x.shape)} must be [..., {site.weight.shape[1]}].")
    if site.inputs is None or x.numel() == 0:
        result = functional.linear(x, site.dense(x.dtype), bias)
        return result if site.correction is None else (result.float() + site.correction).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if site.transform is not None:
        rows = site.transform.apply(rows)
    apart: Tensor | None = None
    if site.columns is not None:
        index = site.columns.index.long()
        apart = rows[:, index].float() @ site.columns.weight.float().T
        rows = rows.index_fill(1, index, 0.0)
    codes = site.inputs.quantize(rows)
    result = product(codes, site.weight)
    thin = None if site.low_rank is None else site.low_rank.apply(codes.dequantize())
    for addend in (apart, thin, site.correction, bias):
        if addend is not None:
            result = result + addend.float()
    return result.to(x.dtype).reshape(*x.shape[:-1], -1)


def product(x: QTensor, weight: QTensor) -> Tensor:
    """Return `x @ weight.T` [T, O] in float32 for codes x [T, I] and weight [O, I].

    Raises:
        ShapeError: different I.
    """
    if x.shape[1] != weight.shape[1]:
        raise ShapeError(f"product: inputs {list(x.shape)} and weight {list(weight.shape)} must have as many columns.")
    x_grid, weight_grid = _integer_grid(x), _integer_grid(weight)
    if x_grid is None or weight_grid is None:
        return x.dequantize() @ weight.dequantize().T
    x_values, weight_values = _integers(x.codes, x_grid), _integers(weight.codes, weight_grid)
    # Rounded down, and at least 1: no product of two numbers of 8 bits exceeds 2^17.
    run = int(EXACT_FLOAT32 // max(1.0, float(x_values.abs().max()) * float(weight_values.abs().max())))
    wide = wide_dtype(x.codes.device)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=wide, device=x.codes.device)
    for start, end in _segments(x_grid, weight_grid):
        x_scale, weight_scale = x_grid.column(start, x.shape[0])[0], weight_grid.column(start, weight.shape[0])[0]
        sums = _exact_product(x_values[:, start:end], weight_values[:, start:end], run)
        total += sums.mul_(x_scale.to(wide)[:, None] * weight_scale.to(wide))
    return total.float()


def _integer_grid(matrix: QTensor) -> Grid | None:
    """The grid of integer codes; None for other codes, for those less a fraction, and where outliers replace some."""
    grid = matrix.grid
    if not isinstance(grid, Grid) or not isinstance(grid.format, IntegerFormat) or matrix.outliers is not None:
        return None
    return None if grid.format.float_zero else grid


def _integers(codes: Tensor, grid: Grid) -> Tensor:
    """Return `code - zero_point` in float32, exactly."""
    unit = torch.ones_like(grid.scale, dtype=torch.float32)
    return replace(grid, scale=unit, stored=None).dequantize(codes)


def _segments(x: Grid, weight: Grid) -> Iterator[tuple[int, int]]:
    """Runs of columns over which neither scale changes."""
    widths = [grid.granularity.columns_per_group(grid.in_features) for grid in (x, weight)]
    borders = {x.in_features, *(start for width in widths for start in range(0, x.in_features, width))}
    yield from pairwise(sorted(borders))


def _exact_product(x: Tensor, weight: Tensor, run: int) -> Tensor:
    """Return x [T, n] times weight [O, n] transposed, in the widest float; float32 adds `run` columns exactly."""
    runs = (slice(start, start + run) for start in range(0, x.shape[1], run))
    first = next(runs)
    total = (x[:, first] @ weight[:, first].T).to(wide_dtype(x.device))
    for columns in runs:
        total += x[:, columns] @ weight[:, columns].T
    return total
