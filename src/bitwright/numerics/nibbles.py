"""Two 4-bit codes per byte, in the two orders in use.

high first    byte = e0 << 4 | e1     bitsandbytes; all rows run together
low first     byte = e1 << 4 | e0     compressed-tensors and the OCP FP4 formats; each row by itself
"""

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError

MAX_CODE = 15


def pack_high_first(codes: Tensor, *, padding: int = 0) -> Tensor:
    """Pack codes of any shape, row by row without a break, as bitsandbytes does.

    Args:
        codes: an integer dtype, values 0 .. 15; n of them.
        padding: the code that fills the last byte when n is odd; bitsandbytes takes the code of the value 0.
    Returns:
        uint8 [ceil(n / 2)].
    Raises:
        VerificationError: a code outside 0 .. 15.
        RecipeError: such a padding.
    """
    if not 0 <= padding <= MAX_CODE:
        raise RecipeError(f"nibbles: padding must be a code 0 to {MAX_CODE}, not {padding}.")
    flat = _checked(codes).reshape(-1)
    pairs = torch.nn.functional.pad(flat, (0, flat.numel() % 2), value=padding).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack_high_first(packed: Tensor, n: int) -> Tensor:
    """Undo `pack_high_first`.

    Args:
        packed: uint8, any shape, ceil(n / 2) bytes.
        n: number of codes.
    Returns:
        uint8 [n].
    Raises:
        ShapeError: another number of bytes or dtype.
    """
    if packed.dtype != torch.uint8 or packed.numel() != -(-n // 2):
        raise ShapeError(
            f"nibbles: {packed.dtype} {list(packed.shape)} cannot hold {n} codes: expected {-(-n // 2)} bytes."
        )
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & MAX_CODE], dim=-1).flatten()[:n]


def pack_low_first(codes: Tensor) -> Tensor:
    """Pack codes along the last dimension, as compressed-tensors does for FP4.

    Args:
        codes: [..., n], an integer dtype, values 0 .. 15; n even.
    Returns:
        uint8 [..., n / 2].
    Raises:
        ShapeError: n is odd.
        VerificationError: a code outside 0 .. 15.
    """
    if codes.shape[-1] % 2:
        raise ShapeError(f"nibbles: rows of {codes.shape[-1]} codes do not fill whole bytes. Use an even in_features.")
    checked = _checked(codes)
    return checked[..., 1::2] << 4 | checked[..., ::2]


def unpack_low_first(packed: Tensor) -> Tensor:
    """Undo `pack_low_first`.

    Args:
        packed: uint8 [..., n / 2].
    Returns:
        uint8 [..., n].
    Raises:
        ShapeError: another dtype.
    """
    if packed.dtype != torch.uint8:
        raise ShapeError(f"nibbles: packed codes are uint8, not {packed.dtype}.")
    return torch.stack([packed & MAX_CODE, packed >> 4], dim=-1).flatten(-2)


def _checked(codes: Tensor) -> Tensor:
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > MAX_CODE):
        raise VerificationError(
            f"nibbles: codes {int(codes.min())}..{int(codes.max())} do not fit 4 unsigned bits; shift them first."
        )
    return codes.to(torch.uint8)
