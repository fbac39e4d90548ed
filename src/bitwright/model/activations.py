"""Hidden states of many windows, kept in a file that the operating system pages in and out.

File-backed memory is the whole memory policy: it is as fast as RAM while there is room, and does not count against the
process when there is none. Space is reserved at creation, so that a full disk is an error then and not a crash later.
"""

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import ResourceError

TOKENS_PER_BATCH = 4096


def batch_slices(num_windows: int, seqlen: int) -> list[tuple[int, int]]:
    """Cut N windows into batches of about TOKENS_PER_BATCH tokens: (start, end) pairs."""
    size = max(1, TOKENS_PER_BATCH // seqlen)
    return [(start, min(start + size, num_windows)) for start in range(0, num_windows, size)]


class Activations:
    """Hidden states [N, T, D] of N windows, readable and writable by slices of windows."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.num_bytes = torch.Size(shape).numel() * dtype.itemsize
        _reserve(path, self.num_bytes)
        size = torch.Size(shape).numel()
        self._tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, end: int, device: torch.device) -> Tensor:
        """Copy windows start … end to `device`."""
        return self._tensor[start:end].to(device, copy=True)

    def write(self, start: int, hidden: Tensor) -> None:
        """Store the hidden states of windows from `start` on."""
        self._tensor[start : start + hidden.shape[0]] = hidden.to("cpu", self.dtype)

    def sync(self) -> None:
        """Force everything written to the disk."""
        with self.path.open("rb+") as handle:
            os.fsync(handle.fileno())

    def delete(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _reserve(path: Path, num_bytes: int) -> None:
    try:
        with path.open("ab") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, num_bytes)
            else:
                handle.truncate(num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"{path.parent}: no room for {num_bytes / 1e6:.0f} MB of activations. "
                "Free disk space, or use fewer or shorter calibration windows."
            ) from None
        raise
