"""A grid whose levels are learned tables: any 2^bits numbers per row or group, in any places.

A uniform grid stores a scale and spaces its levels evenly. A codebook stores the levels themselves, so that they can
lie close together where weights are many or matter. The price is metadata, 2^bits floats per table instead of one
scale, and a look-up instead of a product at inference. `CodebookGrid` offers what `Grid` offers, for such tables.

Legend: O out features, I in features, R rows of tables, G groups, K = 2^bits entries of a table, n weights that share
one, j a column.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.granularity import Granularity

MAX_BITS = 8
STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookFormat:
    """Codes that are positions in a table; the table belongs to the grid.

    Args:
        bits: 1 to 8.
    Raises:
        RecipeError: bits outside 1..8.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise RecipeError(f"format: a codebook takes 1 to {MAX_BITS} bits, not {self.bits}.")

    @property
    def name(self) -> str:
        """`kmeans4`: after the way the tables are first learned."""
        return f"kmeans{self.bits}"

    @property
    def num_codes(self) -> int:
        """Entries of one table, K."""
        return 2**self.bits

    @property
    def min_code(self) -> int:
        """Codes count from 0."""
        return 0

    @property
    def end_codes(self) -> tuple[int, int]:
        """Codes of the lowest and the highest level: tables are sorted."""
        return 0, self.num_codes - 1

    @property
    def symmetric(self) -> bool:
        """There is no zero point."""
        return True

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes."""
        return torch.uint8


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedTableFormat(CodebookFormat):
    """Codes that are positions in one table for the whole weight, below a scale per group; learned with the grid."""

    @property
    def name(self) -> str:
        """`lut4`."""
        return f"lut{self.bits}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CodebookGrid:
    """The tables of one weight.

    Args:
        format: how many entries a table has.
        granularity: which weights share a table.
        in_features: I; needed since the last group may be ragged.
        codebook: [R, G, K] (R and G as for scales, see `Granularity`) in the dtype that is stored: float16, bfloat16
            or float32; finite and ascending; entries may repeat.
    Raises:
        ShapeError: the tables do not fit granularity or format.
        VerificationError: another dtype; an entry that is not finite; a table that is not sorted.
    """

    format: CodebookFormat
    granularity: Granularity
    in_features: int
    codebook: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.codebook.shape)
        num_rows = 1 if self.granularity.spans_rows else shape[0] if shape else 0
        expected = (num_rows, self.granularity.num_groups(self.in_features), self.format.num_codes)
        if shape != expected:
            raise ShapeError(
                f"codebook: tables {list(shape)} do not fit {self.format.name} per {self.granularity.kind} over "
                f"{self.in_features} columns: expected {list(expected)}."
            )
        if self.codebook.dtype not in STORED_DTYPES:
            raise VerificationError(f"codebook: {self.codebook.dtype} entries; store float16, bfloat16 or float32.")
        if not bool(torch.isfinite(self.codebook).all()):
            raise VerificationError("codebook: an entry is NaN or Inf; fit the tables again on a finite weight.")
        if not bool((self.codebook[..., 1:] >= self.codebook[..., :-1]).all()):
            raise VerificationError("codebook: a table is not in ascending order; sort it and renumber the codes.")

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the codes [O, I] of the entries nearest to the weight [O, I]; the lower one at equal distance.

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
            tables = self._tables(rows)
            found = nearest(tables, groups.reshape(tables.shape[0], -1)).to(self.format.code_dtype)
            codes[rows] = self.granularity.join(found.reshape(groups.shape), rows.stop - rows.start, self.in_features)
        return codes

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the entries [O, I] that the codes name, cast from the stored dtype to `dtype`."""
        self._check(codes)
        result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in self.granularity.row_chunks(codes):
            groups = self.granularity.split(codes[rows])
            tables = self._tables(rows)
            values = tables.gather(1, groups.reshape(tables.shape[0], -1).long()).reshape(groups.shape)
            result[rows] = self.granularity.join(values, rows.stop - rows.start, self.in_features)
        return result

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return the representable weight nearest to the weight, in its dtype."""
        return self.dequantize(self.quantize(weight), weight.dtype)

    def rounder(self, j: int, num_rows: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return what rounds column j, and any other of its group; the step of column-wise solvers.

        Codes [O] and float32 values [O] are bitwise those of `quantize` and `dequantize`. Finiteness is the caller's
        business here: a check per column would stall a device.
        """
        tables = self._column(j, num_rows)
        borders = midpoints(tables)

        def round_column(weights: Tensor) -> tuple[Tensor, Tensor]:
            # One table per row meets one weight each; one table for all rows meets all weights at once.
            positions = torch.searchsorted(borders, weights.float().reshape(tables.shape[0], -1).contiguous())
            values = tables.gather(1, positions)
            return positions.to(self.format.code_dtype).reshape(weights.shape), values.reshape(weights.shape)

        return round_column

    def rows(self, start: int, stop: int) -> "CodebookGrid":
        """Return the grid of the rows start..stop; views, not copies.

        Raises:
            ShapeError: an end lies inside a tile of rows.
        """
        if self.granularity.spans_rows:
            return self
        height = self.granularity.block_rows or 1
        if start % height or (stop % height and -(-stop // height) != self.codebook.shape[0]):
            raise ShapeError(f"codebook: rows {start}..{stop} cut a tile of {height}. Use multiples of it.")
        return replace(self, codebook=self.codebook[start // height : -(-stop // height)])

    def columns(self, start: int, stop: int) -> "CodebookGrid":
        """Return the grid of the columns start..stop; both must be group borders.

        Raises:
            ShapeError: a border lies inside a group.
        """
        if self.granularity.group_size is None:
            return replace(self, in_features=stop - start)
        width = self.granularity.columns_per_group(self.in_features)
        if start % width or (stop % width and stop != self.in_features):
            raise ShapeError(
                f"codebook: columns {start}..{stop} cut a group of {width}. Use multiples of the group size."
            )
        return replace(self, in_features=stop - start, codebook=self.codebook[:, start // width : -(-stop // width)])

    def fits(self, num_rows: int) -> bool:
        """Whether a matrix [num_rows, I] lies on this grid."""
        return tuple(self.codebook.shape[:2]) == self.granularity.scale_shape(num_rows, self.in_features)

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.codebook.device

    @property
    def num_metadata_bits(self) -> int:
        """Bits that the tables take."""
        return self.codebook.numel() * torch.finfo(self.codebook.dtype).bits

    def to(self, device: torch.device | str) -> "CodebookGrid":
        """Return the same grid on a device."""
        return replace(self, codebook=self.codebook.to(device))

    def _tables(self, rows: slice) -> Tensor:
        """Float32 tables [R * G, K] of some rows."""
        return self.codebook[self.granularity.scale_rows(rows)].float().flatten(0, 1)

    def _column(self, j: int, num_rows: int) -> Tensor:
        """Float32 tables of column j: [num_rows, K], or [1, K] where all rows share one."""
        tables = self.codebook[:, j // self.granularity.columns_per_group(self.in_features)].float()
        if self.granularity.block_rows is not None:
            return tables.repeat_interleave(self.granularity.block_rows, dim=0)[:num_rows]
        return tables

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_features or not self.fits(x.shape[0]):
            raise ShapeError(
                f"codebook: a tensor {list(x.shape)} does not fit this grid, which covers {self.in_features} columns "
                f"with tables {list(self.codebook.shape)} per {self.granularity.kind}."
            )


def nearest(tables: Tensor, values: Tensor) -> Tensor:
    """Return the positions (int64) of the table entries nearest to values; the lower one at equal distance.

    Args:
        tables: [N, K], ascending, float32 or float64.
        values: [N, n] in the same dtype.
    Raises:
        ShapeError: not one row of values per table.
    """
    if tables.shape[0] != values.shape[0]:
        raise ShapeError(f"codebook: {tables.shape[0]} tables for {values.shape[0]} rows of values.")
    return torch.searchsorted(midpoints(tables), values.contiguous())


def midpoints(tables: Tensor) -> Tensor:
    """Return the borders [..., K - 1] between neighbouring entries [..., K]; a value above one goes to the upper entry.

    Entries are halved first, so that no sum overflows. Between adjacent floats the midpoint may round to the upper
    one, which would then be taken for the lower.
    """
    lower, upper = tables[..., :-1], tables[..., 1:]
    middle = lower * 0.5 + upper * 0.5
    return torch.where(middle < upper, middle, lower).contiguous()
