"""Hidden states of many windows, kept in a file and read a batch at a time.

The file is the whole memory policy: the operating system's cache makes it as fast as RAM while there is room, and the
process holds no more than a batch. Space is reserved at creation, so that a full disk is an error then and not a crash
later.
"""

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import ResourceError

TOKENS_PER_BATCH = 2048


def batch_slices(num_windows: int, seqlen: int) -> list[tuple[int, int]]:
    """Cut N windows into batches of about TOKENS_PER_BATCH tokens: (start, end) pairs."""
    size = max(1, TOKENS_PER_BATCH // seqlen)
    return [(start, min(start + size, num_windows)) for start in range(0, num_windows, size)]


class Activations:
    """Hidden states [N, T, D] of N windows, readable and writable by slices of windows."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._window_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        self.num_bytes = shape[0] * self._window_bytes
        _reserve(path, self.num_bytes)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, end: int, device: torch.device) -> Tensor:
        """Windows start … end on `device`."""
        hidden = torch.empty((end - start, *self.shape[1:]), dtype=self.dtype)
        left = _bytes_of(hidden)
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(start * self._window_bytes)
            while left:
                count = handle.readinto(left)
                if not count:
                    raise ResourceError(f"{self.path}: ends early. Delete the run directory's work folder.")
                left = left[count:]
        return hidden.to(device)

    def write(self, start: int, hidden: Tensor) -> None:
        """Store the hidden states of windows from `start` on."""
        left = _bytes_of(hidden.to("cpu", self.dtype).contiguous())
        with self.path.open("rb+", buffering=0) as handle:
            handle.seek(start * self._window_bytes)
            while left:
                left = left[handle.write(left) :]

    def sync(self) -> None:
        """Force everything written to the disk."""
        with self.path.open("rb+") as handle:
            os.fsync(handle.fileno())

    def move(self, path: Path) -> None:
        """Rename the file, over one that there may be."""
        self.path = self.path.replace(path)

    def delete(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; numpy does not know bfloat16."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


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
