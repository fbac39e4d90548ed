"""What every number format offers, and the table of names.

A format knows how one scaled number becomes a code and back. It knows nothing of tensors that share a scale
(granularity), of how the scale was chosen (ranges) or of how codes lie in memory (packing). A new format is one file
with a class of this shape, plus one line in the table.
"""

from typing import Protocol

import torch
from torch import Tensor

from bitwright.numerics.integer import MAX_BITS, MIN_BITS, IntegerFormat
from bitwright.registry import Registry


class Format(Protocol):
    """A set of at most `2**bits` numbers, in units of a scale.

    Every format represents 0 exactly, and `snap` equals `decode(encode(.))`.
    """

    @property
    def name(self) -> str:
        """The name in `FORMATS` and in recipes."""
        ...

    @property
    def bits(self) -> int:
        """Storage per code, in bits."""
        ...

    @property
    def symmetric(self) -> bool:
        """True when there is no zero point."""
        ...

    @property
    def num_codes(self) -> int:
        """How many codes are used; at most `2**bits`."""
        ...

    @property
    def code_dtype(self) -> torch.dtype:
        """Integer dtype of unpacked codes."""
        ...

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


def _integers(table: Registry[Format]) -> Registry[Format]:
    for bits in range(MIN_BITS, MAX_BITS + 1):
        for symmetric in (True, False):
            format = IntegerFormat(bits=bits, symmetric=symmetric)
            table.register(format.name, format)
    return table


FORMATS: Registry[Format] = _integers(Registry("format"))
