"""How scales themselves are stored: what every way offers, and plain floats. `SCALE_FORMATS` is the table.

Groups of 16 or 32 weights have many scales, and 32 bits for each would cost as much as two bits per weight. So scales
are quantized as well, each scheme with its own rounding:

    float32, bfloat16, float16    nearest; may be negative
    e8m0   2^(u8 - 127)           the power of two at or above the step, so that the range is covered (OCP MX)
    e4m3   FP8 / global           nearest; the float32 global maps the largest step of the tensor to 448 (NVFP4)
    nested                        8-bit deviations from the mean, quantized once all codes are chosen (QLoRA)

Rounding comes before codes are chosen, so that what is searched is what is stored, and no scale is ever 0 or so small
that a device may flush it to 0. A scale format is first bound to a tensor (`bind`), since a global scale needs the
largest step; then it rounds (`round`), and at the end it stores (`store`).

Legend: R rows of scales, G groups per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bitwright.errors import RecipeError, VerificationError

# The smallest scale of each storage dtype. Float16 subnormals are normal in float32, where the arithmetic happens;
# float32 and bfloat16 subnormals may be flushed to 0 by a device.
MIN_SCALE = {
    torch.float32: torch.finfo(torch.float32).tiny,
    torch.bfloat16: torch.finfo(torch.bfloat16).tiny,
    torch.float16: torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps,
}


class StoredScale(Protocol):
    """Scales as a checkpoint holds them."""

    @property
    def num_bits(self) -> int:
        """Bits of everything stored."""
        ...

    def values(self) -> Tensor:
        """Return the scales that dequantization multiplies by: float32 [R, G]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by the suffix of its name."""
        ...

    def rows(self, start: int, stop: int) -> "StoredScale":
        """Return the rows start..stop of the scales."""
        ...

    def columns(self, start: int, stop: int) -> "StoredScale":
        """Return the groups start..stop of the scales."""
        ...

    def to(self, device: torch.device | str) -> "StoredScale":
        """Return the same scales on a device."""
        ...


class BoundScale(Protocol):
    """A scale format that knows its tensor."""

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative."""
        ...

    @property
    def factors(self) -> tuple[float, ...] | None:
        """Factors on the range that a search should try; None for the default ones."""
        ...

    def round(self, step: Tensor, /) -> Tensor:
        """Return the scales to store for ideal steps [R, G]; elementwise; never 0."""
        ...

    def store(self, scale: Tensor, /) -> StoredScale | None:
        """Return what a checkpoint holds for scales [R, G] that `round` gave; None when it holds the scales themselves.

        Raises:
            VerificationError: a scale that this format cannot hold.
        """
        ...


class ScaleFormat(Protocol):
    """A way to store scales."""

    @property
    def name(self) -> str:
        """The name in `SCALE_FORMATS` and in recipes."""
        ...

    @property
    def stored_afterwards(self) -> bool:
        """Whether scales are chosen as floats, and quantized together once all are known."""
        ...

    def bind(self, largest_step: Tensor, /) -> BoundScale:
        """Return the format for a tensor whose largest step (amax / max_value) is given; float64, no dimensions."""
        ...

    def load(self, tensors: Mapping[str, Tensor], /) -> StoredScale:
        """Undo `StoredScale.tensors`."""
        ...


@dataclass(frozen=True, slots=True)
class FloatScale:
    """Scales in a plain float dtype; satisfies `ScaleFormat` and `BoundScale`.

    Args:
        dtype: float32, bfloat16 or float16.
    Raises:
        RecipeError: another dtype.
    """

    dtype: torch.dtype
    # A negative scale gives the extra code of a full range to the positive side.
    signed: bool = field(default=True, init=False)
    stored_afterwards: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.dtype not in MIN_SCALE:
            raise RecipeError(f"scales: plain scales are float32, float16 or bfloat16, not {self.dtype}.")

    @property
    def name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def factors(self) -> tuple[float, ...] | None:
        """None: nearly every factor gives another scale."""
        return None

    def bind(self, _largest_step: Tensor, /) -> BoundScale:
        """Return itself: no scale depends on another."""
        return self

    def load(self, _tensors: Mapping[str, Tensor], /) -> StoredScale:
        """Refuse: plain scales are stored as they are.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(f"scales: {self.name} scales are stored as they are, without further tensors.")

    def round(self, step: Tensor, /) -> Tensor:
        """Return the nearest scales [R, G] in `dtype`.

        All-zero groups get 1, tiny ones the smallest scale. Steps beyond the dtype give Inf; the caller refuses them.
        """
        step = nonzero(step)
        floor = torch.full_like(step, MIN_SCALE[self.dtype]).copysign_(step)
        return torch.where(step.abs() < floor.abs(), floor, step).to(self.dtype)

    def store(self, scale: Tensor, /) -> None:
        """Return None: a checkpoint holds the scales themselves.

        Raises:
            VerificationError: scales of another dtype.
        """
        if scale.dtype != self.dtype:
            raise VerificationError(f"scales: {scale.dtype} scales in {self.name} storage. Round them first.")


def nonzero(step: Tensor) -> Tensor:
    """Return the steps with 1 in the place of 0: any scale serves a group of zeros."""
    return torch.where(step == 0, torch.ones_like(step), step)
