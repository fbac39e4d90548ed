"""Windows to train on and windows to judge by: from one text without overlap, from two, or written by the model.

What a model writes (`--data self`) is kept in the run: it is written once, and only after the run has its place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.calibration.self_text import kept_windows
from bitwright.data.corpora import load_corpus
from bitwright.data.overlap import require_disjoint
from bitwright.data.windows import hash_tokens, sample_windows, tokenise
from bitwright.errors import DataError
from bitwright.model.stream import StreamedModel
from bitwright.preparation import (
    SELF,
    check_seqlen,
    check_vocabulary,
    load_tokenizer,
    num_gate_windows,
    open_model,
    text_windows,
)
from bitwright.progress import Progress
from bitwright.recipe import Calibration

WRITTEN = "0-text"
"""In a run: what the model has written."""
SELF_WINDOWS = 1024
"""To train on, unless there is a limit."""
NUM_GREEDY = 4
MOST_HELD_OUT_TOKENS = 16384
CALIBRATION_WINDOWS = 128
HELD_OUT_FRACTION = 10
"""At most one of so many windows is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnText:
    """What a training will see.

    Attributes:
        identity: hash of the tokens; `self` where the model writes them, which what is asked of it determines.
        calibration: what a run calibrates on.
        read: (folder of the run, device, progress) -> windows to train on [N, T] and to judge by [K, T]; the model
            writes those that are not in the folder yet.
    """

    identity: str
    calibration: Calibration
    read: Callable[[Path, str, Progress], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingText:
    """Where the tokens come from.

    Attributes:
        data: text to train on: a file, JSONL, `hub:NAME`, `stdlib`, or `self` for what the model itself writes.
        heldout: text to judge by; None for windows of `data` that are not trained on.
        seqlen: tokens per window.
        windows: at most so many to train on; None for all (of `self`, 1024).
        seed: of their choice.
    """

    data: str
    heldout: str | None = None
    seqlen: int = 256
    windows: int | None = None
    seed: int = 0

    def draw(self, model: str | Path, *, writer: str | Path | None = None, trust_remote_code: bool) -> DrawnText:
        """Choose the windows; nothing is written yet.

        `preparation` draws with the same seed from the same order of windows: first those to calibrate on, which are
        trained on as well (unless there is a limit below them), then those of its gate, which are held out here.

        Args:
            model: to train.
            writer: whose own text `self` is; None for the model's.
        Raises:
            DataError: too little text, or texts that overlap.
        """
        opened = open_model(model, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
        check_seqlen(opened, self.seqlen)
        judged = None if self.heldout is None else self._judged(opened, self.heldout, trust_remote_code)
        if self.data == SELF:
            return self._unwritten(writer or model, judged, trust_remote_code)
        tokenizer = load_tokenizer(opened.skeleton.checkpoint, trust_remote_code=trust_remote_code)
        tokens = tokenise(tokenizer, load_corpus(self.data).documents)
        first, kept = self._cut(len(tokens) // self.seqlen)
        drawn = sample_windows(
            tokens, num_samples=len(tokens) // self.seqlen, seqlen=self.seqlen, seed=self.seed, source=self.data
        )
        check_vocabulary(opened, drawn)
        heldout = drawn[first : first + kept].contiguous() if judged is None else judged
        windows = torch.cat([drawn[:first], drawn[first + kept :]])[: self.windows]
        if self.heldout is not None:
            require_disjoint(windows, heldout, calibration_source=self.data, evaluation_source=self.heldout)
        return DrawnText(
            identity=hash_tokens(torch.cat([windows, heldout])), calibration=self._calibration(first),
            read=lambda *_: (windows, heldout),
        )  # fmt: skip

    def _unwritten(self, writer: str | Path, judged: Tensor | None, trust_remote_code: bool) -> DrawnText:
        """Text that the model has still to write: first what is held out, where nothing else is, then the rest."""
        opened = open_model(writer, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
        check_seqlen(opened, self.seqlen)
        kept = max(num_gate_windows(self.seqlen), MOST_HELD_OUT_TOKENS // self.seqlen) if judged is None else 0
        wanted = kept + (self.windows or SELF_WINDOWS)

        def read(run: Path, device: str, progress: Progress) -> tuple[Tensor, Tensor]:
            windows = kept_windows(
                run / WRITTEN, opened.skeleton.checkpoint, wanted, self.seqlen, seed=self.seed, num_greedy=NUM_GREEDY,
                device=device, trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
            return windows[kept:], windows[:kept] if judged is None else judged

        return DrawnText(identity=SELF, calibration=self._calibration(CALIBRATION_WINDOWS), read=read)

    def _judged(self, opened: StreamedModel, heldout: str, trust_remote_code: bool) -> Tensor:
        most = max(1, MOST_HELD_OUT_TOKENS // self.seqlen)
        return text_windows(opened, heldout, self.seqlen, trust_remote_code=trust_remote_code)[:most].contiguous()

    def _calibration(self, num_windows: int) -> Calibration:
        return Calibration(text=self.data, num_samples=num_windows, seqlen=self.seqlen, seed=self.seed)

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
