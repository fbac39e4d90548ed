"""A whole model loads as transformers loads it, without its bars."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bitwright.model.whole import load_whole


def test_no_bar_is_shown_and_the_setting_stays(tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert logging.is_progress_bar_enabled()
    loaded = load_whole(tiny_llama_dir, dtype=torch.float32, attn_implementation="eager")
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    other = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert "Loading weights" in capfd.readouterr().err
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, other(input_ids=ids).logits)
