"""Evaluate models of any size, one decoder block in memory at a time.

Shapes: N windows, T tokens, D hidden size.
"""

from pathlib import Path

from torch import Tensor

from bitwright.evaluation.score import Score, Scorer
from bitwright.model.activations import Activations, batch_slices
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress


def enter_all(model: StreamedModel, windows: Tensor, path: Path) -> Activations:
    """Embed all windows [N, T] and return the hidden states that enter the first block, stored in `path`."""
    num_windows, seqlen = windows.shape
    store: Activations | None = None
    with model.outside():
        for start, end in batch_slices(num_windows, seqlen):
            hidden = model.enter(windows[start:end])
            if store is None:
                store = Activations(path, (num_windows, seqlen, hidden.shape[-1]), model.dtype)
            store.write(start, hidden)
    assert store is not None
    return store


def final_hidden(model: StreamedModel, windows: Tensor, path: Path, progress: Progress, label: str) -> Activations:
    """Return the hidden states [N, T, D] that leave the last block, stored in `path`."""
    store = enter_all(model, windows, path)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            for start, end in batch_slices(*windows.shape):
                store.write(start, model.run_block(block, index, store.read(start, end, model.device)))
        progress(label, index + 1, model.num_blocks)
    return store


def evaluate(
    model: StreamedModel, windows: Tensor, work: Path, progress: Progress, *, reference: StreamedModel | None = None
) -> Score:
    """Score a model on windows [N, T], also against a reference if given; `work` is a folder for hidden states."""
    return evaluate_windows(model, windows, work, progress, reference=reference).result()


def evaluate_windows(
    model: StreamedModel, windows: Tensor, work: Path, progress: Progress, *, reference: StreamedModel | None = None
) -> Scorer:
    """As `evaluate`, but return the scorer, which also knows the figures of each window."""
    hidden = final_hidden(model, windows, work / "hidden-model.bin", progress, "evaluate")
    if reference is None:
        scorer = score_heads(model, hidden, windows, None, None)
    else:
        expected = final_hidden(reference, windows, work / "hidden-reference.bin", progress, "reference")
        scorer = score_heads(model, hidden, windows, reference, expected)
        expected.delete()
    hidden.delete()
    return scorer


def compare_heads(
    model: StreamedModel,
    hidden: Activations,
    windows: Tensor,
    reference: StreamedModel | None,
    expected: Activations | None,
) -> Score:
    """Turn the last hidden states into a score."""
    return score_heads(model, hidden, windows, reference, expected).result()


def score_heads(
    model: StreamedModel,
    hidden: Activations,
    windows: Tensor,
    reference: StreamedModel | None,
    expected: Activations | None,
) -> Scorer:
    """Turn the last hidden states into a scorer, which also knows the figures of each window."""
    scorer = Scorer()
    with model.outside():
        if reference is None or reference is model:
            _score_windows(scorer, model, hidden, windows, reference, expected)
        else:
            with reference.outside():
                _score_windows(scorer, model, hidden, windows, reference, expected)
    return scorer


def _score_windows(
    scorer: Scorer,
    model: StreamedModel,
    hidden: Activations,
    windows: Tensor,
    reference: StreamedModel | None,
    expected: Activations | None,
) -> None:
    for index in range(windows.shape[0]):
        ids = windows[index : index + 1]
        logits = model.leave(ids, hidden.read(index, index + 1, model.device))
        other = None
        if reference is not None and expected is not None:
            other = reference.leave(ids, expected.read(index, index + 1, reference.device))[0].to(logits.device)
        scorer.add(ids[0], logits[0], other)
