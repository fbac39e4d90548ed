"""The fixtures themselves: what other tests take for granted about the tiny model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_tiny_llama_is_a_complete_safetensors_directory(tiny_llama_dir: Path, tiny_text: str) -> None:
    files = {path.name for path in tiny_llama_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = tokenizer(tiny_text[:200], return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    logits = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], len(tokenizer))
    assert torch.isfinite(logits).all()
