"""Quantized scales of small blocks: powers of two (OCP MX) and FP8 below one float32 (NVFP4).

Legend: R rows of scales, G groups per row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.minifloat import E2M1, E4M3, MinifloatFormat
from bitwright.numerics.scales import MIN_SCALE, BoundScale, StoredScale, nonzero

# Bytes 0 to 254 are the exponents -127 to 127; 255 is NaN.
E8M0_BIAS = E8M0_MAX_EXPONENT = 127
MIN_EXPONENT = -126  # Of the smallest normal float32.
MAX_OFFSET = 6
FP8_BITS = 8

MIN_E4M3 = 2.0**-9
# With a larger global scale the smallest FP8 scale would be subnormal in float32.
MAX_GLOBAL_SCALE = MIN_E4M3 / MIN_SCALE[torch.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class E8M0Scale:
    """Powers of two in one byte, the scales of OCP MX; satisfies `ScaleFormat` and `BoundScale`.

    Rounds up, which covers the range and clips nothing; a search finds the groups that gain from half of it. The OCP
    specification and compressed-tensors start from the power of two in the largest weight, and may clip it.

    Args:
        exponent_offset: k in `scale = 2^(u8 - 127 - k)`. 0 for float elements. MXINT8 elements are worth `int8 * 2^-6`
            beside a block scale 2^(u8 - 127); our codes are the integers, hence 6.
    Raises:
        RecipeError: an offset outside 0..6.
    """

    exponent_offset: int = 0
    signed: bool = field(default=False, init=False)
    stored_afterwards: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.exponent_offset <= MAX_OFFSET:
            raise RecipeError(f"scales: an e8m0 exponent offset is 0 to {MAX_OFFSET}, not {self.exponent_offset}.")

    @property
    def name(self) -> str:
        """`e8m0`, or `e8m0-int8` and the like: integers of b bits have b - 2 bits behind the point."""
        return f"e8m0-int{self.exponent_offset + 2}" if self.exponent_offset else "e8m0"

    @property
    def factors(self) -> tuple[float, ...] | None:
        """Whole powers of two: all other factors give the same scales again."""
        return (1.0, 0.5, 0.25, 0.125)

    def bind(self, _largest_step: Tensor, /) -> BoundScale:
        """Return itself: no scale depends on another."""
        return self

    def load(self, tensors: Mapping[str, Tensor], /) -> "StoredE8M0Scale":
        """Undo `StoredE8M0Scale.tensors`."""
        return StoredE8M0Scale(scale=tensors["scale"], exponent_offset=self.exponent_offset)

    def round(self, step: Tensor, /) -> Tensor:
        """Return the powers of two at or above the steps [R, G], float32, exactly; all-zero groups get 1.

        Saturates at the smallest normal float32 (byte 1 without offset) and at byte 254.
        """
        return _power_of_two(self._bytes(nonzero(step)), self.exponent_offset)

    def store(self, scale: Tensor, /) -> "StoredE8M0Scale":
        """Return the bytes of scales [R, G].

        Raises:
            VerificationError: a scale that `round` did not give.
        """
        return _verified(StoredE8M0Scale(scale=self._bytes(scale), exponent_offset=self.exponent_offset), scale)

    def _bytes(self, step: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(step if step.dtype == torch.float64 else step.float())
        # step = mantissa * 2^exponent with 0.5 <= mantissa < 1: only 0.5 is itself a power of two.
        exponent = torch.where(mantissa > 0.5, exponent, exponent - 1) + self.exponent_offset
        return (exponent.clamp_(MIN_EXPONENT + self.exponent_offset, E8M0_MAX_EXPONENT) + E8M0_BIAS).to(torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredE8M0Scale:
    """One byte per scale; satisfies `StoredScale`.

    Args:
        scale: uint8 [R, G]; `2^(scale - 127 - exponent_offset)`, 255 is NaN.
        exponent_offset: as in `E8M0Scale`.
    Raises:
        ShapeError: not uint8 [R, G].
    """

    scale: Tensor
    exponent_offset: int = 0

    def __post_init__(self) -> None:
        _check_grid(self.scale, torch.uint8)

    @property
    def num_bits(self) -> int:
        """8 bits per scale."""
        return 8 * self.scale.numel()

    def values(self) -> Tensor:
        """Return the powers of two, float32 [R, G]."""
        return _power_of_two(self.scale, self.exponent_offset)

    def tensors(self) -> dict[str, Tensor]:
        """Return the bytes, as the OCP specification defines them."""
        return {"scale": self.scale}

    def rows(self, start: int, stop: int) -> "StoredE8M0Scale":
        """Return the rows start..stop."""
        return replace(self, scale=self.scale[start:stop])

    def columns(self, start: int, stop: int) -> "StoredE8M0Scale":
        """Return the groups start..stop."""
        return replace(self, scale=self.scale[:, start:stop])

    def to(self, device: torch.device | str) -> "StoredE8M0Scale":
        """Return the same scales on a device."""
        return replace(self, scale=self.scale.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Scale:
    """FP8 scales below one float32 for the whole tensor, the scales of NVFP4; satisfies `ScaleFormat`.

    Reference:
        compressed-tensors' nvfp4-pack-quantized: the same global scale, rounding and order of operations in float32.
        Differs: where an FP8 scale would round to 0, ours is the smallest FP8, there 0.125; and the global scale stops
        at 2^117, which matters only for tensors without a weight above 2e-32.
    """

    stored_afterwards: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """`e4m3`."""
        return "e4m3"

    def load(self, tensors: Mapping[str, Tensor], /) -> "StoredFp8Scale":
        """Undo `StoredFp8Scale.tensors`."""
        return StoredFp8Scale(scale=tensors["scale"], global_scale=tensors["global_scale"].reshape(1))

    def bind(self, largest_step: Tensor, /) -> "BoundFp8Scale":
        """Choose the global scale that maps the largest step to 448, the largest FP8; 1 for an all-zero tensor."""
        amax = (largest_step * E2M1.max_value).float()
        # A rounded reciprocal, then a product: so torch divides a number by a tensor there, and the bits agree.
        multiplier = torch.where(amax > 0, amax.reciprocal() * (E4M3.max_value * E2M1.max_value), 1.0)
        return BoundFp8Scale(global_scale=multiplier.clamp_(max=MAX_GLOBAL_SCALE).reshape(1))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BoundFp8Scale:
    """FP8 scales of one tensor; satisfies `BoundScale`.

    Args:
        global_scale: float32 [1]; `scale = fp8 / global_scale`.
    """

    global_scale: Tensor
    signed: bool = field(default=False, init=False)

    @property
    def factors(self) -> tuple[float, ...] | None:
        """None: three mantissa bits are fine enough for the default factors."""
        return None

    def round(self, step: Tensor, /) -> Tensor:
        """Return `fp8 / global_scale`, float32 [R, G], with the FP8 nearest to `step * global_scale`; never 0."""
        return self._local(step).float() / self.global_scale

    def store(self, scale: Tensor, /) -> "StoredFp8Scale":
        """Return the FP8 scales and the global one.

        Raises:
            VerificationError: a scale that `round` did not give.
        """
        return _verified(StoredFp8Scale(scale=self._local(scale), global_scale=self.global_scale), scale)

    def _local(self, step: Tensor) -> Tensor:
        return (step.float() * self.global_scale).clamp_(MIN_E4M3, E4M3.max_value).to(torch.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredFp8Scale:
    """FP8 scales and their global scale; satisfies `StoredScale`.

    Args:
        scale: float8_e4m3fn [R, G].
        global_scale: float32 [1]; divides.
    Raises:
        ShapeError: other shapes or dtypes.
    """

    scale: Tensor
    global_scale: Tensor

    def __post_init__(self) -> None:
        _check_grid(self.scale, torch.float8_e4m3fn)
        found = f"{self.global_scale.dtype} {list(self.global_scale.shape)}"
        if found != "torch.float32 [1]":
            raise ShapeError(f"scales: a global scale is torch.float32 [1], not {found}.")

    @property
    def num_bits(self) -> int:
        """8 bits per scale and 32 for the global one."""
        return 8 * self.scale.numel() + 32

    def values(self) -> Tensor:
        """Return `scale / global_scale`, float32 [R, G]."""
        return self.scale.float() / self.global_scale

    def tensors(self) -> dict[str, Tensor]:
        """Return both tensors."""
        return {"scale": self.scale, "global_scale": self.global_scale}

    def rows(self, start: int, stop: int) -> "StoredFp8Scale":
        """Return the rows start..stop, below the same global scale."""
        return replace(self, scale=self.scale[start:stop])

    def columns(self, start: int, stop: int) -> "StoredFp8Scale":
        """Return the groups start..stop, below the same global scale."""
        return replace(self, scale=self.scale[:, start:stop])

    def to(self, device: torch.device | str) -> "StoredFp8Scale":
        """Return the same scales on a device."""
        return replace(self, scale=self.scale.to(device), global_scale=self.global_scale.to(device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FixedFp8Scale:
    """FP8 scales below a global scale that calibration has fixed: those of NVFP4 activations; a `ScaleFormat`.

    Args:
        bound: holds the global scale.
    """

    bound: BoundFp8Scale
    stored_afterwards: bool = field(default=False, init=False)

    @staticmethod
    def for_largest(step: Tensor) -> "FixedFp8Scale":
        """Fix the global scale so that the largest step seen in calibration gets the largest FP8."""
        return FixedFp8Scale(bound=Fp8Scale().bind(step))

    @property
    def name(self) -> str:
        """`e4m3`."""
        return "e4m3"

    def bind(self, largest_step: Tensor, /) -> BoundScale:
        """Return the fixed level, whatever the tensor: larger steps saturate."""
        return replace(self.bound, global_scale=self.bound.global_scale.to(largest_step.device))

    def load(self, tensors: Mapping[str, Tensor], /) -> "StoredFp8Scale":
        """Undo `StoredFp8Scale.tensors`."""
        return Fp8Scale().load(tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class MxInputScale:
    """Powers of two for activations, rounded as kernels round them; a `ScaleFormat` and `BoundScale`.

    The block's largest magnitude is rounded to the element's mantissa, and its exponent, less that of the largest
    element, is the scale: what would round to the next power of two counts as it. The scale is thus smaller than the
    one that covers the range where at most the rounding of the largest element is lost.

    Args:
        element: what the activations become.
    Reference:
        compressed-tensors, `generate_mx_scales`; AMD Quark's "even" rounding.
    """

    element: MinifloatFormat
    signed: bool = field(default=False, init=False)
    stored_afterwards: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """`e8m0`."""
        return "e8m0"

    @property
    def factors(self) -> tuple[float, ...] | None:
        """As `E8M0Scale`."""
        return E8M0Scale().factors

    def bind(self, _largest_step: Tensor, /) -> BoundScale:
        """Return itself: no scale depends on another."""
        return self

    def load(self, tensors: Mapping[str, Tensor], /) -> "StoredE8M0Scale":
        """Undo `StoredE8M0Scale.tensors`."""
        return E8M0Scale().load(tensors)

    def round(self, step: Tensor, /) -> Tensor:
        """Return the scales for steps [R, G]: magnitudes over the largest element."""
        largest = (nonzero(step) * self.element.max_value).float()
        mantissa, exponent = torch.frexp(largest)  # mantissa in [0.5, 1)
        # E4M3 has the rounding of a one-bit mantissa in the engines, as FP4 has it by nature.
        bits = self.element.mantissa_bits if self.element.bits < FP8_BITS else 1
        rounds_up = mantissa >= 1 - 2.0 ** -(bits + 2)
        exponent = exponent - 1 + rounds_up.to(exponent.dtype) - math.frexp(self.element.max_value)[1] + 1
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(MIN_EXPONENT, E8M0_MAX_EXPONENT))
        return torch.where(step == 0, torch.ones_like(scale), scale)

    def store(self, scale: Tensor, /) -> "StoredE8M0Scale":
        """Return the bytes of scales [R, G]."""
        return E8M0Scale().store(scale)


Stored = TypeVar("Stored", bound=StoredScale)


def _power_of_two(byte: Tensor, exponent_offset: int) -> Tensor:
    return byte.view(torch.float8_e8m0fnu).float().mul_(2.0**-exponent_offset)


def _verified(stored: Stored, scale: Tensor) -> Stored:
    if not torch.equal(stored.values(), scale.float()):
        raise VerificationError("scales: a scale differs from what its format can store. Round scales before use.")
    return stored


def _check_grid(scale: Tensor, dtype: torch.dtype) -> None:
    if scale.ndim != 2 or scale.dtype != dtype:
        raise ShapeError(f"scales: stored scales are {dtype} [R, G], not {scale.dtype} {list(scale.shape)}.")
