"""Fixtures every test may use: fixed seeds, a text, and a tiny random Llama on disk."""

import random
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

TINY_VOCABULARY = 320
TINY_CONTEXT = 128

# The same examples on every run and every machine: a failure seen once can be seen again.
hypothesis.settings.register_profile("bitwright", derandomize=True, deadline=None)
hypothesis.settings.load_profile("bitwright")

# Tiny tensors gain nothing from threads, and on a busy machine threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """About 40 kB of varied prose without repeated sentences; the same on every machine."""
    generator = random.Random(0)
    subjects = ("the miller", "an old clock", "my sister", "every river", "the quiet engineer", "a borrowed horse")
    verbs = ("counts", "forgets", "repairs", "follows", "measures", "carries", "paints", "sells", "remembers")
    objects = ("seven lamps", "the winter road", "a letter", "bread and salt", "the northern bridge", "two maps")
    ends = ("before dawn", "without a word", "near the harbour", "for nobody", "when the bell rings")
    parts = (subjects, verbs, objects, ends)
    sentences = [
        " ".join(generator.choice(part) for part in parts) + f" ({generator.randrange(10_000)})." for _ in range(600)
    ]
    return "\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds one `<s>` in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=TINY_CONTEXT
    )


TINY_SHAPE: dict[str, Any] = {
    "vocab_size": TINY_VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": TINY_CONTEXT, "bos_token_id": 0, "eos_token_id": 1,
    "dtype": "float32",
}  # fmt: skip


def _saved(kind: Any, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A random model of a kind and its tokenizer as a Hugging Face directory."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama (2 blocks, hidden 64, FFN 128, 4 heads over 2) as a Hugging Face directory; read only."""
    config = LlamaConfig(**TINY_SHAPE, intermediate_size=128, tie_word_embeddings=False)
    return _saved(LlamaForCausalLM, config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_moe_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral (2 blocks of 2 experts, which are slices of 3-D parameters) as a directory; read only."""
    config = MixtralConfig(**TINY_SHAPE, intermediate_size=64, num_local_experts=2, num_experts_per_tok=1)
    return _saved(MixtralForCausalLM, config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny-moe")
