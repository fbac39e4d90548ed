"""Single weights kept as floats beside the codes.

A few weights per thousand are so large, or matter so much, that they dictate the range of their whole row. Storing
them apart, with their positions, lets the codes serve the rest. Each costs about 32 bits (position and value) instead
of 4, so that 0.45 % of them add some 0.15 bits per weight.

Legend: O out features, I in features, n outliers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import STORED_DTYPES
from bitwright.numerics.granularity import row_chunks
from bitwright.numerics.kmeans import importance_rows

MAX_SHORT_COLUMNS = 2**16
MAX_INT32_ELEMENTS = 2**31


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SparseOutliers:
    """Values that replace what the codes at their positions stand for.

    Args:
        index: [n], row · I + column, ascending, no two alike; int32, or int64 for 2^31 weights and more.
        value: [n] in the dtype that is stored: float16, bfloat16 or float32; finite.
        shape: (O, I) of the weight.
    Raises:
        ShapeError: index and value differ in length or are not 1-D.
        VerificationError: an index out of order or outside the weight; a value that is not finite; another dtype.
    """

    index: Tensor
    value: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.index.shape != self.value.shape:
            raise ShapeError(
                f"outliers: index {list(self.index.shape)} and value {list(self.value.shape)} must both be [n]."
            )
        if self.index.dtype != _index_dtype(self.shape) or self.value.dtype not in STORED_DTYPES:
            raise VerificationError(
                f"outliers: {self.index.dtype} index and {self.value.dtype} value; use {_index_dtype(self.shape)} and "
                "float16, bfloat16 or float32."
            )
        if not bool((self.index[1:] > self.index[:-1]).all()):
            raise VerificationError("outliers: the index is not ascending; sort it and remove duplicates.")
        if self.index.numel() and not 0 <= int(self.index[0]) <= int(self.index[-1]) < math.prod(self.shape):
            raise VerificationError(f"outliers: an index lies outside a weight {list(self.shape)}.")
        if not bool(torch.isfinite(self.value).all()):
            raise VerificationError("outliers: a value is NaN or Inf. Repair the checkpoint.")

    def __len__(self) -> int:
        return self.index.numel()

    def rows(self, start: int, stop: int) -> "SparseOutliers":
        """Return the outliers of the rows start..stop, with positions counted from the first of these rows."""
        width = self.shape[1]
        borders = torch.tensor([start * width, stop * width], dtype=self.index.dtype, device=self.index.device)
        first, end = torch.searchsorted(self.index, borders).tolist()
        shape = (stop - start, width)
        index = (self.index[first:end] - start * width).to(_index_dtype(shape))
        return SparseOutliers(index=index, value=self.value[first:end], shape=shape)

    def add_to(self, dense: Tensor) -> Tensor:
        """Write the stored values into `dense` [O, I], in place and in its dtype, and return it.

        Raises:
            ShapeError: another shape, or not contiguous.
        """
        if tuple(dense.shape) != self.shape or not dense.is_contiguous():
            raise ShapeError(
                f"outliers: a tensor {list(dense.shape)} is not a contiguous weight {list(self.shape)}; pass what "
                "dequantize returns."
            )
        dense.view(-1)[self.index.long()] = self.value.to(dense.dtype)
        return dense

    @property
    def num_bits(self) -> int:
        """Bits of `tensors()`: values and, whichever is less, flat positions or columns and row starts."""
        position_bits = self._row_layout_bits() if self._by_row() else len(self) * torch.iinfo(self.index.dtype).bits
        return len(self) * torch.finfo(self.value.dtype).bits + position_bits

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores, in the smaller of two layouts.

        Flat: `index` [n], `value` [n]. By row (compressed sparse rows): `row_start` int32 [O + 1], position in `value`
        at which each row begins; `column` [n], uint16 for up to 65536 columns, else int32; `value` [n].
        """
        if not self._by_row():
            return {"index": self.index, "value": self.value}
        width = self.shape[1]
        first_of_row = torch.arange(self.shape[0] + 1, dtype=torch.int64, device=self.index.device) * width
        row_start = torch.searchsorted(self.index.long(), first_of_row).to(torch.int32)
        column = (self.index % width).to(_column_dtype(width))
        return {"row_start": row_start, "column": column, "value": self.value}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> "SparseOutliers":
        """Undo `tensors`.

        Raises:
            CheckpointError: neither layout's names.
            ShapeError: rows that do not fit the shape or the values.
            VerificationError: a position outside the shape or out of order; values as for the constructor.
        """
        if set(tensors) == {"index", "value"}:
            return SparseOutliers(index=tensors["index"], value=tensors["value"], shape=shape)
        if set(tensors) != {"row_start", "column", "value"}:
            raise CheckpointError(
                f"outliers: tensors {sorted(tensors)}; expected index and value, or row_start, column and value."
            )
        row_start, column = tensors["row_start"].long(), tensors["column"].long()
        counts = row_start.diff()
        if (
            counts.numel() != shape[0]
            or int(row_start[0])
            or int(row_start[-1]) != len(column)
            or int(counts.min()) < 0
        ):
            raise ShapeError(f"outliers: row_start does not divide {len(column)} values into {shape[0]} rows.")
        if bool((column >= shape[1]).any()):
            raise VerificationError(f"outliers: a column lies outside a weight {list(shape)}.")
        row = torch.arange(shape[0], device=column.device).repeat_interleave(counts)
        index = (row * shape[1] + column).to(_index_dtype(shape))
        return SparseOutliers(index=index, value=tensors["value"], shape=shape)

    def to(self, device: torch.device | str) -> "SparseOutliers":
        """Return the same outliers on a device."""
        return SparseOutliers(index=self.index.to(device), value=self.value.to(device), shape=self.shape)

    def _by_row(self) -> bool:
        return self._row_layout_bits() < len(self) * torch.iinfo(self.index.dtype).bits

    def _row_layout_bits(self) -> int:
        return (self.shape[0] + 1) * 32 + len(self) * torch.iinfo(_column_dtype(self.shape[1])).bits


def split_outliers(
    weight: Tensor,
    fraction: float,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, SparseOutliers]:
    """Take the weights that matter most out of a weight: the largest |w|, or the largest importance · w².

    Exactly ceil(fraction · O · I) are taken; of equal ones the first. Works through rows in chunks.

    Args:
        weight: [O, I], any float dtype; not modified.
        fraction: share of the weights, 0 up to but not including 1; 0.0005 to 0.0045 is usual.
        importance: [I], E[x_i²] of the inputs, or [O, I], Fisher information; >= 0.
        dtype: float16, bfloat16 or float32, in which the values are stored; None for that of the weight, which is
            lossless.
    Returns:
        A copy of the weight with 0 in the place of each outlier, and the outliers. 0 widens no range, since every
        range includes it, and draws no codebook entry away from where weights are many. To keep the zeros out of a
        fit altogether, give them the importance 0.
    Raises:
        ShapeError: the weight is not [O, I] or is empty; the importance is neither [I] nor [O, I].
        VerificationError: NaN or Inf in the weight or the importance; a negative importance.
        RecipeError: fraction outside [0, 1); a dtype that is not stored or cannot hold a value.
    Reference:
        SqueezeLLM, arXiv:2306.07629, section 4.2. Differs: one score for range and sensitivity; the values replace the
        decoded ones instead of being added to them, so that the code of an outlier does not matter.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ShapeError(f"outliers: a weight must be [O, I] and not empty, not {list(weight.shape)}.")
    if not 0 <= fraction < 1:
        raise RecipeError(f"outliers: fraction {fraction} is outside [0, 1). Use 0.0045 for 0.45 %.")
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in STORED_DTYPES:
        raise RecipeError(f"outliers: values are float32, float16 or bfloat16, not {dtype}.")
    if importance is not None:
        importance = importance_rows(importance, weight, "outliers")
    shape = (weight.shape[0], weight.shape[1])
    # Of the decimal number that was written: 0.07 · 100 is 7, though its binary neighbour times 100 exceeds 7.
    count = math.ceil(Fraction(str(fraction)) * weight.numel())
    index = _largest(weight, importance, count)
    dense = weight.clone(memory_format=torch.contiguous_format)
    exact = dense.view(-1)[index]
    value = exact.to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise RecipeError(f"outliers: a value exceeds the largest {dtype}. Store bfloat16 or float32 values.")
    dense.view(-1)[index] = 0
    return dense, SparseOutliers(index=index.to(_index_dtype(shape)), value=value, shape=shape)


def _largest(weight: Tensor, importance: Tensor | None, count: int) -> Tensor:
    """Return the flat positions (int64, ascending) of the `count` highest scores."""
    top = torch.empty(0, device=weight.device)
    for rows in row_chunks(weight):
        score = _score(weight, importance, rows)
        if not bool(torch.isfinite(score).all()):
            raise VerificationError("outliers: the weight holds NaN or Inf. Repair the checkpoint.")
        top = torch.cat([top, score])
        top = top.topk(min(count, top.numel())).values
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=weight.device)
    threshold = top[-1]
    num_equal = count - int((top > threshold).sum())
    found: list[Tensor] = []
    for rows in row_chunks(weight):
        score = _score(weight, importance, rows)
        equal = score == threshold
        taken = (score > threshold) | (equal & (equal.cumsum(0) <= num_equal))
        num_equal -= int((taken & equal).sum())
        found.append(taken.nonzero().squeeze(1) + rows.start * weight.shape[1])
    return torch.cat(found)


def _score(weight: Tensor, importance: Tensor | None, rows: slice) -> Tensor:
    """What losing each weight of some rows would cost, float32 [r · I]; the root of it, which overflows later."""
    score = weight[rows].float().abs()
    if importance is not None:
        score = score * (importance[rows] if importance.shape[0] > 1 else importance).float().sqrt()
    return score.flatten()


def _index_dtype(shape: tuple[int, int]) -> torch.dtype:
    return torch.int32 if math.prod(shape) < MAX_INT32_ELEMENTS else torch.int64


def _column_dtype(num_columns: int) -> torch.dtype:
    return torch.uint16 if num_columns <= MAX_SHORT_COLUMNS else torch.int32
