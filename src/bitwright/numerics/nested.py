"""Double quantization: the scales of 4-bit blocks, quantized themselves to 8 bits, as in QLoRA and bitsandbytes.

A float32 scale per 64 weights costs half a bit per weight. The scales of one matrix resemble each other, so that their
deviations from their mean fit into 8 bits: 0.5 becomes 8/64 + 32/(64 · 256) = 0.127 bits per weight.

    scale = map[code] · nested_absmax[i // 256] + offset        i the position in the scales [R, G], row by row

The map is signed and "dynamic": it covers seven decades, with half as many of its 256 values in each lower one, so that
small deviations lose relative precision slowly.

Codes first, scales after: bitsandbytes divides the weights by the exact scale, and only then quantizes the scale. The
codes do not know the error of the scale, which therefore adds to theirs.

The dynamic map is blind to sign: a scale far below the mean can come out as 0 or negative, which would erase or flip a
block. bitsandbytes stores such scales all the same. Here they take the lowest code whose value is positive, which every
reader understands.

Legend: O out features, I in features, R rows of scales, G groups per row, N = R · G scales, B = ceil(N / 256) blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError

# bitsandbytes' floor on the largest magnitude of a block, which keeps its reciprocal finite.
MIN_ABSMAX = 1e-38
# Smallest scale: the smallest normal float32.
MIN_SCALE = torch.finfo(torch.float32).tiny
NUM_DECADES = 7
NUM_BINS = 2**16

Rounding = Literal["nearest", "binned"]


@cache
def dynamic_map() -> tuple[float, ...]:
    """Return the 256 float32 values of the signed 8-bit dynamic map, ascending, from -0.993 to 1.

    Decade d of 7 holds 2^d values of each sign, the middles of equal parts of [0.1, 1], times 10^(d - 6); 0 and 1 fill
    the two codes left.

    Reference:
        arXiv:1511.04561; bitsandbytes' create_dynamic_map, in every bit.
    """
    values = [0.0, 1.0]
    for decade in range(NUM_DECADES):
        borders = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade + 1 - NUM_DECADES) * ((borders[:-1] + borders[1:]) / 2)).tolist()
        values += [*middles, *(-middle for middle in middles)]
    return tuple(sorted(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedScale:
    """Positive scales as 8-bit deviations from their mean; satisfies `ScaleFormat` and `BoundScale`.

    Args:
        block: scales that share a float32; bitsandbytes knows only 256.
        rounding: `nearest`, as the CUDA kernels of bitsandbytes (by their source) and its fallback; or `binned`, as its
            CPU kernel, which first rounds the deviation to one of 65536 equidistant values. They differ for about one
            scale in a thousand, by one code, or by a few where the deviation is near 0. Readers are the same.
    Raises:
        RecipeError: an empty block, or an unknown rounding.
    """

    block: int = 256
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise RecipeError(f"nested scales: block must be at least 1, not {self.block}. Use 256.")
        if self.rounding not in ("nearest", "binned"):
            raise RecipeError(f"nested scales: rounding is nearest or binned, not '{self.rounding}'.")

    @property
    def name(self) -> str:
        """`nested`."""
        return "nested"

    @property
    def signed(self) -> bool:
        """False: the offset is the mean of magnitudes."""
        return False

    @property
    def factors(self) -> tuple[float, ...] | None:
        """None: while codes are chosen scales are floats, so that the default factors apply."""
        return None

    @property
    def stored_afterwards(self) -> bool:
        """True: the mean of all scales must be known."""
        return True

    def bind(self, _largest_step: Tensor, /) -> "NestedScale":
        """Return itself: the tensor is looked at in `store`."""
        return self

    def load(self, tensors: Mapping[str, Tensor], /) -> "StoredNestedScale":
        """Undo `StoredNestedScale.tensors`."""
        return StoredNestedScale(
            scale=tensors["scale"],
            nested_absmax=tensors["nested_absmax"],
            nested_offset=tensors["nested_offset"],
            block=self.block,
        )

    def round(self, step: Tensor, /) -> Tensor:
        """Return the steps [R, G] as float32; all-zero groups get the smallest normal float32.

        Any scale serves a group of zeros. One near 0, as bitsandbytes' own 0, leaves the mean as it is there.
        """
        return step.float().clamp(min=MIN_SCALE)

    def store(self, scale: Tensor, /) -> "StoredNestedScale":
        """Quantize the scales [R, G].

        The value of the result differs from `scale`, by up to 0.7 % of the largest deviation in the block, and is
        positive. Where bitsandbytes' own choice is positive too, the codes are the same.

        Raises:
            ShapeError: not [R, G], or empty.
            VerificationError: a scale that is not positive and finite.
        """
        _check(scale)
        flat = scale.reshape(-1).float()
        offset = flat.mean()
        deviation = flat - offset
        padded = torch.nn.functional.pad(deviation, (0, -flat.numel() % self.block)).view(-1, self.block)
        nested_absmax = padded.abs().amax(-1)
        normed = padded * (1 / nested_absmax.clamp(min=MIN_ABSMAX)).unsqueeze(-1)
        # bitsandbytes writes 0, not the code of the value 0, where all deviations of a block are 0.
        codes = self._codes(normed).masked_fill_((nested_absmax == 0).unsqueeze(-1), 0)
        stored = StoredNestedScale(
            scale=codes.flatten()[: flat.numel()].view(scale.shape),
            nested_absmax=nested_absmax,
            nested_offset=offset.reshape(1),
            block=self.block,
        )
        return _made_positive(stored)

    def _codes(self, normed: Tensor) -> Tensor:
        values = torch.tensor(dynamic_map(), device=normed.device)
        if self.rounding == "binned":
            index = ((normed.clamp(-1, 1) + 1) * ((NUM_BINS - 1) / 2) + 0.5).floor_()
            normed = index.mul_(2).div_(NUM_BINS - 1).sub_(1)
        return torch.bucketize(normed, (values[:-1] + values[1:]) / 2).to(torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredNestedScale:
    """Scales as bitsandbytes stores them; satisfies `StoredScale`.

    Args:
        scale: uint8 [R, G], codes of `dynamic_map`.
        nested_absmax: float32 [B], largest deviation of each block.
        nested_offset: float32 [1], the mean.
        block: scales per block.
    Raises:
        ShapeError: another shape or dtype.
    """

    scale: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    block: int

    def __post_init__(self) -> None:
        expected = (-(-self.scale.numel() // self.block),)
        if self.scale.ndim != 2 or self.scale.dtype != torch.uint8 or self.nested_absmax.shape != expected:
            raise ShapeError(
                f"nested scales: expected uint8 [R, G] and float32 {list(expected)}, not {self.scale.dtype} "
                f"{list(self.scale.shape)} and {self.nested_absmax.dtype} {list(self.nested_absmax.shape)}."
            )

    @property
    def num_bits(self) -> int:
        """8 bits per scale, 32 per block and for the offset; the map is a constant."""
        return 8 * self.scale.numel() + 32 * self.nested_absmax.numel() + 32

    def values(self) -> Tensor:
        """Return the scales, float32 [R, G], in the order of operations of bitsandbytes."""
        table = torch.tensor(dynamic_map(), device=self.scale.device)
        deviation = table.index_select(0, self.scale.reshape(-1).int())
        absmax = self.nested_absmax.repeat_interleave(self.block)[: deviation.numel()]
        return deviation.mul_(absmax).add_(self.nested_offset).view(self.scale.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored."""
        return {"scale": self.scale, "nested_absmax": self.nested_absmax, "nested_offset": self.nested_offset}

    def rows(self, start: int, stop: int) -> "StoredNestedScale":
        """Return itself for all rows.

        Raises:
            ShapeError: some rows only; blocks and mean run through the whole matrix.
        """
        return self._whole(start, stop, self.scale.shape[0], "rows")

    def columns(self, start: int, stop: int) -> "StoredNestedScale":
        """Return itself for all groups.

        Raises:
            ShapeError: some groups only.
        """
        return self._whole(start, stop, self.scale.shape[1], "groups")

    def to(self, device: torch.device | str) -> "StoredNestedScale":
        """Return the same scales on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def _whole(self, start: int, stop: int, size: int, what: str) -> "StoredNestedScale":
        if (start, stop) != (0, size):
            raise ShapeError(
                f"nested scales: {what} {start}..{stop} of {size} cannot be taken alone, since the scales of the whole "
                "matrix are quantized together. Cut the float scales first, then store them."
            )
        return self


def _check(scale: Tensor) -> None:
    if scale.ndim != 2 or scale.numel() == 0:
        raise ShapeError(f"nested scales: scales must be [R, G] and not empty, not {list(scale.shape)}.")
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise VerificationError("nested scales: a scale is not positive and finite. Round scales before storing them.")


def _made_positive(stored: StoredNestedScale) -> StoredNestedScale:
    """Raise the codes of scales that would be 0 or negative to the lowest code of positive value.

    Such a code exists: 127, whose value is the offset, the mean of positive scales.
    """
    while bool((low := stored.values() <= 0).any()):
        stored = replace(stored, scale=stored.scale + low)
    return stored
