"""Ternary codes to bytes: five codes of three values share a byte, as 3^5 = 243 <= 256. 1.6 bits per code.

Three equally likely values need log2(3) = 1.585 bits; the lost 0.015 buy whole bytes. Each row of the last dimension
starts a new byte; code i of a row is digit i % 5, counted from the least significant, of byte i // 5:

    byte k = c[5k] + 3 c[5k+1] + 9 c[5k+2] + 27 c[5k+3] + 81 c[5k+4]    0 .. 242; digits beyond the row's end are 0
    c[5k+i] = byte k // 3^i % 3

A kernel that wants no division can turn byte q into the fixed-point fraction f = ceil(256 q / 243), whose digits come
off the top, most significant first: code = (3 f) >> 8, then f = (3 f) & 255. llama.cpp's TQ1_0 stores f itself.
"""

import torch
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError

TRITS_PER_BYTE = 5
NUM_BYTES_USED = 3**TRITS_PER_BYTE


def num_trit_bytes(n: int) -> int:
    """Bytes that n ternary codes take."""
    return -(-n // TRITS_PER_BYTE)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack ternary codes, five to a byte.

    Args:
        codes: [..., n], an integer dtype, values 0 .. 2.
    Returns:
        uint8 [..., ceil(n / 5)].
    Raises:
        VerificationError: a code outside 0 .. 2, which would change its neighbours.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 2):
        raise VerificationError(f"trits: codes {int(codes.min())}..{int(codes.max())} are not 0..2; shift them first.")
    packed = torch.zeros((*codes.shape[:-1], num_trit_bytes(codes.shape[-1])), dtype=torch.uint8, device=codes.device)
    for i in range(min(TRITS_PER_BYTE, codes.shape[-1])):
        digits = codes[..., i::TRITS_PER_BYTE].to(torch.uint8)
        packed[..., : digits.shape[-1]].add_(digits, alpha=3**i)
    return packed


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """Undo `pack_trits`.

    Args:
        packed: uint8 [..., ceil(n / 5)].
        n: codes per row.
    Returns:
        uint8 [..., n], values 0 .. 2.
    Raises:
        ShapeError: the last dimension is not what n codes take.
        VerificationError: a byte above 242, which no five codes give.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != num_trit_bytes(n):
        raise ShapeError(
            f"trits: {packed.dtype} bytes {list(packed.shape)} cannot hold rows of {n} ternary codes: expected uint8 "
            f"[..., {num_trit_bytes(n)}]."
        )
    if packed.numel() and int(packed.max()) >= NUM_BYTES_USED:
        raise VerificationError(f"trits: byte {int(packed.max())} holds no ternary codes; these are other data.")
    codes = torch.empty((*packed.shape[:-1], n), dtype=torch.uint8, device=packed.device)
    for i in range(min(TRITS_PER_BYTE, n)):
        target = codes[..., i::TRITS_PER_BYTE]
        digits = packed[..., : target.shape[-1]].div(3**i, rounding_mode="floor")
        target.copy_(digits.remainder_(3))
    return codes
