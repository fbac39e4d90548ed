"""Rotations keep a function, or are refused with the reason; learned ones are never worse than their start.

Legend: D hidden size, S channels of a head.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

from bitwright.errors import RecipeError, StructureError
from bitwright.group_solver import GroupSolver
from bitwright.methods.model_task import ModelTask
from bitwright.methods.rotation import read_rotation, rotate_model
from bitwright.methods.rotation_proof import plan_rotation, random_rotation
from bitwright.model.checkpoint import open_checkpoint
from bitwright.pipeline import evaluate, export, quantize
from bitwright.preflight import estimate
from bitwright.preparation import model_sites, open_model
from bitwright.progress import no_progress
from bitwright.recipe import Recipe, resolve
from bitwright.reports.page import write_report

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "dtype": "float32",
}  # fmt: skip
SMALL: dict[str, Any] = COMMON | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "odd": lambda: LlamaConfig(**COMMON, hidden_size=48, intermediate_size=172, num_key_value_heads=4),
    "no-hadamard": lambda: LlamaConfig(
        **COMMON | {"num_attention_heads": 3}, hidden_size=30, intermediate_size=50, num_key_value_heads=3, head_dim=10
    ),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**SMALL, head_dim=8),
    "mixtral": lambda: MixtralConfig(**EXPERTS),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "opt": (
        lambda: OPTConfig(**COMMON, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32),
        r"norm: a LayerNorm does not commute with rotations",
    ),
    "gpt2": (
        lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, dtype="float32"),
        r"ln_f: a LayerNorm does not commute with rotations",
    ),
    "bloom": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, dtype="float32"),
        r"a LayerNorm does not commute with rotations|do not enter the first block rotated",
    ),
    "gemma2": (
        lambda: Gemma2Config(**SMALL, head_dim=8),
        r"layers\.0: computes something else .*layernorm is read by no weight",
    ),
}


def save(config: PreTrainedConfig, path: Path) -> Path:
    """A random model whose norms and biases are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    model.save_pretrained(path)
    return path


def recipe_of(**options: Any) -> Recipe:
    return Recipe.from_mapping(
        {"scheme": "W4A4-channel", "method": "rtn", "transforms": ["rotation"], "rotation": {"seeds": 1, **options}}
    )


def rotate(source: Path, out: Path, recipe: Recipe, calibration: Tensor | None = None) -> Path:
    model = open_model(source, device="cpu", dtype="float32", trust_remote_code=False)
    plan = resolve(recipe, model_sites(model))
    solver = GroupSolver(model.skeleton, recipe, plan, out / "none")
    tokens = torch.randint(VOCABULARY, (4, 32)) if calibration is None else calibration
    rotate_model(
        ModelTask(
            model=model, plan=plan, recipe=recipe, calibration=tokens, out=out, progress=no_progress,
            fake_quantize=solver.fake_quantize, input_quantizer=solver.input_quantizer,
        )
    )  # fmt: skip
    return out


def logits(path: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_rotated_model_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    source = save(CONFIGS[kind](), tmp_path / "model")
    out = rotate(source, tmp_path / "rotated", recipe_of())
    ids = torch.randint(VOCABULARY, (2, 24))
    expected, found = logits(source, ids), logits(out, ids)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    change = read_rotation(out)
    assert change.frame is not None
    assert torch.allclose(change.frame @ change.frame.T, torch.eye(len(change.frame)), atol=1e-5)
    blocks = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    assert change.notes["head_rotations"] == blocks  # values and outputs of every block, and nothing else


def test_norms_are_folded_and_hidden_states_are_in_the_frame(tmp_path: Path) -> None:
    source = save(CONFIGS["gemma"](), tmp_path / "model")
    out = rotate(source, tmp_path / "rotated", recipe_of())
    tensors = open_checkpoint(out).read(open_checkpoint(out).names)
    norms = [tensor for name, tensor in tensors.items() if "norm" in name]
    assert norms
    assert all(not tensor.any() for tensor in norms)  # a gain of 1 + 0
    ids = torch.randint(VOCABULARY, (1, 16))
    model = open_model(source, device="cpu", dtype="float32", trust_remote_code=False)
    turned = open_model(out, device="cpu", dtype="float32", trust_remote_code=False)
    with model.outside(), turned.outside():
        expected, found = model.enter(ids), turned.enter(ids)
    frame = read_rotation(out).frame
    assert frame is not None
    torch.testing.assert_close(found, expected @ frame, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_rotated_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    config, reason = REFUSED[kind]
    source = save(config(), tmp_path / "model")
    with pytest.raises(StructureError, match=reason):
        rotate(source, tmp_path / "rotated", recipe_of())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tied_head_gets_a_weight_of_its_own_in_the_original_dtype(tmp_path: Path) -> None:
    source = save(CONFIGS["llama-tied"](), tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(source).bfloat16().save_pretrained(source)
    out = rotate(source, tmp_path / "rotated", recipe_of())
    checkpoint = open_checkpoint(out)
    assert set(checkpoint.names) == {*open_checkpoint(source).names, "lm_head.weight"}
    assert {info.dtype for info in checkpoint.stored.values()} == {torch.bfloat16}
    assert checkpoint.config["tie_word_embeddings"] is False


def test_blocks_of_a_rotation_turn_columns_among_themselves(tmp_path: Path) -> None:
    source = save(CONFIGS["llama"](), tmp_path / "model")
    frame = read_rotation(rotate(source, tmp_path / "rotated", recipe_of(block=8))).frame
    assert frame is not None
    assert torch.equal(frame != 0, torch.block_diag(*[torch.ones(8, 8)] * 4).bool())
    with pytest.raises(RecipeError, match=r"rotation.block 12: does not fit the hidden size 32"):
        rotate(source, tmp_path / "other", recipe_of(block=12, online=False))


def test_the_best_of_several_seeds_is_taken(tmp_path: Path) -> None:
    source = save(CONFIGS["llama"](), tmp_path / "model")
    out = rotate(source, tmp_path / "rotated", recipe_of(seeds=3))
    change = read_rotation(out)
    errors = change.notes["seed_errors"]
    assert len(set(errors)) == 3
    model = open_model(source, device="cpu", dtype="float32", trust_remote_code=False)
    plan = plan_rotation(model, torch.randint(VOCABULARY, (2, 32)), no_progress)
    best = random_rotation(plan, errors.index(min(errors)), None).residual.float()
    assert change.frame is not None
    torch.testing.assert_close(change.frame, best)


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_learning_is_never_worse_than_its_start(kind: str, tmp_path: Path) -> None:
    source = save(CONFIGS[kind](), tmp_path / "model")
    out = rotate(source, tmp_path / "rotated", recipe_of(kind="learned", steps=4))
    notes = read_rotation(out).notes
    assert notes["loss"] <= notes["loss_before"]
    ids = torch.randint(VOCABULARY, (2, 24))
    expected, found = logits(source, ids), logits(out, ids)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_learning_turns_within_the_blocks_asked_for(tmp_path: Path) -> None:
    source = save(CONFIGS["llama"](), tmp_path / "model")
    out = rotate(source, tmp_path / "rotated", recipe_of(kind="learned", steps=4, block=16))
    change = read_rotation(out)
    assert change.frame is not None
    inside = torch.block_diag(*[torch.ones(16, 16)] * (change.frame.shape[0] // 16))
    assert torch.equal(change.frame * inside, change.frame)
    assert change.notes["best_step"] > 0


def test_seeds_are_at_least_one() -> None:
    with pytest.raises(RecipeError, match=r"rotation.seeds must be at least 1"):
        recipe_of(seeds=0)


RUN = {"scheme": "W4A4-channel", "method": "rtn", "transforms": ["rotation"], "rotation": {"seeds": 2}, "max_kl": 20.0}


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text)
    return file


@pytest.fixture(scope="module")
def tied_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in bfloat16 with a tokenizer."""
    config = LlamaConfig(**SMALL | {"vocab_size": len(tiny_tokenizer)}, tie_word_embeddings=True)
    path = save(config, tmp_path_factory.mktemp("models") / "tied")
    AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def run_recipe(text: Path, **changes: Any) -> Recipe:
    calibration = {"text": str(text), "num_samples": 4, "seqlen": 32}
    return Recipe.from_mapping({**RUN, "calibration": calibration, **changes})


@pytest.mark.parametrize(("scheme", "to"), [("W4A4-channel", "bitwright"), ("W4A16-channel", "compressed-tensors")])
def test_a_rotated_run_is_evaluated_and_exported_like_any_other(
    scheme: str, to: str, tied_dir: Path, text: Path, tmp_path: Path
) -> None:
    run = quantize(tied_dir, run_recipe(text, scheme=scheme), tmp_path / "run").run
    records = [json.loads(line) for line in (run / "5-records.jsonl").read_text().splitlines()]
    noted = [record for record in records if record["kind"] == "transform"]
    assert noted[0]["transform"] == "rotation"
    assert 0 < noted[0]["invariance_kl"] < 0.01  # the rounding of rotated weights to bfloat16
    online = [site for record in noted[1:] for site in record["sites"]]
    kinds = {site.rpartition(".")[2] for site in online}
    assert kinds == ({"down_proj"} if scheme == "W4A4-channel" else set())
    assert all(record["invariance"] < 1e-5 for record in noted[1:])
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text.read_text().split())))
    score, _ = evaluate(run, str(other), reference=tied_dir, max_windows=2)
    assert score.kl_mean is not None
    export(run, to, tmp_path / "exported")  # verifies that the engine's logits are ours
    assert "Changes before quantization" in write_report(run).read_text()


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("moment", ["rotation: write", "quantize"])
def test_a_killed_run_resumes_to_the_same_bytes(moment: str, tied_dir: Path, text: Path, tmp_path: Path) -> None:
    def kill(what: str, done: int, _total: int) -> None:
        if what == moment and done == 1:
            raise Killed

    undisturbed = quantize(tied_dir, run_recipe(text), tmp_path / "whole").run
    with pytest.raises(Killed):
        quantize(tied_dir, run_recipe(text), tmp_path / "killed", progress=kill)
    rotations = [path.name for path in (tmp_path / "killed" / "work").glob("model-*")]
    assert rotations == ["model-rotation-unfinished" if moment == "rotation: write" else "model-rotation"]
    resumed = quantize(tied_dir, run_recipe(text), tmp_path / "killed")
    assert resumed.resumed_blocks == (moment == "quantize")
    for file in sorted((undisturbed / "4-model").iterdir()):
        assert (resumed.run / "4-model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_disk_that_a_rotated_model_needs_is_part_of_the_estimate(tied_dir: Path, text: Path) -> None:
    model = open_model(tied_dir, device="cpu", dtype="float32", trust_remote_code=False)
    sites = model_sites(model)
    plan = resolve(run_recipe(text), sites)
    without, with_rotation = (
        estimate(model, sites, plan, 4, 2, 32, transforms=names).work_bytes for names in ((), ("rotation",))
    )
    table = open_checkpoint(tied_dir).stored["model.embed_tokens.weight"].num_bytes
    assert with_rotation - without == open_checkpoint(tied_dir).num_bytes + table
