"""A quantized weight: codes, the grid that gives them meaning, and the outliers kept beside them.

Legend: O out features, I in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import ShapeError
from bitwright.numerics.formats import num_code_bits
from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.outliers import SparseOutliers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QTensor:
    """Codes [O, I] on a grid.

    Args:
        codes: [O, I] in the format's code dtype.
        grid: what the codes stand for.
        outliers: single weights stored as floats, which replace what their codes stand for; None for none.
    Raises:
        ShapeError: the codes are not 2-D, do not fit the grid or have another dtype than its format.
    """

    codes: Tensor
    grid: AnyGrid
    outliers: SparseOutliers | None = None

    def __post_init__(self) -> None:
        num_rows, num_columns = self.codes.shape if self.codes.ndim == 2 else (-1, -1)
        if (
            num_columns != self.grid.in_features
            or self.codes.dtype != self.grid.format.code_dtype
            or not self.grid.fits(num_rows)
        ):
            raise ShapeError(
                f"qtensor: {self.codes.dtype} codes {list(self.codes.shape)} do not fit a grid of "
                f"{self.grid.format.code_dtype} with {self.grid.in_features} columns per "
                f"{self.grid.granularity.kind}."
            )

    @property
    def shape(self) -> torch.Size:
        """[O, I]."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] that the codes stand for."""
        dense = self.grid.dequantize(self.codes, dtype)
        return dense if self.outliers is None else self.outliers.add_to(dense)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Return the rows start..stop as a quantized weight of their own; views, not copies."""
        outliers = None if self.outliers is None else self.outliers.rows(start, stop)
        return QTensor(codes=self.codes[start:stop], grid=self.grid.rows(start, stop), outliers=outliers)

    def to(self, device: torch.device | str) -> "QTensor":
        """Return the same weight on a device."""
        outliers = None if self.outliers is None else self.outliers.to(device)
        return QTensor(codes=self.codes.to(device), grid=self.grid.to(device), outliers=outliers)

    @property
    def num_code_bits(self) -> int:
        """Bits of the packed codes."""
        return num_code_bits(self.grid.format, self.codes.numel())

    @property
    def num_bits_total(self) -> int:
        """Bits of codes, scales, zero points, codebooks and outliers together."""
        outliers = 0 if self.outliers is None else self.outliers.num_bits
        return self.num_code_bits + self.grid.num_metadata_bits + outliers

    @property
    def bits_per_weight(self) -> float:
        """`num_bits_total` per weight: scales and zero points are not free."""
        return self.num_bits_total / self.codes.numel()

    @property
    def saturated_fraction(self) -> float:
        """Share of the weights with the first or last of the codes in order of value; high when the range clips."""
        lowest, highest = self.grid.format.end_codes
        return ((self.codes == lowest) | (self.codes == highest)).float().mean().item()
