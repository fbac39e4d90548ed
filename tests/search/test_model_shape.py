"""What a model weighs and computes follows from its configuration: mixtures of experts, caches, active parameters.

Every count is compared with a model that transformers builds, or with a published figure.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitwright.errors import BitwrightError
from bitwright.schemes import Scheme
from bitwright.search.cost import Workload, cache_bytes, memory, speed
from bitwright.search.hardware import load_hardware
from bitwright.search.model_shape import ModelShape, shape_of_config
from bitwright.search.stored_size import exported_bytes

BASE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FINE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", BASE | LOCAL),
    "qwen2_moe": ("Qwen2MoeConfig", BASE | FINE | {"shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("Qwen3MoeConfig", BASE | FINE | {"head_dim": 16}),
    "olmoe": ("OlmoeConfig", BASE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", BASE | LATENT),
    "deepseek_v3": ("DeepseekV3Config", BASE | LATENT | {"n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssConfig", BASE | LOCAL | {"head_dim": 16, "sliding_window": 8, "rope_parameters": YARN}),
    "granite_moe": ("GraniteMoeConfig", BASE | LOCAL),
    "granite_moe_shared": ("GraniteMoeSharedConfig", BASE | LOCAL | {"shared_intermediate_size": 32}),
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves the configuration of a class in transformers, and returns its folder."""

    def save(class_name: str, settings: dict[str, Any]) -> Path:
        getattr(transformers, class_name)(**settings).save_pretrained(tmp_path)
        return tmp_path

    return save


def _built(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def _met_by_one_token(model: Any) -> int:
    """Count the parameters but those of experts whose gradient a token leaves at zero."""
    model(input_ids=torch.tensor([[7]])).logits.square().sum().backward()
    unmet = sum(
        expert.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name
        for expert in parameter.grad
        if not expert.any()
    )
    return sum(parameter.numel() for parameter in model.parameters()) - unmet


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_and_caches_are_those_of_the_model(name: str, saved: Callable[..., Path]) -> None:
    folder = saved(*FAMILIES[name])
    shape, model = shape_of_config(folder), _built(folder)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.routed == (2, 4)
    assert shape.num_active_parameters == _met_by_one_token(model) < shape.num_parameters
    ids = torch.arange(3, 21).view(3, 6)
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    assert cache_bytes(shape, 6, 3, 32) == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    routers = {site.out_features for site in shape.sites if site.kind == "router"}
    assert 4 in routers
    four = shape.uniform(Scheme.parse("W4A16-g16"))
    assert all(four[site.name] is None for site in shape.sites if site.kind == "router")
    assert all(four[site.name] is not None for site in shape.sites if site.kind != "router")


# The settings that decide counts in each model's config.json on the hub (named in the comments), and billions of
# parameters, all and active, on its card. OpenAI leaves out the embedding of what is active, DeepSeek too.
FULL_SIZE: list[tuple[str, dict[str, Any], float, float]] = [
    (
        "MixtralConfig",  # mistralai/Mixtral-8x7B-v0.1; arXiv:2401.04088 gives 47 and 13
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        },
        46.7,
        12.9,
    ),
    (
        "Qwen3MoeConfig",  # Qwen/Qwen3-30B-A3B; the card gives 30.5 and 3.3
        {
            "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        30.5,
        3.35,
    ),
    (
        "Qwen2MoeConfig",  # Qwen/Qwen1.5-MoE-A2.7B; the card gives 14.3 and 2.7
        {
            "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 1408, "num_hidden_layers": 24,
            "shared_expert_intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_experts": 60, "num_experts_per_tok": 4,
        },
        14.3,
        2.7,
    ),
    (
        "OlmoeConfig",  # allenai/OLMoE-1B-7B-0924; arXiv:2409.02060 gives 6.9 and 1.3
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        },
        6.9,
        1.3,
    ),
    (
        "GptOssConfig",  # openai/gpt-oss-20b; the card gives 20.91 and 3.61, and the embedding has 0.58
        {
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
            "num_experts_per_tok": 4, "sliding_window": 128,
        },
        20.91,
        3.61 + 0.58,
    ),
    (
        "DeepseekV3Config",  # deepseek-ai/DeepSeek-V3; arXiv:2412.19437 gives 671 and 37, and the embedding has 0.93
        {
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
            "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        },
        671,
        36.6 + 0.93,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "settings", "total", "active"), FULL_SIZE)
def test_published_counts_follow_from_the_configuration(
    class_name: str, settings: dict[str, Any], total: float, active: float, saved: Callable[..., Path]
) -> None:
    shape = shape_of_config(saved(class_name, settings))
    assert shape.num_parameters / 1e9 == pytest.approx(total, rel=5e-3)
    assert shape.num_active_parameters / 1e9 == pytest.approx(active, rel=2e-2)


@pytest.fixture
def mixtral(saved: Callable[..., Path]) -> ModelShape:
    return shape_of_config(saved(FULL_SIZE[0][0], FULL_SIZE[0][1] | {"dtype": "bfloat16"}))


def test_a_step_reads_the_experts_that_its_tokens_wake(mixtral: ModelShape) -> None:
    """Published: 46.7 billion in all, 12.9 active. Memory holds all of them, and one token reads the active ones."""
    device = load_hardware("h200")
    one, many = (speed(mixtral, {}, Workload(context=2, prompt=1, batch=batch), device).decode_s for batch in (1, 4))
    embedding = mixtral.vocab_size * mixtral.hidden_size
    assert one == pytest.approx(2 * (mixtral.num_active_parameters - embedding) / device.bytes_per_s, rel=1e-3)
    experts = sum(site.out_features * site.in_features for site in mixtral.sites if site.kind == "expert")
    woken = (1 - (6 / 8) ** 4) - 2 / 8
    assert many - one == pytest.approx(2 * experts * woken / device.bytes_per_s, rel=1e-2)
    held = memory(mixtral, {}, Workload(context=2, prompt=1), device)
    assert held.weight_bytes == 2 * mixtral.num_parameters
    assert held.workspace_bytes < 2**20


def test_sizes_of_a_mixture(mixtral: ModelShape) -> None:
    four = exported_bytes(mixtral, mixtral.uniform(Scheme.parse("W4A16-g128")))
    quantized = sum(site.out_features * site.in_features for site in mixtral.sites if site.kind != "router")
    expected = 2 * (mixtral.num_parameters - quantized) + quantized * (4 + 16 / 128) / 8
    assert four == pytest.approx(expected, rel=1e-4)


def test_experts_need_a_kernel_of_their_own(mixtral: ModelShape) -> None:
    device, work = load_hardware("h100-sxm"), Workload(context=1024)
    dense = sum(site.kind == "linear" for site in mixtral.sites)
    assert dense == 4 * 32
    for scheme, with_kernel in (("W4A16-g128", True), ("W4A16-g128-asym", False), ("fp8", True), ("fp8-a16", False)):
        found = speed(mixtral, mixtral.uniform(Scheme.parse(scheme)), work, device)
        assert found.decoded_sites == (0 if with_kernel else 16 * 32)


def test_windows_of_layers(saved: Callable[..., Path]) -> None:
    """Mistral's first model slides in every layer, and its configuration names no kinds of layers."""
    shape = shape_of_config(saved("MistralConfig", BASE | {"sliding_window": 16}))
    assert [cache.window for cache in shape.caches] == [16, 16]
    shape = shape_of_config(saved(*FAMILIES["gpt_oss"]))
    assert [cache.window for cache in shape.caches] == [8, None]


def test_heads_that_differ_between_layers(saved: Callable[..., Path]) -> None:
    """Gemma 4 has wider heads in the layers that see everything; the whole's configuration refuses to say either."""
    settings = BASE | {"head_dim": 16, "global_head_dim": 32, "sliding_window": 4, "num_hidden_layers": 6}
    settings |= {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
    folder = saved("Gemma4TextConfig", settings)
    shape, model = shape_of_config(folder), _built(folder)
    assert [cache.window for cache in shape.caches] == [4] * 5 + [None]
    layers = model(input_ids=torch.arange(3, 6).view(1, 3), use_cache=True).past_key_values.layers
    assert cache_bytes(shape, 3, 1, 32) == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert shape.attention_width == (5 * 4 * 16 + 4 * 32) // 6


def test_layers_that_differ_are_refused(saved: Callable[..., Path]) -> None:
    settings = {key: value for key, value in BASE.items() if key not in ("intermediate_size", "num_hidden_layers")}
    settings |= {key: LATENT[key] for key in LATENT if "head" in key or "rank" in key} | {"num_layers": 2}
    settings |= {"n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 48}
    with pytest.raises(BitwrightError, match=r"LongcatFlashConfig: layers have \[4, 6\] experts"):
        shape_of_config(saved("LongcatFlashConfig", settings | {"ffn_hidden_size": 96}))


def test_a_model_loaded_in_another_dtype_is_that_of_a_checkpoint_in_it(tmp_path: Path) -> None:
    shapes: dict[str, ModelShape] = {}
    for name in ("bfloat16", "float32"):
        transformers.LlamaConfig(**BASE, dtype=name).save_pretrained(tmp_path / name)
        shapes[name] = replace(shape_of_config(tmp_path / name), name="")
    wide = shapes["bfloat16"].in_dtype(torch.float32)
    assert wide == shapes["float32"]
    packed = shapes["bfloat16"].in_dtype(torch.float32, packed={wide.sites[0].name}).site_dtypes
    assert [dtype for dtype in packed.values() if dtype != torch.float32] == [torch.bfloat16]
