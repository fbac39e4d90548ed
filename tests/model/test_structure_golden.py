"""Golden structure of the architectures of transformers 5, each built tiny with random weights.

After a deliberate change run this file with BITWRIGHT_UPDATE_GOLDEN=1 in the environment, then read the difference.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bitwright.model.probe import probe_model
from bitwright.model.structure import BlockStructure, Edge, ModelStructure, RejectedEdge

GOLDEN = Path(__file__).parents[1] / "golden" / "structure"
VOCABULARY = 96

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MHA = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
TIED = {"tie_word_embeddings": True}
HEADS_OF_16 = {"head_dim": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "mistral": ("MistralConfig", BASE | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", BASE | TIED),
    "qwen3": ("Qwen3Config", BASE | HEADS_OF_16),
    "gemma2": ("Gemma2Config", BASE | TIED | HEADS_OF_16 | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", BASE | TIED | HEADS_OF_16 | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", BASE),
    "olmo2": ("Olmo2Config", BASE),
    "cohere": ("CohereConfig", BASE | TIED),
    "gpt_neox": ("GPTNeoXConfig", MHA | {"use_parallel_residual": True}),
    "gpt2": (
        "GPT2Config",
        TIED | {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": ("OPTConfig", MHA | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": (
        "BloomConfig",
        TIED | {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon": ("FalconConfig", MHA | TIED | {"multi_query": True, "parallel_attn": True, "alibi": False}),
    "mixtral": ("MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        BASE | HEADS_OF_16 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        BASE
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
        | {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 64 columns are a hundred times slower when threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> nn.Module:
    """Build an architecture with weights under which every path matters: projections of unit gain, uneven norms."""
    class_name, settings = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


def found(name: str) -> ModelStructure:
    torch.manual_seed(0)
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure = probe_model(model, torch.randint(3, VOCABULARY, (2, 24)), torch.Generator().manual_seed(0))
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()), "the probe changed weights"
    return structure


def readable(structure: ModelStructure) -> dict[str, Any]:
    """What a person checks: names inside the block, one line each."""
    return {
        "blocks_path": structure.blocks_path,
        "tied_head": structure.tied_head,
        "blocks": {block.name: _readable_block(block) for block in structure.blocks},
        "head": _readable_block(structure.head),
    }


def _readable_block(block: BlockStructure) -> dict[str, Any]:
    def short(name: str) -> str:
        return name.removeprefix(block.name + ".")

    def line(edge: Edge | RejectedEdge) -> str:
        rows = "" if edge.rows is None else f" rows {edge.rows[0]}:{edge.rows[1]}"
        text = f"{short(edge.producer)}{rows} -> {', '.join(map(short, edge.consumers))}"
        if isinstance(edge, RejectedEdge):
            return f"{text}: {edge.reason}"
        repeat = f", each head of {edge.head_dim} read {edge.repeat} times" if edge.repeat > 1 else ""
        return f"{edge.kind}: {text}{repeat}"

    return {
        "sites": [f"{s.kind} {short(s.name)} [{s.out_features}, {s.in_features}]" for s in block.sites],
        "stored_transposed": [short(s.name) for s in block.sites if s.transposed],
        "groups": [", ".join(map(short, group.sites)) for group in block.groups],
        "edges": [line(edge) for edge in block.edges],
        "rejected": [line(edge) for edge in block.rejected],
        "uncalled": [short(name) for name in block.uncalled],
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_structure_is_the_golden_one(name: str) -> None:
    text = json.dumps(readable(found(name)), indent=1) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("BITWRIGHT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_structure_survives_json(name: str) -> None:
    structure = found(name)
    text = json.dumps(structure.to_json())
    assert ModelStructure.from_json(json.loads(text)) == structure


def test_every_golden_file_has_an_architecture() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(ARCHITECTURES)
