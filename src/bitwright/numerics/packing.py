"""Codes to bits: a dense little-endian bitstream in int32 words along the last dimension.

Element i occupies the bits [i*b, i*b + b) of its row; bit k of the stream is bit k % 32 of word k // 32. Widths that do
not divide 32 straddle words. 32 elements fill exactly b words, so that the layout repeats every 32 elements:

    b = 3   word 0: e0 e1 .. e9 and 2 bits of e10    word 1: 1 bit of e10, e11 ..    word 2: .. e31

The same layout as compressed-tensors from 0.18 on, whose signed codes q are stored as q + 2^(b-1). Earlier versions put
floor(32 / b) elements into each word, which differs for b = 3, 5, 6, 7.
"""

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError

WORD_BITS = 32
# Elements after which the layout repeats: 32 elements of b bits are b whole words.
PERIOD = 32


def num_words(n: int, bits: int) -> int:
    """Words that n elements of `bits` bits take."""
    return -(-n * bits // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes densely.

    Args:
        codes: [..., n], an integer dtype, values 0 .. 2^bits - 1.
        bits: 1 to 8.
    Returns:
        int32 [..., ceil(n * bits / 32)]; unused bits of the last word are 0.
    Raises:
        RecipeError: bits outside 1..8.
        VerificationError: a code outside 0 .. 2^bits - 1, which would spill into its neighbours.
    """
    _check_bits(bits)
    n = codes.shape[-1]
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise VerificationError(
            f"packing: codes {int(codes.min())}..{int(codes.max())} do not fit {bits} unsigned bits; shift them first."
        )
    periods = -(-n // PERIOD)
    words = torch.zeros(*codes.shape[:-1], periods, bits, dtype=torch.int32, device=codes.device)
    for i in range(min(PERIOD, n)):
        values = codes[..., i::PERIOD].to(torch.int32)
        word, offset = divmod(i * bits, WORD_BITS)
        words[..., : values.shape[-1], word] |= values << offset
        if offset + bits > WORD_BITS:
            words[..., : values.shape[-1], word + 1] |= values >> (WORD_BITS - offset)
    return words.flatten(-2)[..., : num_words(n, bits)].contiguous()


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`.

    Args:
        words: int32 [..., ceil(n * bits / 32)].
        bits: 1 to 8.
        n: elements per row.
    Returns:
        uint8 [..., n], values 0 .. 2^bits - 1.
    Raises:
        RecipeError: bits outside 1..8.
        ShapeError: the last dimension is not what n elements take.
    """
    _check_bits(bits)
    if words.shape[-1] != num_words(n, bits) or words.dtype != torch.int32:
        raise ShapeError(
            f"packing: {words.dtype} words {list(words.shape)} cannot hold rows of {n} codes of {bits} bits: expected "
            f"int32 [..., {num_words(n, bits)}]."
        )
    periods = -(-n // PERIOD)
    padded = torch.nn.functional.pad(words, (0, periods * bits - words.shape[-1])).unflatten(-1, (periods, bits))
    codes = torch.empty(*words.shape[:-1], n, dtype=torch.uint8, device=words.device)
    for i in range(min(PERIOD, n)):
        target = codes[..., i::PERIOD]
        word, offset = divmod(i * bits, WORD_BITS)
        # int32 shifts right with the sign, hence the masks.
        num_low = min(bits, WORD_BITS - offset)
        values = (padded[..., : target.shape[-1], word] >> offset) & ((1 << num_low) - 1)
        if num_low < bits:
            high = padded[..., : target.shape[-1], word + 1] & ((1 << (bits - num_low)) - 1)
            values |= high << num_low
        target.copy_(values)
    return codes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise RecipeError(f"packing: bits must be 1 to 8, not {bits}.")
