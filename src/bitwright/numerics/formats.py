"""What every number format offers, and the table of names.

A format knows how one scaled number becomes a code and back. It knows nothing of tensors that share a scale
(granularity), of how the scale was chosen (ranges) or of how codes lie in memory (packing). A new format is one file
with a class of this shape, plus one line in the table.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from bitwright.numerics.codebook_grid import CodebookFormat, LearnedTableFormat
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE, MAX_BITS, MIN_BITS, IntegerFormat
from bitwright.numerics.minifloat import MINIFLOATS
from bitwright.numerics.table import TABLES
from bitwright.numerics.ternary import BinaryFormat, TernaryFormat
from bitwright.registry import Registry

CODEBOOK_BITS = (2, 3, 4)


class Format(Protocol):
    """Codes that each name one of `num_codes` levels."""

    @property
    def name(self) -> str:
        """The name in `FORMATS`."""
        ...

    @property
    def bits(self) -> float:
        """Storage per code, in bits; 1.6 where five codes share a byte."""
        ...

    @property
    def num_codes(self) -> int:
        """How many codes are used."""
        ...

    @property
    def min_code(self) -> int:
        """The smallest code: codes are `min_code` .. `min_code + 2**bits - 1`, some of them unused."""
        ...

    @property
    def end_codes(self) -> tuple[int, int]:
        """The codes of the lowest and the highest level."""
        ...

    @property
    def symmetric(self) -> bool:
        """True when there is no zero point."""
        ...

    @property
    def code_dtype(self) -> torch.dtype:
        """Integer dtype of unpacked codes."""
        ...


class LevelFormat(Format, Protocol):
    """A format whose levels are fixed numbers in units of a scale; `snap` equals `decode(encode(.))`."""

    @property
    def min_value(self) -> float:
        """Smallest value before the zero point, in units of the scale."""
        ...

    @property
    def max_value(self) -> float:
        """Largest value before the zero point, in units of the scale."""
        ...

    def snap(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest representable values of weights divided by their scale (float32)."""
        ...

    def encode(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return codes (`code_dtype`) of weights divided by their scale."""
        ...

    def decode(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return values in units of the scale (float32)."""
        ...


def num_code_bits(format: Format, num_codes: int) -> int:
    """Bits that so many codes take when packed densely; of the decimal number `bits`, whatever its binary neighbour."""
    return math.ceil(Fraction(str(format.bits)) * num_codes)


def has_float_zero(format: Format) -> bool:
    """Whether zero points are floats: of `FLOAT_ZERO_DTYPE` in place of integers as wide as a code."""
    return isinstance(format, IntegerFormat) and format.float_zero


def num_zero_point_bits(format: Format, num_zero_points: int) -> int:
    """Bits that so many zero points take; none where the format is symmetric."""
    if format.symmetric:
        return 0
    if has_float_zero(format):
        return torch.finfo(FLOAT_ZERO_DTYPE).bits * num_zero_points
    return num_code_bits(format, num_zero_points)


def _table(entries: Iterable[Format]) -> Registry[Format]:
    table: Registry[Format] = Registry("format")
    for format in entries:
        table.register(format.name, format)
    return table


FORMATS: Registry[Format] = _table(
    [
        *(IntegerFormat(bits=b, symmetric=s) for b in range(MIN_BITS, MAX_BITS + 1) for s in (True, False)),
        *(IntegerFormat(bits=b, symmetric=False, float_zero=True) for b in range(MIN_BITS, MAX_BITS + 1)),
        *MINIFLOATS,
        *TABLES,
        *(CodebookFormat(bits=bits) for bits in CODEBOOK_BITS),
        *(LearnedTableFormat(bits=bits) for bits in CODEBOOK_BITS),
        TernaryFormat(),
        BinaryFormat(),
    ]
)
