"""From a model directory to a verified result: every artefact, the sizes, and what transformers makes of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bitwright import pipeline
from bitwright.errors import RecipeError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.recipe import Plan, Recipe
from bitwright.records import read_jsonl

ARTEFACTS = ("1-structure.json", "2-stats.safetensors", "3-plan.yaml", "4-model", "5-records.jsonl", "run.json")
Build = Callable[..., Path]


@pytest.fixture(scope="session")
def text(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text)
    return file


@pytest.fixture(scope="session")
def build(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Make a random Llama of one's choice on disk."""

    def make(*, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / "llama"
        torch.manual_seed(0)
        config = LlamaConfig(
            **{
                "vocab_size": len(tiny_tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, **changes,
            }
        )  # fmt: skip
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def models(build: Build) -> dict[torch.dtype, Path]:
    return {dtype: build(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}


def recipe(text: object, scheme: str = "W4A16-g32", method: str = "rtn", **changes: Any) -> Recipe:
    calibration = {"text": None if text is None else str(text), "num_samples": 4, "seqlen": 128}
    # Random models lose much at 2 bits; what is tested here is that the loss is measured and the bytes are right.
    return Recipe.from_mapping(
        {"scheme": scheme, "method": method, "calibration": calibration, "max_kl": 50.0, **changes}
    )


def load(directory: Path, **options: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)).eval()


def our_logits(directory: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, T, V] of our own reading of a directory, streamed block by block."""
    return StreamedModel(open_checkpoint(directory), dtype=dtype).logits(ids)


def require_same_logits(directory: Path, ours: Path, dtype: torch.dtype) -> None:
    ids = torch.arange(2 * 32).view(2, 32) * 5 % 320
    with torch.no_grad():
        found = load(directory)(input_ids=ids).logits.float()
    expected = our_logits(ours, ids, dtype)
    # The same products in the same type; only the order of the sums may differ: a few roundings per block.
    bound = 16 * 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound


def stored_bits_per_weight(run: Path, num_weights: int) -> float:
    """Bits of packed words, scales and zero points in the files, over the quantized weights."""
    total = 0
    for shard in (run / "4-model").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.endswith(("_packed", "_scale", "_zero_point")):
                total += 8 * tensor.numel() * tensor.element_size()
    return total / num_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["g32", "channel", "tensor"])
@pytest.mark.parametrize("symmetry", ["sym", "asym"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_result_loads_in_transformers_with_our_logits(
    models: dict[torch.dtype, Path],
    text: Path,
    tmp_path: Path,
    bits: int,
    symmetry: str,
    granularity: str,
    dtype: torch.dtype,
) -> None:
    scheme = f"W{bits}A16-{granularity}-{symmetry}"
    result = pipeline.quantize(models[dtype], recipe(text, scheme, range_method="minmax"), tmp_path / "run")
    require_same_logits(tmp_path / "run" / "4-model", tmp_path / "run" / "4-model", dtype)
    if (bits, granularity) == (4, "g32"):
        require_same_logits(tmp_path / "run", tmp_path / "run" / "4-model", dtype)

    figures = result.results
    assert math.isfinite(figures["kl_mean"])
    assert figures["num_quantized"] == 14
    stored = stored_bits_per_weight(tmp_path / "run", figures["quantized_weights"])
    # A row of 64 or 96 weights fills whole 32-bit words at every width; the zero points of a column may not.
    padding = 0 if symmetry == "sym" else 32 * 14 * 3 / figures["quantized_weights"]
    assert figures["bits_per_weight"] == pytest.approx(stored, rel=1e-9, abs=padding)
    assert figures["bits_per_weight"] <= stored + 1e-9


def test_every_artefact(models: dict[torch.dtype, Path], text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = pipeline.quantize(models[torch.float32], recipe(text, method="gptq"), run)
    assert result.failure is None
    assert set(ARTEFACTS) <= {file.name for file in run.iterdir()}
    assert not (run / "work").exists()

    structure = json.loads((run / "1-structure.json").read_text())
    assert len(structure["blocks"]) == 2
    plan = Plan.load(run / "3-plan.yaml")
    assert len(plan.quantized) == 14
    stats = load_file(run / "2-stats.safetensors")
    assert stats["calibration_tokens"].shape == (4, 128)
    moments = stats["model.layers.0.self_attn.q_proj.mean_square"]
    assert moments.shape == (64,)
    assert bool((moments > 0).all())
    records = read_jsonl(run / "5-records.jsonl")
    assert [record["kind"] for record in records[:2]] == ["context", "quantize"]
    assert {"model_hash", "data_hash", "seed", "environment"} <= set(records[0])
    assert sorted(record["site"] for record in records if record["kind"] == "site") == sorted(plan.quantized)
    originals = open_checkpoint(models[torch.float32])
    assert open_checkpoint(run / "4-model").names == originals.names == open_checkpoint(run).names

    score, _ = pipeline.evaluate(run, "stdlib:heldout", reference=models[torch.float32], seqlen=128, max_windows=2)
    assert score.kl_mean is not None
    assert score.kl_mean >= 0
    comparison = pipeline.export(run, "compressed-tensors", tmp_path / "exported")
    assert comparison["weights_compared"] > 14
    kinds = [record["kind"] for record in read_jsonl(run / "5-records.jsonl")]
    assert kinds.count("evaluate") == kinds.count("export") == 1
    require_same_logits(tmp_path / "exported", run / "4-model", torch.float32)


def test_identical_call_returns_at_once(models: dict[torch.dtype, Path], text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = pipeline.quantize(models[torch.float32], recipe(text), run)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in run.rglob("*")}
    steps: list[str] = []
    second = pipeline.quantize(
        models[torch.float32], recipe(text), run, progress=lambda what, _done, _total: steps.append(what)
    )
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in run.rglob("*")} == before
    assert second.results == json.loads((run / "run.json").read_text())["results"]
    assert (second.failure, second.results["kl_mean"]) == (first.failure, first.results["kl_mean"])
    assert "quantize" not in steps


def test_sharded_input_gives_the_same_result(
    models: dict[torch.dtype, Path], build: Build, text: Path, tmp_path: Path
) -> None:
    sharded = build(max_shard_size="60KB")
    assert (sharded / "model.safetensors.index.json").exists()
    assert not (sharded / "model.safetensors").exists()
    pipeline.quantize(sharded, recipe(text, method="gptq"), tmp_path / "sharded")
    pipeline.quantize(models[torch.float32], recipe(text, method="gptq"), tmp_path / "single")
    for shard in (tmp_path / "single" / "4-model").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "sharded" / "4-model" / shard.name).read_bytes()


def test_tied_embeddings(build: Build, text: Path, tmp_path: Path) -> None:
    tied = build(tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(tied).names
    pipeline.quantize(tied, recipe(text), tmp_path / "run")
    require_same_logits(tmp_path / "run" / "4-model", tmp_path / "run" / "4-model", torch.float32)
    loaded = cast(Any, load(tmp_path / "run" / "4-model"))
    assert torch.equal(loaded.lm_head.weight, load_file(tied / "model.safetensors")["model.embed_tokens.weight"])


def test_calibration_that_the_model_writes_itself(models: dict[torch.dtype, Path], tmp_path: Path) -> None:
    model = models[torch.float32]
    first = pipeline.quantize(model, recipe("self", method="gptq"), tmp_path / "first")
    pipeline.quantize(model, recipe("self", method="gptq"), tmp_path / "second")
    assert first.results["gate_tokens"] > 0
    tokens = load_file(tmp_path / "first" / "2-stats.safetensors")["calibration_tokens"]
    assert tokens.shape == (4, 128)
    assert len(set(tokens.flatten().tolist())) > 100, "a random model writes nearly uniform tokens"
    for shard in (tmp_path / "first" / "4-model").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "second" / "4-model" / shard.name).read_bytes()


def test_json_lines_calibration(models: dict[torch.dtype, Path], tiny_text: str, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": part}) + "\n" for part in tiny_text.split("\n")))
    plain = tmp_path / "joined.txt"
    plain.write_text(tiny_text.replace("\n", "\n\n"))
    for source, name in ((lines, "lines"), (plain, "plain")):
        pipeline.quantize(models[torch.float32], recipe(source, method="gptq"), tmp_path / name)
    tokens = [load_file(tmp_path / name / "2-stats.safetensors")["calibration_tokens"] for name in ("lines", "plain")]
    assert torch.equal(*tokens)


def test_rows_that_no_standard_group_divides(build: Build, text: Path, tmp_path: Path) -> None:
    """As in a model with 172 = 4 · 43 FFN columns: the nearest divisor is used, stored, counted and said."""
    odd = build(intermediate_size=172)
    result = pipeline.quantize(odd, recipe(text, method="gptq"), tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "3-plan.yaml")
    entry = plan.sites["model.layers.0.mlp.down_proj"]
    assert entry.group_size == 43
    assert "43 in place of 32" in entry.reason
    scale = load_file(tmp_path / "run" / "4-model" / "model-00001-of-00003.safetensors")
    assert scale["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 4)
    stored = stored_bits_per_weight(tmp_path / "run", result.results["quantized_weights"])
    # 172 codes of 4 bits take 22 words where 21.5 would do.
    assert result.results["bits_per_weight"] <= stored <= result.results["bits_per_weight"] * 1.02
    require_same_logits(tmp_path / "run" / "4-model", tmp_path / "run" / "4-model", torch.float32)


@pytest.fixture(scope="session")
def tiny_mixtral_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("rtn", {}),
        ("gptq", {}),
        ("rtn", {"rules": [{"pattern": "*.experts.*", "scheme": "W3A16-channel"}]}),
        ("rtn", {"scheme": "W4A16-g16-asym", "rules": [{"pattern": "*.experts.*", "scheme": "W4A16-g16"}]}),
    ],
    ids=["rtn", "gptq", "two-schemes", "others-asymmetric"],
)
def test_mixture_of_experts(
    tiny_mixtral_dir: Path, text: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    wanted = recipe(text, **{"scheme": "W4A16-g16", "method": method, **changes})
    result = pipeline.quantize(tiny_mixtral_dir, wanted, tmp_path / "run")
    assert result.results["num_quantized"] == 2 * (4 + 4 * 2)  # a gate_up and a down per expert
    assert result.results["num_kept"] == 2
    ours = StreamedModel(open_checkpoint(tmp_path / "run" / "4-model"))
    theirs = load(tmp_path / "run" / "4-model")
    theirs(input_ids=torch.arange(8).view(1, 8))  # linears are decompressed by the first forward, experts by loading
    found = theirs.state_dict()
    for index, name in enumerate(ours.block_names):
        with ours.block(index) as block:
            for local, parameter in block.named_parameters():
                assert torch.equal(found[f"{name}.{local}"], parameter), local
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(found[router], load(tiny_mixtral_dir).state_dict()[router])
    comparison = pipeline.export(tmp_path / "run", "compressed-tensors", tmp_path / "exported")
    assert comparison["engine"] == "transformers"


@pytest.mark.parametrize("method", ["gptaq", "guided", "guided_gptaq"])
@pytest.mark.parametrize("num_samples", [8, 1])
def test_experts_whose_tokens_cannot_be_matched_are_solved_by_gptq_and_say_so(
    tiny_mixtral_dir: Path, text: Path, tmp_path: Path, method: str, num_samples: int
) -> None:
    calibration = {"text": str(text), "num_samples": num_samples, "seqlen": 16 if num_samples > 1 else 2}
    pipeline.quantize(
        tiny_mixtral_dir, recipe(text, scheme="W4A16-g16", method=method, calibration=calibration), tmp_path / "run"
    )
    sites = [each for each in read_jsonl(tmp_path / "run" / "5-records.jsonl") if each["kind"] == "site"]
    experts = [site for site in sites if "experts" in site["site"]]
    assert len(experts) == 16
    for site in sites:
        if site not in experts:
            assert site["method"] == method
        elif site["num_tokens"]:
            assert (site["method"], site["reason"].startswith("an expert sees other tokens")) == ("gptq", True)
        else:
            assert (site["method"], site["reason"].startswith("no calibration token")) == ("rtn", True)
    assert num_samples > 1 or any(site["num_tokens"] == 0 for site in experts)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"scheme": "W4A16-g16-asym"}, "W4A16-g16-asym"),
        ({"ignore": ["lm_head", "*.experts.*"]}, "kept in 16 bit"),
        ({"rules": [{"pattern": "*.0.*experts.down*", "scheme": "W8A16"}]}, "W4A16-g16, W8A16-channel"),
    ],
)
def test_experts_that_transformers_cannot_read_are_refused(
    tiny_mixtral_dir: Path, text: Path, tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    """It drops their zero points, and reads all of them by one scheme: nothing could prove the result."""
    options = {"scheme": "W4A16-g16", "layout": "compressed-tensors", **changes}
    with pytest.raises(RecipeError, match=rf"experts: {names}\. Transformers .* one symmetric scheme\. Give them"):
        pipeline.quantize(tiny_mixtral_dir, recipe(text, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_asymmetric_scheme_beside_another_is_refused(
    models: dict[torch.dtype, Path], build: Build, text: Path, tmp_path: Path
) -> None:
    """Transformers reads all weights with zero points by one scheme, whatever the groups of the configuration say."""
    options: dict[str, Any] = {"layout": "compressed-tensors"}
    rules = [{"pattern": "*.q_proj", "scheme": "W8A16"}]
    with pytest.raises(RecipeError, match=r"W4A16-g32-asym, W8A16-channel: transformers reads .* Use symmetric"):
        pipeline.quantize(
            models[torch.float32], recipe(text, "W4A16-g32-asym", rules=rules, **options), tmp_path / "run"
        )
    with pytest.raises(RecipeError, match="W4A16-g32-asym, W4A16-g43-asym: transformers reads"):
        pipeline.quantize(build(intermediate_size=172), recipe(text, "W4A16-g32-asym", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()
