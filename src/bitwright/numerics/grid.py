"""A grid: the numbers that each weight may take.

`w ≈ scale * (code - zero_point)`; the grid is the format, the scales and the zero points. Legend: O out features,
I in features, G groups, j a column.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.formats import Format
from bitwright.numerics.granularity import Granularity, row_chunks


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """Scales and zero points of one weight.

    Args:
        format: the codes.
        granularity: which weights share a scale.
        in_features: I; needed since the last group may be ragged.
        scale: [O, G], or [1, 1] per tensor; in the dtype that is stored (float32, float16 or bfloat16); never 0; may
            be negative, which gives the extra code of a full symmetric range to the positive side.
        zero_point: int32 of the same shape; None when the format is symmetric.
    Raises:
        ShapeError: scale or zero point do not fit the granularity.
        VerificationError: a scale is 0 or not finite.
    """

    format: Format
    granularity: Granularity
    in_features: int
    scale: Tensor
    zero_point: Tensor | None

    def __post_init__(self) -> None:
        if self.scale.ndim != 2:
            raise ShapeError(f"grid: scale must be [rows, groups], not {list(self.scale.shape)}.")
        expected = self.granularity.scale_shape(self.scale.shape[0], self.in_features)
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

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the codes [O, I] nearest to the weight [O, I].

        Raises:
            ShapeError: the weight does not fit the grid.
            VerificationError: NaN or Inf in the weight.
        """
        self._check(weight)
        codes = torch.empty(weight.shape, dtype=self.format.code_dtype, device=weight.device)
        for rows in row_chunks(weight):
            groups = self.granularity.split(weight[rows].float())
            scale, zero_point = self._factors(rows)
            scaled = groups / scale
            if not bool(torch.isfinite(scaled).all()):
                raise VerificationError("weight: NaN or Inf, or a value far outside the grid, cannot be quantized.")
            codes[rows] = self.granularity.join(self.format.encode(scaled, zero_point), self.in_features)
        return codes

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `scale * (code - zero_point)` [O, I], computed in float32 and then cast to `dtype`."""
        self._check(codes)
        result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in row_chunks(codes):
            scale, zero_point = self._factors(rows)
            values = self.format.decode(self.granularity.split(codes[rows]), zero_point)
            result[rows] = self.granularity.join(values.mul_(scale), self.in_features)
        return result

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return the representable weight nearest to the weight, in its dtype."""
        return self.dequantize(self.quantize(weight), weight.dtype)

    def column(self, j: int) -> tuple[Tensor, Tensor]:
        """Return float32 scale and zero point (0 when symmetric) of column j: [O], or [1] per tensor."""
        group = j // self.granularity.columns_per_group(self.in_features)
        scale = self.scale[:, group].float()
        return scale, torch.zeros_like(scale) if self.zero_point is None else self.zero_point[:, group].float()

    def round_column(self, weight_column: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """Round one column [O] on its own scales; the step of column-wise solvers.

        Finiteness is the caller's business here: a check per column would stall a device.

        Returns:
            codes [O] and their float32 values [O], bitwise equal to `quantize` and `dequantize`.
        """
        scale, zero = self.column(j)
        zero_point = None if self.zero_point is None else zero
        codes = self.format.encode(weight_column.float() / scale, zero_point)
        return codes, self.format.decode(codes, zero_point).mul_(scale)

    def columns(self, start: int, stop: int) -> "Grid":
        """Return the grid of the columns start..stop; both must be group borders.

        Raises:
            ShapeError: a border lies inside a group.
        """
        if self.granularity.kind != "group":
            return replace(self, in_features=stop - start)
        width = self.granularity.columns_per_group(self.in_features)
        if start % width or (stop % width and stop != self.in_features):
            raise ShapeError(f"grid: columns {start}..{stop} cut a group of {width}. Use multiples of the group size.")
        groups = slice(start // width, -(-stop // width))
        zero_point = None if self.zero_point is None else self.zero_point[:, groups]
        return replace(self, in_features=stop - start, scale=self.scale[:, groups], zero_point=zero_point)

    @property
    def num_metadata_bits(self) -> int:
        """Bits that scales and zero points take; a zero point takes as many bits as a code."""
        scale_bits = self.scale.numel() * torch.finfo(self.scale.dtype).bits
        return scale_bits + (0 if self.zero_point is None else self.zero_point.numel() * self.format.bits)

    def to(self, device: torch.device | str) -> "Grid":
        """Return the same grid on a device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, scale=self.scale.to(device), zero_point=zero_point)

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Float32 scale and zero point [R, G, 1] of some rows."""
        if self.granularity.kind == "tensor":
            rows = slice(None)
        zero_point = None if self.zero_point is None else self.zero_point[rows].float().unsqueeze(-1)
        return self.scale[rows].float().unsqueeze(-1), zero_point

    def _check(self, x: Tensor) -> None:
        num_rows = None if self.granularity.kind == "tensor" else self.scale.shape[0]
        if x.ndim != 2 or x.shape[1] != self.in_features or num_rows not in (None, x.shape[0]):
            expected = [num_rows or "any", self.in_features]
            raise ShapeError(f"grid: a tensor {list(x.shape)} does not fit this grid, which covers {expected}.")
