"""Adapters on disk: there and back, with the package peft in both directions, and what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bitwright.errors import CheckpointError, RecipeError
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.fitting import fit
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import Scheme
from bitwright.train.adapter_files import (
    CONFIG,
    FACTS,
    PICKLE,
    TENSORS,
    base_hash,
    load_adapters,
    read_adapters,
    save_adapters,
)
from bitwright.train.group_adapter import add_group_adapters
from bitwright.train.lora import LoraConfig, LoraLinear, add_adapters, attach, remove_adapters
from bitwright.train.target_layers import block_layers

IDS = torch.arange(12).reshape(1, 12)


def tiny(dtype: torch.dtype = torch.float32, *, hidden: int = 32, layers: int = 2, seed: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def packed(name: str) -> LlamaForCausalLM:
    model, scheme = tiny(), Scheme.parse(name)
    for layer_name, layer in block_layers(model).items():
        weight = layer.weight.detach()
        assert isinstance(weight, Tensor)
        grid = fit(
            weight, scheme.weights.format, scheme.weights.granularity, method="minmax", importance=None,
            scale=FloatScale(torch.float32),
        )  # fmt: skip
        site = QuantizedSite(weight=QTensor(codes=grid.quantize(weight), grid=grid))
        stored = {own.GUARD: own.guard(torch.float32), **own.encode(site)}
        model.set_submodule(layer_name, QuantizedLinear(scheme, *weight.shape, stored, None))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(model: nn.Module, config: LoraConfig) -> None:
    for adapter in add_adapters(model, config).values():
        nn.init.normal_(adapter.lora_b, std=0.1)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny()
    adapted(model, LoraConfig(rank=4, alpha=6, dropout=0.25, targets=("*.q_proj", "*.down_proj")))
    save_adapters(model, tmp_path, base="some/base")
    return tmp_path


@pytest.mark.parametrize("name", [None, "W4A16-g16"])
def test_there_and_back(name: str | None, tmp_path: Path) -> None:
    def build() -> LlamaForCausalLM:
        return tiny() if name is None else packed(name)

    model = build()
    config = LoraConfig(rank=4, alpha=6, dropout=0.25, rslora=True)
    adapted(model, config)
    save_adapters(model, tmp_path, base="some/base", base_hash=base_hash(model))
    again = build()
    adapters = load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {a.config for a in adapters.values()} == {config}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted((CONFIG, TENSORS, FACTS))
    assert not any(parameter.requires_grad for n, parameter in again.named_parameters() if "lora_" not in n)


def test_different_ranks_and_strengths(tmp_path: Path) -> None:
    model = mixed()
    save_adapters(model, tmp_path, base="some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert list(config["rank_pattern"].values()) == [2]
    again = tiny()
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def mixed() -> LlamaForCausalLM:
    """Layer 1's q_proj has another rank, its v_proj another alpha, and its o_proj none."""
    model = tiny()
    configs = {name: LoraConfig(rank=4, alpha=8) for name in block_layers(model) if "self_attn" in name}
    configs["model.layers.1.self_attn.q_proj"] = LoraConfig(rank=2, alpha=8)
    configs["model.layers.1.self_attn.v_proj"] = LoraConfig(rank=4, alpha=5)
    del configs["model.layers.1.self_attn.o_proj"]
    for adapter in attach(model, configs, lambda name, base: LoraLinear(base, configs[name])).values():
        nn.init.normal_(adapter.lora_b, std=0.1)
    return model


@pytest.fixture
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import, about other packages
        return pytest.importorskip("peft")


# peft asks transformers for a name that transformers is about to drop.
of_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@of_peft
@pytest.mark.parametrize("build", ["uniform", "rslora", "mixed"])
def test_peft_loads_what_we_save(peft: Any, build: str, tmp_path: Path) -> None:
    model = mixed() if build == "mixed" else tiny()
    if build != "mixed":
        adapted(model, LoraConfig(rank=4, alpha=6, rslora=build == "rslora", targets=("*.q_proj", "*.down_proj")))
    save_adapters(model, tmp_path, base="some/base", base_hash="0" * 64)
    theirs = peft.PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    assert torch.equal(logits(theirs), logits(model))
    ours = {n for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    found = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert found == ours


@of_peft
def test_peft_and_we_agree_on_layers_that_store_inputs_first(peft: Any, tmp_path: Path) -> None:
    def build() -> GPT2LMHeadModel:
        torch.manual_seed(1)
        config = GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=1
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()

    model = build()
    adapted(model, LoraConfig(rank=4, alpha=6))
    save_adapters(model, tmp_path / "ours", base="some/base", base_hash=base_hash(model))
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(theirs), logits(model))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    again = build()
    load_adapters(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))


@of_peft
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*layers\.1\..*(gate|up)_proj"},
        {
            "target_modules": ["q_proj", "down_proj", "lm_head"],
            "rank_pattern": {"down_proj": 3, r"layers\.0\.self_attn\.q_proj": 5},
            "alpha_pattern": {"q_proj": 20, "^lm_head": 3},
        },
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
    ids=["list", "all-linear", "regex", "patterns", "some layers"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_load_what_peft_saves(peft: Any, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(tiny(dtype), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model = tiny(dtype)
    load_adapters(model, tmp_path)
    assert torch.equal(logits(model), logits(theirs))


def test_the_hash_is_that_of_the_base_with_and_without_adapters() -> None:
    for model in (tiny(), packed("W4A16-g16")):
        before = base_hash(model)
        adapted(model, LoraConfig(rank=4))
        assert base_hash(model) == before
        assert base_hash(remove_adapters(model)) == before
    assert base_hash(tiny()) != base_hash(tiny(seed=2))
    assert base_hash(tiny()) != base_hash(packed("W4A16-g16"))


def test_another_base_is_refused_by_its_weights(tmp_path: Path) -> None:
    model = tiny()
    adapted(model, LoraConfig(rank=4))
    save_adapters(model, tmp_path, base="some/base", base_hash=base_hash(model))
    other = tiny(seed=2)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        load_adapters(other, tmp_path)
    assert load_adapters(other, tmp_path, check_base=False)


def test_another_base_is_refused_by_its_shapes(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"weight \[32, 48\] at model\.layers\.0\.mlp\.down_proj, which is \[16, 48\]"
    ):
        load_adapters(tiny(hidden=16), saved)
    with pytest.raises(CheckpointError, match=r"adapts model\.layers\.1\.mlp\.down_proj, which is no linear layer"):
        load_adapters(tiny(layers=1), saved)
    model = tiny()
    adapted(model, LoraConfig(rank=4))
    with pytest.raises(CheckpointError, match="no linear layer"):
        load_adapters(model, saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not LORA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(lm_head\)"),
        ({"use_dora": True}, "use_dora: True is not supported"),
        ({"some_new_option": 3}, "some_new_option: 3 is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "started as 'pissa_niter_4'"),
        ({"target_modules": ["q_proj"]}, r"does not cover model\.layers\.0\.mlp\.down_proj"),
        ({"target_modules": r".*q_proj"}, r"does not cover model\.layers\.0\.mlp\.down_proj"),
        ({"target_modules": None}, "must be a list or a regular expression"),
        ({"r": 8}, r"down_proj has A \[4, 48\] and B \[32, 4\], but .* says rank 8"),
        ({"r": 0}, "rank must be at least 1"),
        ({"lora_alpha": "much"}, "could not convert"),
    ],
)
def test_configurations_that_are_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapters(saved)


def test_a_configuration_may_name_modules_that_the_model_lacks_or_leaves_out(saved: Path) -> None:
    adapted_layers = set(read_adapters(saved).layers)
    edit(saved, target_modules=["q_proj", "down_proj", "up_proj", "query_key_value"], exclude_modules=["up_proj"])
    assert set(read_adapters(saved).layers) == adapted_layers


def test_adapters_compute_in_float32_whatever_the_file_has(saved: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in load_file(saved / TENSORS).items()}, saved / TENSORS)
    assert {a.lora_a.dtype for a in load_adapters(tiny(torch.bfloat16), saved).values()} == {torch.float32}


def test_keys_that_are_off_or_without_effect_are_read_over(saved: Path) -> None:
    edit(saved, use_dora=False, some_new_option=None, revision="main", peft_version="9.9")
    assert read_adapters(saved).base_hash is None


def test_pickles_are_refused(saved: Path) -> None:
    (saved / TENSORS).rename(saved / PICKLE)
    with pytest.raises(CheckpointError, match="pickled tensors can run code"):
        read_adapters(saved)
    (saved / PICKLE).unlink()
    with pytest.raises(CheckpointError, match=f"no {TENSORS}"):
        read_adapters(saved)


def test_damaged_files_are_refused(saved: Path) -> None:
    tensors = load_file(saved / TENSORS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: t for name, t in tensors.items() if name != key}, saved / TENSORS)
    with pytest.raises(CheckpointError, match="q_proj has lora_B alone"):
        read_adapters(saved)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, saved / TENSORS)
    with pytest.raises(CheckpointError, match=r"base_model\.model\.lm_head\.weight is no matrix"):
        read_adapters(saved)
    (saved / TENSORS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        read_adapters(saved)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_adapters(saved)
    (saved / CONFIG).write_text("{}")
    with pytest.raises(CheckpointError, match="has no peft_type"):
        read_adapters(saved)
    (saved / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read_adapters(saved)


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no adapters"):
        save_adapters(tiny(), tmp_path, base="some/base")
    grouped = packed("W4A16-g16-floatzero")
    add_group_adapters(grouped, LoraConfig(rank=4))
    with pytest.raises(RecipeError, match="group adapters"):
        save_adapters(grouped, tmp_path, base="some/base")
    model = tiny()
    rslora = {name: "q_proj" in name for name in block_layers(model)}
    attach(model, rslora, lambda name, base: LoraLinear(base, LoraConfig(rslora=rslora[name])))
    with pytest.raises(RecipeError, match="one use_rslora"):
        save_adapters(model, tmp_path, base="some/base")
    assert not list(tmp_path.iterdir())
