"""Windows to train on and windows to judge by, cut from one text without overlap, or from two."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.data.corpora import load_corpus
from bitwright.data.overlap import require_disjoint
from bitwright.data.windows import sample_windows, tokenise
from bitwright.errors import DataError
from bitwright.preparation import (
    check_seqlen,
    check_vocabulary,
    load_tokenizer,
    num_gate_windows,
    open_model,
    text_windows,
)
from bitwright.recipe import Calibration

MOST_HELD_OUT_TOKENS = 16384
CALIBRATION_WINDOWS = 128
HELD_OUT_FRACTION = 10
"""At most one of so many windows is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingText:
    """Where the tokens come from.

    Attributes:
        data: text to train on: a file, JSONL, `hub:NAME`, `stdlib`.
        heldout: text to judge by; None for windows of `data` that are not trained on.
        seqlen: tokens per window.
        windows: at most so many to train on; None for all.
        seed: of their choice.
    """

    data: str
    heldout: str | None = None
    seqlen: int = 256
    windows: int | None = None
    seed: int = 0

    def draw(self, model: str | Path, *, trust_remote_code: bool) -> tuple[Tensor, Tensor, Calibration]:
        """Return windows to train on [N, T], windows to judge by [K, T], and what a run calibrates on.

        `preparation` draws with the same seed from the same order of windows: first those to calibrate on, which are
        trained on as well (unless there is a limit below them), then those of its gate, which are held out here.

        Raises:
            DataError: too little text, or texts that overlap.
        """
        opened = open_model(model, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
        check_seqlen(opened, self.seqlen)
        tokenizer = load_tokenizer(opened.skeleton.checkpoint, trust_remote_code=trust_remote_code)
        tokens = tokenise(tokenizer, load_corpus(self.data).documents)
        first, kept = self._cut(len(tokens) // self.seqlen)
        drawn = sample_windows(
            tokens, num_samples=len(tokens) // self.seqlen, seqlen=self.seqlen, seed=self.seed, source=self.data
        )
        check_vocabulary(opened, drawn)
        heldout = drawn[first : first + kept]
        windows = torch.cat([drawn[:first], drawn[first + kept :]])[: self.windows]
        if self.heldout is not None:
            most = max(1, MOST_HELD_OUT_TOKENS // self.seqlen)
            heldout = text_windows(opened, self.heldout, self.seqlen, trust_remote_code=trust_remote_code)[:most]
            require_disjoint(windows, heldout, calibration_source=self.data, evaluation_source=self.heldout)
        calibration = Calibration(text=self.data, num_samples=first, seqlen=self.seqlen, seed=self.seed)
        return windows, heldout.contiguous(), calibration

    def _cut(self, available: int) -> tuple[int, int]:
        """How many of the windows, in seeded order, are calibrated on, and how many after them are held out."""
        gate = num_gate_windows(self.seqlen)
        kept = max(gate, min(MOST_HELD_OUT_TOKENS // self.seqlen, available // HELD_OUT_FRACTION))
        first = min(CALIBRATION_WINDOWS, available - kept)
        if first < 1:
            raise DataError(
                f"{self.data}: {available} windows of {self.seqlen} tokens, and {kept} are held out. Give more text or "
                "a smaller --seqlen."
            )
        return first, kept
