"""Giving freed memory back to the operating system.

glibc keeps what is freed in pieces under 32 MiB for the next allocation. Between two decoder blocks that is hundreds of
megabytes in holes that the next block does not quite fit: the process grows with every block though nothing is held.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


def return_freed_memory() -> None:
    """Let the allocator return its free pages; does nothing where the C library is not glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
