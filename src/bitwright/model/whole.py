"""Models that transformers loads as a whole, where they are not streamed block by block."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load_whole(
    path: Path, *, dtype: torch.dtype | str, trust_remote_code: bool = False, **implementation: str
) -> nn.Module:
    """Load a causal language model on the CPU; its bars are not shown, since commands have their own, or none.

    Args:
        path: model directory.
        dtype: of its weights; "auto" for that of the checkpoint.
        trust_remote_code: let the model's own code run.
        implementation: of attention or experts, as transformers names them.
    """
    with _no_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, **implementation
        )
    return cast(nn.Module, cast(Any, loaded))


@contextmanager
def _no_bars() -> Generator[None, None, None]:
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
