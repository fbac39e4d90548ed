"""Evaluation block by block gives the figures of evaluation in memory."""

import math
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.evaluation.score import Score, Scorer
from bitwright.evaluation.streamed import evaluate
from bitwright.model import activations
from bitwright.model.activations import batch_slices
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.progress import no_progress

NUM_WINDOWS, SEQLEN = 5, 48


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(320, (NUM_WINDOWS, SEQLEN))


@pytest.fixture(scope="module")
def changed_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with every weight a little off: something to diverge."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("models") / "changed"
    model.save_pretrained(folder)
    return folder


def in_memory(folder: Path, windows: Tensor, reference: Path | None, dtype: torch.dtype = torch.float32) -> Score:
    """Both models whole, one window at a time."""
    models = [
        None if each is None else AutoModelForCausalLM.from_pretrained(each, dtype=dtype).eval()
        for each in (folder, reference)
    ]
    scorer = Scorer()
    with torch.no_grad():
        for ids in windows:
            logits, expected = (None if model is None else model(input_ids=ids[None]).logits[0] for model in models)
            assert logits is not None
            scorer.add(ids, logits, expected)
    return scorer.result()


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(open_checkpoint(folder), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_reference", [False, True])
def test_streamed_figures_are_those_in_memory_bit_for_bit(
    with_reference: bool,
    dtype: torch.dtype,
    tiny_llama_dir: Path,
    changed_dir: Path,
    windows: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One window per batch, as in memory: matrix products of other shapes would round otherwise."""
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", SEQLEN)
    reference = stream(tiny_llama_dir, dtype) if with_reference else None
    found = evaluate(stream(changed_dir, dtype), windows, tmp_path, no_progress, reference=reference)
    assert found == in_memory(changed_dir, windows, tiny_llama_dir if with_reference else None, dtype)
    if with_reference:
        assert found.kl_mean is not None
        assert found.kl_mean > 0
    assert list(tmp_path.iterdir()) == [], "hidden states are not left behind"


def test_batches_only_move_figures_within_rounding(
    tiny_llama_dir: Path, changed_dir: Path, windows: Tensor, tmp_path: Path
) -> None:
    assert len(batch_slices(NUM_WINDOWS, SEQLEN)) == 1
    found = evaluate(stream(changed_dir), windows, tmp_path, no_progress, reference=stream(tiny_llama_dir))
    expected = in_memory(changed_dir, windows, tiny_llama_dir)
    # Two blocks of sums over at most 128 terms move a logit by far less than 2^-16 of itself, and so every figure.
    for ours, theirs in zip(astuple(found), astuple(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=2.0**-12)


def test_a_model_against_itself(tiny_llama_dir: Path, windows: Tensor, tmp_path: Path) -> None:
    alone = evaluate(stream(tiny_llama_dir), windows, tmp_path, no_progress)
    model = stream(tiny_llama_dir)
    found = evaluate(model, windows, tmp_path, no_progress, reference=model)
    assert (found.kl_mean, found.kl_p999, found.same_top1) == (0, 0, 1)
    assert found.perplexity == alone.perplexity
    assert math.isfinite(alone.perplexity)


def test_progress_counts_blocks(tiny_llama_dir: Path, windows: Tensor, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    model = stream(tiny_llama_dir)
    evaluate(model, windows, tmp_path, lambda *step: seen.append(step), reference=model)
    assert seen == [("evaluate", 1, 2), ("evaluate", 2, 2), ("reference", 1, 2), ("reference", 2, 2)]


@pytest.mark.parametrize(
    ("num_windows", "seqlen", "expected"),
    [
        (5, 1024, [(0, 2), (2, 4), (4, 5)]),
        (2, 10_000, [(0, 1), (1, 2)]),
        (3, 16, [(0, 3)]),
        (0, 16, []),
    ],
)
def test_batches_cover_every_window_once(num_windows: int, seqlen: int, expected: list[tuple[int, int]]) -> None:
    assert batch_slices(num_windows, seqlen) == expected
