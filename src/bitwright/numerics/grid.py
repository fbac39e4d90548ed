"""A grid: the numbers that each weight may take.

`w ≈ scale * (code - zero_point)`; the grid is the format, the scales and the zero points. `AnyGrid` is what solvers
need of a grid, whether its levels come from a format and a scale (`Grid`) or from a learned table (`CodebookGrid`).

Legend: O out features, I in features, R rows of scales, G groups, j a column.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.formats import Format, LevelFormat, has_float_zero, num_zero_point_bits
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE
from bitwright.numerics.scales import StoredScale
from bitwright.numerics.table import TABLES, TableFormat

Rounder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights [O] of a column -> their codes [O] and float32 levels [O]."""


class AnyGrid(Protocol):
    """The levels that each weight of a matrix may take."""

    @property
    def format(self) -> Format:
        """What the codes are."""
        ...

    @property
    def granularity(self) -> Granularity:
        """Which weights share their levels."""
        ...

    @property
    def in_features(self) -> int:
        """Columns, I."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the grid's tensors are."""
        ...

    @property
    def num_metadata_bits(self) -> int:
        """Bits of everything stored beside the codes."""
        ...

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the codes [O, I] of the levels nearest to the weight [O, I]."""
        ...

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the levels [O, I] that the codes stand for."""
        ...

    def rounder(self, j: int, num_rows: int) -> Rounder:
        """Return what rounds column j, and any other of its group, to the nearest levels."""
        ...

    def rows(self, start: int, stop: int) -> "AnyGrid":
        """Return the grid of some rows."""
        ...

    def columns(self, start: int, stop: int) -> "AnyGrid":
        """Return the grid of some columns; both ends must be group borders."""
        ...

    def fits(self, num_rows: int) -> bool:
        """Whether a matrix of so many rows lies on this grid."""
        ...

    def to(self, device: torch.device | str) -> "AnyGrid":
        """Return the same grid on a device."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """Scales and zero points of one weight.

    Args:
        format: the codes.
        granularity: which weights share a scale.
        in_features: I; needed since the last group may be ragged.
        scale: [R, G] (see `Granularity`), as it multiplies the codes; never 0; may be negative, which gives the extra
            code of a full symmetric range to the positive side.
        zero_point: of the same shape, int32, or float16 where the format has float zero points; None when it is
            symmetric.
        stored: how the scale is stored where that is not as the float tensor `scale` itself (E8M0, two-level FP8,
            double quantization); `scale` holds its values.
    Raises:
        ShapeError: scale or zero point do not fit the granularity, or the zero point not the format.
        VerificationError: a scale is 0 or not finite, or a zero point is not finite.
    """

    format: LevelFormat
    granularity: Granularity
    in_features: int
    scale: Tensor
    zero_point: Tensor | None
    stored: StoredScale | None = None

    def __post_init__(self) -> None:
        if self.scale.ndim != 2:
            raise ShapeError(f"grid: scale must be [rows, groups], not {list(self.scale.shape)}.")
        num_rows = 1 if self.granularity.spans_rows else self.scale.shape[0]
        expected = (num_rows, self.granularity.num_groups(self.in_features))
        if tuple(self.scale.shape) != expected:
            raise ShapeError(
                f"grid: scale {list(self.scale.shape)} does not fit {self.granularity.kind} granularity over "
                f"{self.in_features} columns: expected {list(expected)}."
            )
        if (self.zero_point is None) != self.format.symmetric:
            raise ShapeError(
                f"grid: format {self.format.name} takes {'no' if self.format.symmetric else 'a'} zero point."
            )
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ShapeError(f"grid: zero point {list(self.zero_point.shape)}, scale {list(self.scale.shape)} differ.")
        if not bool(((self.scale != 0) & torch.isfinite(self.scale)).all()):
            raise VerificationError("grid: a scale is 0 or not finite; fit the grid again on a finite weight.")
        if self.zero_point is not None:
            is_float = self.zero_point.dtype == FLOAT_ZERO_DTYPE
            if is_float != has_float_zero(self.format) or (not is_float and self.zero_point.is_floating_point()):
                raise ShapeError(f"grid: format {self.format.name} has no {self.zero_point.dtype} zero points.")
            if not bool(torch.isfinite(self.zero_point).all()):
                raise VerificationError("grid: a zero point is not finite; fit the grid again on a finite weight.")

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the codes [O, I] nearest to the weight [O, I].

        Raises:
            ShapeError: the weight does not fit the grid.
            VerificationError: NaN or Inf in the weight.
        """
        self._check(weight)
        codes = torch.empty(weight.shape, dtype=self.format.code_dtype, device=weight.device)
        for rows in self.granularity.row_chunks(weight):
            groups = self.granularity.split(weight[rows].float())
            if not bool(torch.isfinite(groups).all()):
                raise VerificationError("weight: NaN or Inf cannot be quantized. Repair the checkpoint.")
            scale, zero_point = self._factors(rows)
            # A finite weight may be infinitely many steps large: it saturates like every value outside the range.
            chosen = self.format.encode(self._scaled(groups, scale), zero_point)
            codes[rows] = self.granularity.join(chosen, rows.stop - rows.start, self.in_features)
        return codes

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `scale * (code - zero_point)` [O, I], computed in float32 and then cast to `dtype`."""
        self._check(codes)
        result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in self.granularity.row_chunks(codes):
            scale, zero_point = self._factors(rows)
            values = self.format.decode(self.granularity.split(codes[rows]), zero_point)
            result[rows] = self.granularity.join(values.mul_(scale), rows.stop - rows.start, self.in_features)
        return result

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return the representable weight nearest to the weight, in its dtype."""
        return self.dequantize(self.quantize(weight), weight.dtype)

    def column(self, j: int, num_rows: int) -> tuple[Tensor, Tensor | None]:
        """Return float32 scale and zero point (None when symmetric) of column j, which broadcast against [num_rows]."""
        group = j // self.granularity.columns_per_group(self.in_features)
        scale = self.scale[:, group].float()
        zero_point = None if self.zero_point is None else self.zero_point[:, group].float()
        repeats = self.granularity.block_rows or 1
        if repeats > 1:
            scale = scale.repeat_interleave(repeats)[:num_rows]
            zero_point = None if zero_point is None else zero_point.repeat_interleave(repeats)[:num_rows]
        return scale, zero_point

    def rounder(self, j: int, num_rows: int) -> Rounder:
        """Return what rounds column j, and any other of its group; the step of column-wise solvers.

        Codes [O] and float32 values [O] are bitwise those of `quantize` and `dequantize`. Finiteness is the caller's
        business here: a check per column would stall a device.
        """
        return partial(self._round, *self.column(j, num_rows))

    def rows(self, start: int, stop: int) -> "Grid":
        """Return the grid of the rows start..stop; views, not copies.

        Raises:
            ShapeError: an end lies inside a tile of rows.
        """
        if self.granularity.spans_rows:
            return self
        height = self.granularity.block_rows or 1
        if start % height or (stop % height and -(-stop // height) != self.scale.shape[0]):
            raise ShapeError(f"grid: rows {start}..{stop} cut a tile of {height}. Use multiples of it.")
        first, end = start // height, -(-stop // height)
        zero_point = None if self.zero_point is None else self.zero_point[first:end]
        stored = None if self.stored is None else self.stored.rows(first, end)
        return replace(self, scale=self.scale[first:end], zero_point=zero_point, stored=stored)

    def columns(self, start: int, stop: int) -> "Grid":
        """Return the grid of the columns start..stop; both must be group borders.

        Raises:
            ShapeError: a border lies inside a group.
        """
        if self.granularity.group_size is None:
            return replace(self, in_features=stop - start)
        width = self.granularity.columns_per_group(self.in_features)
        if start % width or (stop % width and stop != self.in_features):
            raise ShapeError(f"grid: columns {start}..{stop} cut a group of {width}. Use multiples of the group size.")
        first, end = start // width, -(-stop // width)
        zero_point = None if self.zero_point is None else self.zero_point[:, first:end]
        stored = None if self.stored is None else self.stored.columns(first, end)
        scale = self.scale[:, first:end]
        return replace(self, in_features=stop - start, scale=scale, zero_point=zero_point, stored=stored)

    def fits(self, num_rows: int) -> bool:
        """Whether a matrix [num_rows, I] lies on this grid."""
        return tuple(self.scale.shape) == self.granularity.scale_shape(num_rows, self.in_features)

    @property
    def device(self) -> torch.device:
        """Where the scales are."""
        return self.scale.device

    @property
    def num_metadata_bits(self) -> int:
        """Bits that scales, zero points (floats, or as many bits as a code) and a learned table (float32) take."""
        plain = self.scale.numel() * torch.finfo(self.scale.dtype).bits
        bits = plain if self.stored is None else self.stored.num_bits
        if self.zero_point is not None:
            bits += num_zero_point_bits(self.format, self.zero_point.numel())
        if isinstance(self.format, TableFormat) and self.format not in TABLES:
            bits += 32 * self.format.num_codes
        return bits

    def to(self, device: torch.device | str) -> "Grid":
        """Return the same grid on a device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        stored = None if self.stored is None else self.stored.to(device)
        return replace(self, scale=self.scale.to(device), zero_point=zero_point, stored=stored)

    def _round(self, scale: Tensor, zero_point: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.format.encode(self._scaled(weight.float(), scale), zero_point)
        return codes, self.format.decode(codes, zero_point).mul_(scale)

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Weights in units of the scale. Tables take the reciprocal first, as bitsandbytes does, for equal codes."""
        return weight * scale.reciprocal() if isinstance(self.format, TableFormat) else weight / scale

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Float32 scale and zero point [R, G, 1] of some rows."""
        rows = self.granularity.scale_rows(rows)
        zero_point = None if self.zero_point is None else self.zero_point[rows].float().unsqueeze(-1)
        return self.scale[rows].float().unsqueeze(-1), zero_point

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_features or not self.fits(x.shape[0]):
            raise ShapeError(
                f"grid: a tensor {list(x.shape)} does not fit this grid, which covers {self.in_features} columns with "
                f"scales {list(self.scale.shape)} per {self.granularity.kind}."
            )
