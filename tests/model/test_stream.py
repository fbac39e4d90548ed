"""A streamed model computes what the whole model does, on every architecture, and refuses what it cannot follow."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bitwright.errors import CheckpointError, StructureError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel

VOCABULARY = 97
SEQLEN = 16

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
SMALL = {key: BASE[key] for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"head_dim": 8, "sliding_window": 8}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
DEEPSEEK = {
    "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "llama_tied": ("LlamaConfig", BASE | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", BASE | WINDOW),
    "qwen2": ("Qwen2Config", BASE),
    "qwen3": ("Qwen3Config", BASE | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", BASE | WINDOW),
    "gemma3": ("Gemma3TextConfig", BASE | WINDOW),
    "phi3": ("Phi3Config", BASE),
    "olmo2": ("Olmo2Config", BASE),
    "cohere": ("CohereConfig", BASE),
    "gpt_neox": ("GPTNeoXConfig", MHA),
    "gpt2": ("GPT2Config", GPT2 | ENDS),
    "opt": ("OPTConfig", MHA | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", SMALL | {"n_layer": 3, "n_head": 4}),
    "falcon_multi_query": ("FalconConfig", MHA | {"multi_query": True}),
    "falcon_alibi": ("FalconConfig", MHA | {"alibi": True}),
    "mixtral": ("MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "deepseek_v3": ("DeepseekV3Config", BASE | DEEPSEEK | {"num_key_value_heads": 4}),
    "granite_moe": ("GraniteMoeConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", BASE | WINDOW | {"num_local_experts": 4, "rope_parameters": YARN}),
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """Build an architecture with weights that all matter and save it; return the whole model and its directory."""
    class_name, settings = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name in model.state_dict() and buffer.is_floating_point():
                path, _, leaf = name.rpartition(".")
                noise = 0.05 * torch.randn(buffer.shape)
                # In float32, as the original stores it, and where bfloat16 is too coarse to hold the differences.
                setattr(model.get_submodule(path), leaf, buffer.float() + 8 + noise)
    model.save_pretrained(folder)
    return model, folder


def ids_of(num_windows: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (num_windows, SEQLEN), generator=torch.Generator().manual_seed(seed))


def all_on_meta(model: StreamedModel) -> bool:
    return all(parameter.is_meta for parameter in model.skeleton.model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_are_the_whole_models(name: str, tmp_path: Path) -> None:
    whole, folder = saved(name, tmp_path)
    ids = ids_of(3)
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
    model = StreamedModel(open_checkpoint(folder))
    assert all_on_meta(model)
    found = model.logits(ids)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    # Experts run one by one here and batched in the whole model: the same products in another order, a few roundings.
    bound = 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (found - expected).abs().max() <= bound
    assert all_on_meta(model)
    assert model.skeleton.unused == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "deepseek_v3"])
def test_streamed_logits_in_half_precision(name: str, tmp_path: Path) -> None:
    """Also compares what transformers keeps in float32 whatever the compute type (a router's correction bias)."""
    _, folder = saved(name, tmp_path, torch.bfloat16)
    options = {"experts_implementation": "eager", "dtype": torch.bfloat16}
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ids = ids_of(2)
    with torch.no_grad():
        expected = whole(input_ids=ids).logits.float()
    model = StreamedModel(open_checkpoint(folder), dtype=torch.bfloat16)
    assert torch.equal(model.logits(ids), expected)


def test_weights_are_in_memory_only_inside_their_context(tmp_path: Path) -> None:
    _, folder = saved("llama_tied", tmp_path)
    model = StreamedModel(open_checkpoint(folder))
    parameters = dict(model.skeleton.model.named_parameters())

    def loaded() -> set[str]:
        return {name for name, parameter in model.skeleton.model.named_parameters() if not parameter.is_meta}

    inside = {name for name in parameters if name.startswith("model.layers.1.")}
    outside = {name for name in parameters if not name.startswith("model.layers.")}
    with model.block(1) as block:
        assert loaded() == inside
        assert all(not parameter.is_meta for parameter in block.parameters())
    assert loaded() == set()
    with model.outside():
        assert loaded() == outside
        whole: Any = model.skeleton.model
        assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert loaded() == set()


def test_a_block_is_put_back_after_an_error(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    model = StreamedModel(open_checkpoint(folder))
    with pytest.raises(KeyboardInterrupt), model.block(0), model.outside():
        raise KeyboardInterrupt
    assert all_on_meta(model)


def test_batches_of_other_shapes_are_learned_in_turn(tmp_path: Path) -> None:
    """A last, smaller batch of windows needs its own masks; entering it must not disturb the first shape."""
    whole, folder = saved("bloom", tmp_path)
    model = StreamedModel(open_checkpoint(folder))
    batches = [ids_of(3), ids_of(1, seed=1), ids_of(3, seed=2)]
    with model.outside():
        hidden = [model.enter(ids) for ids in batches]
    for index in range(model.num_blocks):
        with model.block(index) as block:
            hidden = [model.run_block(block, index, each) for each in hidden]
    with model.outside():
        found = [model.leave(ids, each) for ids, each in zip(batches, hidden, strict=True)]
    for ids, logits in zip(batches, found, strict=True):
        with torch.no_grad():
            assert torch.equal(logits, whole(input_ids=ids).logits)


def test_the_model_is_whole_again_after_a_pass(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    model = StreamedModel(open_checkpoint(folder))
    blocks = list(model.skeleton.model.get_submodule(model.blocks_path))
    model.logits(ids_of(1))
    assert all(a is b for a, b in zip(blocks, model.skeleton.model.get_submodule(model.blocks_path), strict=True))


class Detour(nn.Module):
    """Stands in for a Llama's inner model: the same parts, and something done around the blocks."""

    def __init__(self, inner: Any, way: str) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.inner.embed_tokens(input_ids)
        position = self.inner.rotary_emb(hidden, torch.arange(input_ids.shape[1]).unsqueeze(0))
        options: dict[str, Any] = {"position_embeddings": position}
        layers = list(self.inner.layers)
        if self.way == "reversed":
            layers.reverse()
        if self.way == "looped":
            layers = layers * 2
        if self.way == "skipping":
            layers = layers[::2]
        for layer in layers:
            if self.way == "tokens as a number":
                options["number"] = int(input_ids.sum())
            if self.way == "tokens as a mask":
                options["attention_mask"] = input_ids[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1) > 40
            hidden = layer(hidden, **options)
            if self.way == "altered":
                hidden = hidden * 0.5
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.inner.norm(hidden))


def detoured(folder: Path, way: str) -> StreamedModel:
    saved("llama", folder)
    model = StreamedModel(open_checkpoint(folder))
    whole: Any = model.skeleton.model
    detour = Detour(whole.model, way)
    whole.model.forward = detour.forward
    return model


def test_a_detour_that_changes_nothing_is_followed(tmp_path: Path) -> None:
    """Control for the refusals below: they are due to the change, not to the stand-in."""
    model = detoured(tmp_path, "straight")
    assert bool(torch.isfinite(model.logits(ids_of(2))).all())


def test_a_hidden_state_altered_between_blocks_is_refused(tmp_path: Path) -> None:
    model = detoured(tmp_path, "altered")
    with (
        model.outside(),
        pytest.raises(StructureError, match=r"^LlamaForCausalLM: the hidden state is changed between"),
    ):
        model.enter(ids_of(2))
    assert all_on_meta(model)


@pytest.mark.parametrize("way", ["reversed", "looped", "skipping"])
def test_blocks_called_otherwise_than_once_in_order_are_refused(way: str, tmp_path: Path) -> None:
    model = detoured(tmp_path, way)
    with model.outside(), pytest.raises(StructureError, match=r"^LlamaForCausalLM: .*once, in their order"):
        model.enter(ids_of(2))


@pytest.mark.parametrize("way", ["tokens as a mask", "tokens as a number"])
def test_arguments_that_depend_on_the_tokens_are_refused(way: str, tmp_path: Path) -> None:
    model = detoured(tmp_path, way)
    with model.outside():
        model.enter(ids_of(2))
        with pytest.raises(StructureError, match="arguments that depend on the tokens"):
            model.enter(ids_of(2, seed=1))


def test_pieces_of_experts_and_plain_weights(tmp_path: Path) -> None:
    """Where a fused 3-D parameter's rows lie in a checkpoint that stores every expert's gate and up by themselves."""
    _, folder = saved("mixtral", tmp_path)
    skeleton = StreamedModel(open_checkpoint(folder)).skeleton
    mlp = "model.layers.1.mlp.experts"
    expected: list[tuple[str, int | None, int, int]] = []
    for expert in range(4):
        stored = f"model.layers.1.block_sparse_moe.experts.{expert}"
        expected += [(f"{stored}.w1.weight", expert, 0, 48), (f"{stored}.w3.weight", expert, 48, 96)]
    assert skeleton.stored_pieces(f"{mlp}.gate_up_proj") == expected
    assert skeleton.stored_pieces(f"{mlp}.down_proj") == [
        (f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight", expert, 0, 32) for expert in range(4)
    ]
    plain = "model.layers.1.self_attn.q_proj.weight"
    assert skeleton.stored_pieces(plain) == [(plain, None, 0, 32)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_pieces_hold_the_rows_that_they_name(name: str, tmp_path: Path) -> None:
    whole, folder = saved(name, tmp_path)
    checkpoint = open_checkpoint(folder)
    skeleton = StreamedModel(checkpoint).skeleton
    stacks = [name for name, parameter in whole.named_parameters() if parameter.ndim == 3]
    assert stacks
    for parameter in stacks:
        weight = whole.get_parameter(parameter).detach()
        covered = torch.zeros(weight.shape[:2], dtype=torch.int64)
        for stored, expert, first, end in skeleton.stored_pieces(parameter):
            assert torch.equal(checkpoint.read([stored])[stored], weight[expert, first:end])
            covered[expert, first:end] += 1
        assert bool((covered == 1).all()), "every row is stored once"


def test_experts_stored_in_one_tensor_have_no_pieces(tmp_path: Path) -> None:
    """Their codes would have no place in the checkpoint: to be refused, not to be left out in silence."""
    _, folder = saved("granite_moe", tmp_path)
    skeleton = StreamedModel(open_checkpoint(folder)).skeleton
    with pytest.raises(
        CheckpointError, match=r"block_sparse_moe\.input_linear\.weight: holds all experts in one tensor"
    ):
        skeleton.stored_pieces("model.layers.1.block_sparse_moe.experts.gate_up_proj")
