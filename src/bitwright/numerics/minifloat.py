"""Small floats: FP8, FP6 and FP4.

A code is a sign bit, then E exponent bits, then M mantissa bits, as IEEE 754 and the OCP specifications lay them out:

    exponent field e > 0    (-1)^s * 2^(e - bias) * (1 + m / 2^M)      bias = 2^(E-1) - 1
    exponent field 0        (-1)^s * 2^(1 - bias) * m / 2^M            the subnormals, evenly spaced around 0

Unlike integers, whose steps are all equal, the step doubles with every power of two: the relative error is about the
same for large and small values, which suits weights with a few large ones among many small ones. A block of weights
still needs a scale to bring it into the range.

What the largest codes mean differs. FP6 and FP4 use every code for a number; E4M3 gives only the all-ones pattern to
NaN and has no Inf (the "fn" variant), which is why it reaches 448; E5M2 follows IEEE and keeps a whole exponent for Inf
and NaN. Quantization never wants them: values beyond the range saturate. Nor does it want -0, which encodes as +0.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import RecipeError

FLOAT32_MANTISSA_BITS = 23
FLOAT32_BIAS = 127
FLOAT32_EXPONENT_MASK = 0x7F800000
MAX_BITS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class MinifloatFormat:
    """Floats of at most 8 bits; satisfies `formats.LevelFormat`.

    Args:
        name: the name in `FORMATS`.
        exponent_bits: E, at least 2.
        mantissa_bits: M, at least 1: without a mantissa bit, ties between neighbouring codes could not go to even.
        specials: codes that are no numbers. `none`; `nan`: only the all-ones pattern; `ieee`: Inf and NaN take the
            largest exponent.
    Raises:
        RecipeError: fewer exponent or mantissa bits, or more than 8 bits with the sign.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: Literal["none", "nan", "ieee"] = "none"

    def __post_init__(self) -> None:
        if self.exponent_bits < 2 or self.mantissa_bits < 1 or self.bits > MAX_BITS:
            raise RecipeError(
                f"minifloat {self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits. Use at "
                f"least 2 and 1, and at most {MAX_BITS - 1} together."
            )

    @property
    def bits(self) -> int:
        """Storage per code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def symmetric(self) -> bool:
        """True: the codes carry a sign, and there is no zero point."""
        return True

    @property
    def bias(self) -> int:
        """What the exponent field is offset by."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max_code(self) -> int:
        """The code of the largest value."""
        last = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        return last - {"none": 0, "nan": 1, "ieee": 2**self.mantissa_bits}[self.specials]

    @property
    def num_codes(self) -> int:
        """How many codes `encode` uses: neither Inf, nor NaN, nor -0."""
        return 2 * self.max_code + 1

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes."""
        return torch.uint8

    @property
    def min_code(self) -> int:
        """0: codes are bit patterns, and +0 is all zeros."""
        return 0

    @property
    def end_codes(self) -> tuple[int, int]:
        """Codes of the lowest and the highest value."""
        return self.max_code + 2 ** (self.bits - 1), self.max_code

    @property
    def min_value(self) -> float:
        """Smallest value, in units of the scale."""
        return -self.max_value

    @property
    def max_value(self) -> float:
        """Largest finite value, in units of the scale."""
        return self.magnitude(self.max_code)

    @property
    def min_normal(self) -> float:
        """Smallest positive value with a full mantissa; below it the step stays the same."""
        return 2.0 ** (1 - self.bias)

    def magnitude(self, code: int) -> float:
        """Return the value of a code without its sign bit, by the definition; `code` is at most `max_code`."""
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        fraction = mantissa / 2**self.mantissa_bits
        return 2.0 ** (exponent - self.bias) * (1 + fraction) if exponent else self.min_normal * fraction

    def snap(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest representable values (float32), ties to the even code; saturates; never gives -0.

        Args:
            scaled: weights divided by their scale; float32; NaN stays NaN.
            zero_point: None.
        """
        assert zero_point is None  # The format is symmetric: a grid holds no zero point for it.
        values = scaled.float().clamp(-self.max_value, self.max_value)
        # Where x has the step u, the float32 numbers around 1.5 * 2^23 * u are u apart: adding that number rounds x to
        # a multiple of u, ties to even, and subtracting it again is exact. The power of two in x gives u.
        powers = values.view(torch.int32).bitwise_and(FLOAT32_EXPONENT_MASK).view(torch.float32)
        shift = powers.clamp_(min=self.min_normal).mul_(1.5 * 2.0 ** (FLOAT32_MANTISSA_BITS - self.mantissa_bits))
        return values.add_(shift).sub_(shift)

    def encode(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return codes (uint8) for weights divided by their scale; arguments as `snap`, but no NaN."""
        values = self.snap(scaled, zero_point)
        sign = (values < 0).view(torch.uint8).bitwise_left_shift_(self.bits - 1)
        # Twice a normal number, and a subnormal one plus the smallest normal one, have this format's exponent field and
        # mantissa at the top of their float32 pattern, up to a constant. The larger of the two sums is the right one.
        magnitude = values.abs()
        aligned = torch.maximum(magnitude + self.min_normal, magnitude * 2).view(torch.int32)
        aligned -= (FLOAT32_BIAS + 1 - self.bias) << FLOAT32_MANTISSA_BITS
        return (
            aligned.bitwise_right_shift_(FLOAT32_MANTISSA_BITS - self.mantissa_bits).to(torch.uint8).bitwise_or_(sign)
        )

    def decode(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return values in units of the scale (float32); reads every code, also Inf, NaN and -0."""
        assert zero_point is None
        return _table(self, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def _table(format: MinifloatFormat, device: torch.device) -> Tensor:
    """Value of every code; kept on the device, as a copy per call would stall it."""
    positive = [format.magnitude(code) for code in range(format.max_code + 1)]
    if format.specials == "ieee":
        positive.append(float("inf"))
    positive += [float("nan")] * (2 ** (format.bits - 1) - len(positive))
    return torch.tensor(positive + [-value for value in positive], dtype=torch.float32, device=device)


E4M3 = MinifloatFormat(name="fp8-e4m3", exponent_bits=4, mantissa_bits=3, specials="nan")
E5M2 = MinifloatFormat(name="fp8-e5m2", exponent_bits=5, mantissa_bits=2, specials="ieee")
E2M3 = MinifloatFormat(name="fp6-e2m3", exponent_bits=2, mantissa_bits=3)
E3M2 = MinifloatFormat(name="fp6-e3m2", exponent_bits=3, mantissa_bits=2)
E2M1 = MinifloatFormat(name="fp4-e2m1", exponent_bits=2, mantissa_bits=1)

MINIFLOATS = (E4M3, E5M2, E2M3, E3M2, E2M1)
