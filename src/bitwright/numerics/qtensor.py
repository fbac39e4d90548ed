"""A quantized weight: codes and the grid that gives them meaning. Legend: O out features, I in features."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import ShapeError
from bitwright.numerics.grid import Grid


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QTensor:
    """Codes [O, I] on a grid.

    Raises:
        ShapeError: the codes are not 2-D, do not fit the grid or have another dtype than its format.
    """

    codes: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        num_rows, num_columns = self.codes.shape if self.codes.ndim == 2 else (-1, -1)
        if (
            num_columns != self.grid.in_features
            or self.codes.dtype != self.grid.format.code_dtype
            or tuple(self.grid.scale.shape) != self.grid.granularity.scale_shape(num_rows, num_columns)
        ):
            raise ShapeError(
                f"qtensor: {self.codes.dtype} codes {list(self.codes.shape)} do not fit a grid of "
                f"{self.grid.format.code_dtype} with {self.grid.in_features} columns and scale "
                f"{list(self.grid.scale.shape)}."
            )

    @property
    def shape(self) -> torch.Size:
        """[O, I]."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] that the codes stand for."""
        return self.grid.dequantize(self.codes, dtype)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Return the rows start..stop as a quantized weight of their own; views, not copies."""
        grid = self.grid
        if grid.granularity.kind != "tensor":
            zero_point = None if grid.zero_point is None else grid.zero_point[start:stop]
            grid = replace(grid, scale=grid.scale[start:stop], zero_point=zero_point)
        return QTensor(codes=self.codes[start:stop], grid=grid)

    @property
    def num_bits_total(self) -> int:
        """Bits of codes, scales and zero points together."""
        return self.codes.numel() * self.grid.format.bits + self.grid.num_metadata_bits

    @property
    def bits_per_weight(self) -> float:
        """`num_bits_total` per weight: scales and zero points are not free."""
        return self.num_bits_total / self.codes.numel()

    @property
    def saturated_fraction(self) -> float:
        """Share of the weights at either end of the format's range; high when the range clips hard."""
        values = self.grid.format.decode(self.codes, None)
        ends = (values == self.grid.format.min_value) | (values == self.grid.format.max_value)
        return ends.float().mean().item()
