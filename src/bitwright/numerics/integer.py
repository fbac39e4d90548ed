"""Affine integers: the codes behind W2 to W8.

A code q stands for the value `scale * (q - zero_point)`. Four families differ in code range and zero point (b bits):

    symmetric, full range    -2^(b-1)     .. 2^(b-1) - 1    zero point 0, scale may be negative
    symmetric, restricted    -2^(b-1) + 1 .. 2^(b-1) - 1    zero point 0, one code unused
    asymmetric                0           .. 2^b - 1        integer zero point inside the range
    float zero                0           .. 2^b - 1        any zero point, stored as float16; 0 is exact only by chance

A negative scale gives the extra code of the full range to the positive side. An integer zero point lies inside the code
range, so that 0 is exact in the first three families.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import RecipeError

MIN_BITS, MAX_BITS = 2, 8
# Of a zero point that is no integer: at 4 bits within 1/256 of a step, at 8 within 1/16.
FLOAT_ZERO_DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerFormat:
    """Integers of `bits` bits; satisfies `formats.Format`.

    Args:
        bits: 2 to 8.
        symmetric: no zero point; codes are signed.
        full_range: symmetric only: use the code -2^(b-1) as well.
        float_zero: asymmetric only: the zero point is a float.
    Raises:
        RecipeError: bits outside 2..8, an asymmetric format without its full range, or a symmetric one with a float
            zero point.
    """

    bits: int
    symmetric: bool
    full_range: bool = True
    float_zero: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise RecipeError(f"integer format: bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}.")
        if not self.symmetric and not self.full_range:
            raise RecipeError("integer format: asymmetric always uses every code. Leave full_range at its default.")
        if self.symmetric and self.float_zero:
            raise RecipeError("integer format: symmetric has no zero point. Leave float_zero at its default.")

    @property
    def name(self) -> str:
        """`int4`, `uint4`, `uint4-floatzero`, or `int4-restricted`."""
        if not self.symmetric:
            return f"uint{self.bits}-floatzero" if self.float_zero else f"uint{self.bits}"
        return f"int{self.bits}" if self.full_range else f"int{self.bits}-restricted"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if not self.symmetric:
            return 0
        return -(2 ** (self.bits - 1)) + (0 if self.full_range else 1)

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def num_codes(self) -> int:
        """How many codes are used."""
        return self.qmax - self.qmin + 1

    @property
    def min_code(self) -> int:
        """Offset of the codes as stored: a signed code q is stored as q + 2^(b-1)."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def end_codes(self) -> tuple[int, int]:
        """Codes of the lowest and the highest value."""
        return self.qmin, self.qmax

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def min_value(self) -> float:
        """Smallest value before the zero point, in units of the scale."""
        return float(self.qmin)

    @property
    def max_value(self) -> float:
        """Largest value before the zero point, in units of the scale."""
        return float(self.qmax)

    def snap(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest representable values: `decode(encode(scaled))` without the detour over codes.

        Args:
            scaled: weights divided by their scale; float32.
            zero_point: float32 that broadcasts against `scaled`, integer-valued but for `float_zero`; None when
                symmetric.
        """
        codes = self._nearest(scaled, zero_point)
        return codes if zero_point is None else codes.sub_(zero_point)

    def encode(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return codes (`code_dtype`) for weights divided by their scale; arguments as `snap`."""
        return self._nearest(scaled, zero_point).to(self.code_dtype)

    def decode(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return values in units of the scale (float32); the inverse of `encode`."""
        values = codes.to(torch.float32)
        return values if zero_point is None else values.sub_(zero_point)

    def _nearest(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes, as floats."""
        if zero_point is None:
            return torch.round(scaled).clamp_(self.qmin, self.qmax)
        if self.float_zero:
            return (scaled + zero_point).round_().clamp_(self.qmin, self.qmax)
        # Rounding before the zero point is added keeps x and -x equally wrong and loses no digit of a small x.
        return torch.round(scaled).add_(zero_point).clamp_(self.qmin, self.qmax)
