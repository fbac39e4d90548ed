"""Gradients as codes: which elements share a scale, the rounding, and the bytes that travel.

Every rank owns one share of every parameter: `numel` elements, padded to W equal shares, of which each is cut into
blocks of n elements with one float32 scale. Shares and blocks follow from the parameter's shape alone, so that the same
gradient gives the same codes whichever bucket DDP puts it into.

    bits  levels                  scale of a block           bits sent per element (n = 256)
    8     -127 .. 127             largest magnitude / 127    8 + 32/n = 8.13
    4     -7 .. 7                 largest magnitude / 7      4 + 32/n = 4.13
    1     -1, +1                  mean magnitude             1 + 32/n = 1.13

The payload of one share: the float32 scales of its blocks, then its codes, of all parameters of the bucket one after
the other. Padding takes part in the arithmetic as zeros, and does not travel beyond the last byte (or word) of a share.

Legend: W ranks, K blocks of one share (over all parameters of a bucket), n elements per block, M elements of one share,
S rows (W for what a rank sends to all, 1 for its own share).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.nibbles import pack_low_first, unpack_low_first
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.ternary import BinaryFormat, absmean

FORMATS: dict[int, IntegerFormat | BinaryFormat] = {
    8: IntegerFormat(bits=8, symmetric=True, full_range=False),
    4: IntegerFormat(bits=4, symmetric=True, full_range=False),
    1: BinaryFormat(),
}
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientOptions:
    """How gradients are sent.

    Args:
        bits: 8, 4 or 1.
        block: elements that share a scale.
        error_feedback: add what rounding lost in one step to the gradient of the next.
        stochastic: round up or down at random, right on average, instead of to the nearest level.
        warm_up_steps: steps at the start that send dense gradients.
        seed: of stochastic rounding.
    Raises:
        RecipeError: a value outside its range, or 1 bit that is both stochastic and with error feedback: levels at the
            largest magnitude leave errors up to twice as large, which feed back and grow without bound.
    """

    bits: int = 8
    block: int = 256
    error_feedback: bool = True
    stochastic: bool = False
    warm_up_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in FORMATS:
            raise RecipeError(f"gradients: bits must be 8, 4 or 1, not {self.bits}.")
        if self.block < 1:
            raise RecipeError(f"gradients: block must be at least 1 element, not {self.block}. 256 is usual.")
        if self.warm_up_steps < 0:
            raise RecipeError(f"gradients: warm_up_steps must be 0 or more, not {self.warm_up_steps}.")
        if self.bits == 1 and self.stochastic and self.error_feedback:
            raise RecipeError(
                "gradients: 1 bit with stochastic rounding and error feedback diverges. Turn one of the two off."
            )


class Layout:
    """Where the elements of some parameters lie in blocks.

    Args:
        sizes: elements of each parameter.
        num_ranks: W.
        block: n.
        device: of the gradients.
    """

    def __init__(self, sizes: Sequence[int], *, num_ranks: int, block: int, device: torch.device) -> None:
        self.block = block
        self.num_ranks = num_ranks
        self.lengths = [-(-size // num_ranks) for size in sizes]
        self.blocks_per_parameter = [-(-length // block) for length in self.lengths]
        self.num_elements = sum(self.lengths)
        self.num_blocks = sum(self.blocks_per_parameter)
        ones = [self.rows(torch.ones(size, device=device)) for size in sizes]
        self.is_padding = self.to_blocks(ones) == 0  # [W, K, n]
        # [W, K]: a block of nothing but padding counts 1, as it is divided by.
        self.counts = self.is_padding.logical_not().sum(-1).clamp_(min=1)

    def rows(self, gradient: Tensor) -> Tensor:
        """Return a parameter's gradient as float32 shares [W, length], padded with zeros."""
        flat = gradient.reshape(-1).float()
        length = -(-flat.numel() // self.num_ranks)
        return torch.nn.functional.pad(flat, (0, length * self.num_ranks - flat.numel())).view(self.num_ranks, length)

    def to_blocks(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return pieces [S, length], one per parameter, as blocks [S, K, n], padded with zeros."""
        num_rows = pieces[0].shape[0]
        blocks = pieces[0].new_zeros(num_rows, self.num_blocks * self.block)
        for piece, target in zip(pieces, self._views(blocks), strict=True):
            target.copy_(piece)
        return blocks.view(num_rows, self.num_blocks, self.block)

    def to_pieces(self, blocks: Tensor) -> list[Tensor]:
        """Undo `to_blocks`; views."""
        return self._views(blocks.flatten(1))

    def _views(self, flat: Tensor) -> list[Tensor]:
        padded = flat.split([number * self.block for number in self.blocks_per_parameter], dim=1)
        return [view[:, :length] for view, length in zip(padded, self.lengths, strict=True)]


def encode(values: Tensor, counts: Tensor, options: GradientOptions, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round blocks.

    Args:
        values: [S, K, n] float32; a block may hold NaN or Inf.
        counts: [S, K], elements of each block that are no padding.
        options: bits, and whether rounding is stochastic.
        noise: uniform in [0, 1), like values, for stochastic rounding; else None.
    Returns:
        codes [S, K, n] (the format's dtype) and float32 scales [S, K]. Nearest rounding is wrong by at most half a
        scale (8 and 4 bits). A scale is 0 for a block of zeros, and NaN for a block that is not finite.
    """
    format = FORMATS[options.bits]
    if options.bits == 1 and noise is None:
        # The least-squares scale of signs, with which the error is never larger than what was to be sent.
        scale = absmean([values], counts).to(torch.float32)
    else:
        scale = values.abs().amax(-1) / format.max_value
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    usable = (scale > 0).unsqueeze(-1)
    scaled = torch.where(usable, values / scale.unsqueeze(-1), 0.0)
    if noise is not None:
        spacing = 2.0 if options.bits == 1 else 1.0
        scaled.add_(noise - 0.5, alpha=spacing)
    return format.encode(scaled, None), scale


def decode(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the values [S, K, n] float32 of codes [S, K, n] and scales [S, K]; NaN where the scale is."""
    return FORMATS[bits].decode(codes, None).mul_(scale.unsqueeze(-1))


def to_bytes(codes: Tensor, scale: Tensor, bits: int, layout: Layout) -> Tensor:
    """Return the payload [S, num_bytes] uint8 of codes [S, K, n] and scales [S, K]."""
    dense = torch.cat(layout.to_pieces(codes), dim=1)
    if bits == 8:
        packed = dense.contiguous()
    elif bits == 4:
        shifted = dense - FORMATS[bits].min_code
        packed = pack_low_first(torch.nn.functional.pad(shifted, (0, dense.shape[1] % 2)))
    else:
        packed = pack(dense, bits)
    return torch.cat([scale.contiguous().view(torch.uint8), packed.view(torch.uint8)], dim=1)


def from_bytes(payload: Tensor, bits: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Undo `to_bytes`: codes [S, K, n] and scales [S, K]."""
    num_scale_bytes = layout.num_blocks * SCALE_BYTES
    scale = payload[:, :num_scale_bytes].contiguous().view(torch.float32)
    packed = payload[:, num_scale_bytes:].contiguous()
    if bits == 8:
        dense = packed.view(torch.int8)
    elif bits == 4:
        dense = unpack_low_first(packed)[:, : layout.num_elements].to(torch.int8) + FORMATS[bits].min_code
    else:
        dense = unpack(packed.view(torch.int32), bits, layout.num_elements)
    return layout.to_blocks(dense.split(layout.lengths, dim=1)), scale
