"""Text that the model writes itself: the right shape, its own distribution, and the same again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.calibration.self_text import generate_windows
from bitwright.model.checkpoint import open_checkpoint
from bitwright.progress import no_progress


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
