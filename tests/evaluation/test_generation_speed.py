"""Speed of generation: what is counted, and what is refused before anything is loaded."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.errors import DataError
from bitwright.evaluation import generation_speed
from bitwright.evaluation.generation_speed import Rate, measure_speed


def test_rates_follow_the_clock(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by 1, 2, 3 … s at each look: repetition r prefills in 4 r + 1 and decodes in 4 r + 3 s."""
    ticks = itertools.accumulate(itertools.count(0))
    monkeypatch.setattr(generation_speed, "_now", lambda _: float(next(ticks)))
    found = measure_speed(tiny_llama_dir, prompt_tokens=10, new_tokens=4, repeats=3)
    prefills, decodes = [4 * r + 1 for r in (1, 2, 3)], [4 * r + 3 for r in (1, 2, 3)]
    assert found.prefill_tokens_per_s == Rate(
        median=10 / prefills[1], slowest=10 / prefills[2], fastest=10 / prefills[0]
    )
    assert found.decode_tokens_per_s == Rate(median=3 / decodes[1], slowest=3 / decodes[2], fastest=3 / decodes[0])
    assert (found.dtype, found.device, found.repeats) == ("float32", "cpu", 3)


def test_every_new_token_is_fed_once_after_the_prompt(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are fed are the likeliest ones after all before them, computed without a cache."""
    seen: list[Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    hook = model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    monkeypatch.setattr(generation_speed, "load", lambda *_, **__: model)
    steps: list[tuple[str, int, int]] = []
    measure_speed(tiny_llama_dir, prompt_tokens=10, new_tokens=5, repeats=1, progress=lambda *step: steps.append(step))
    hook.remove()
    assert steps == [("generate", 1, 2), ("generate", 2, 2)]
    assert [ids.shape[1] for ids in seen] == [10, 1, 1, 1, 1] * 2
    text = seen[0]
    for fed in seen[1:5]:
        with torch.no_grad():
            assert fed.item() == model(input_ids=text).logits[0, -1].argmax()
        text = torch.cat([text, fed], dim=1)


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ((0, 4, 1), "cannot be measured"),
        ((4, 1, 1), "cannot be measured"),
        ((4, 4, 0), "cannot be measured"),
        ((100, 29, 1), "128 positions, prompt and new tokens are 129"),
    ],
)
def test_lengths_that_cannot_be_measured(lengths: tuple[int, int, int], says: str, tiny_llama_dir: Path) -> None:
    prompt_tokens, new_tokens, repeats = lengths
    with pytest.raises(DataError, match=says):
        measure_speed(tiny_llama_dir, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
