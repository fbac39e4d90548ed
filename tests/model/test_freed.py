import sys

import psutil
import pytest
import torch

from bitwright.model.freed import return_freed_memory

PIECES, PIECE_BYTES = 100, 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps and returns memory this way")
def test_holes_between_live_tensors_are_returned() -> None:
    process = psutil.Process()
    # Freeing a large piece makes glibc take smaller ones from its heap from then on.
    large = torch.ones(30 * 2**20, dtype=torch.uint8)
    del large
    pieces = [torch.ones(PIECE_BYTES, dtype=torch.uint8) for _ in range(2 * PIECES)]
    held = pieces[::2]
    del pieces
    before = process.memory_info().rss
    return_freed_memory()
    returned = before - process.memory_info().rss
    assert returned >= 0.8 * PIECES * PIECE_BYTES
    assert all(bool((piece == 1).all()) for piece in held)


def test_it_can_be_called_again() -> None:
    return_freed_memory()
    return_freed_memory()
