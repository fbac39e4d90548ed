"""Text that the model writes itself: the right shape, its own distribution, and the same again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.calibration import self_text
from bitwright.calibration.self_text import generate_windows, kept_windows
from bitwright.model.checkpoint import open_checkpoint
from bitwright.progress import Progress, no_progress


def windows_of(folder: Path, num_windows: int = 3, seqlen: int = 24, seed: int = 0) -> Tensor:
    return generate_windows(
        open_checkpoint(folder),
        num_windows,
        seqlen,
        seed=seed,
        device="cpu",
        trust_remote_code=False,
        progress=no_progress,
    )


def test_windows_begin_as_a_text_and_are_full(tiny_llama_dir: Path) -> None:
    windows = windows_of(tiny_llama_dir)
    assert windows.shape == (3, 24)
    assert bool((windows[:, 0] == 0).all()), "the begin-of-text token"
    assert not bool((windows[:, 2:] == 1).any()), "no end of text on the way"


def test_seed_decides(tiny_llama_dir: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = windows_of(tiny_llama_dir)
    assert torch.equal(torch.get_rng_state(), before), "sampling must not disturb anybody else's random numbers"
    torch.manual_seed(6)
    assert torch.equal(windows_of(tiny_llama_dir), first)
    assert not torch.equal(windows_of(tiny_llama_dir, seed=1), first)


@pytest.mark.parametrize(
    "habits", [{"repetition_penalty": 5.0}, {"max_new_tokens": 4}, {"no_repeat_ngram_size": 1}, {"min_p": 0.9}]
)
def test_the_models_generation_habits_do_not_bend_the_sample(
    habits: dict[str, float], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Statistics are wanted under the model's own distribution, not under what its authors recommend for chats."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **habits}), encoding="utf-8")
    assert torch.equal(windows_of(folder), windows_of(tiny_llama_dir))


def test_the_shortest_window_is_the_prompt_itself(tiny_llama_dir: Path) -> None:
    assert windows_of(tiny_llama_dir, seqlen=2).shape == (3, 2)


def kept(source: Path, folder: Path, *, seqlen: int = 24, progress: Progress = no_progress) -> Tensor:
    return kept_windows(
        folder, open_checkpoint(source), 5, seqlen, seed=0, num_greedy=4, device="cpu", trust_remote_code=False,
        progress=progress,
    )  # fmt: skip


def test_first_tokens_are_the_most_probable_and_the_rest_is_sampled(tiny_llama_dir: Path, tmp_path: Path) -> None:
    windows = kept(tiny_llama_dir, tmp_path)
    assert windows.shape == (5, 24)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    logits[..., 1] = -torch.inf  # the end of text is suppressed
    is_best = logits[:, 1:-1].argmax(-1) == windows[:, 2:]  # after begin-of-text and a random token
    assert bool(is_best[:, :4].all())
    assert float(is_best[:, 4:].float().mean()) < 0.5
    assert kept(tiny_llama_dir, tmp_path / "short", seqlen=4).shape == (5, 4)


def test_writing_goes_on_where_it_was_killed(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "WINDOWS_PER_SHARD", 2)
    whole = kept(tiny_llama_dir, tmp_path / "whole")

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tiny_llama_dir, tmp_path / "killed", progress=stop)
    first = (tmp_path / "killed" / "shard-00000.safetensors").stat().st_mtime_ns
    assert torch.equal(kept(tiny_llama_dir, tmp_path / "killed"), whole)
    assert (tmp_path / "killed" / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert len({tuple(row.tolist()) for row in whole}) == 5, "every shard has a seed of its own"
