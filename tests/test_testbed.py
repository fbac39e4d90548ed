"""Planted outliers: where they were asked for, as large as asked for, and the same function to the last bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright import testbed
from bitwright.demo import demo_model
from bitwright.errors import BitwrightError, CheckpointError, RecipeError, RunError, StructureError, VerificationError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.edits import scale_edges
from bitwright.model.sites import SiteCalls, block_sites
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import quantize
from bitwright.recipe import Recipe, Scheme
from bitwright.testbed import TESTBED_FILE, OutlierTestBed, plant_outliers

FACTOR = 64.0
BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> OutlierTestBed:
    return plant_outliers(demo_model(), tmp_path_factory.mktemp("beds") / "demo", factor=FACTOR)


def saved(folder: Path, config: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def channel_absmax(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """Largest magnitude of every input channel of every site."""
    model = StreamedModel(open_checkpoint(folder))
    found: dict[str, Tensor] = {}
    with model.outside():
        hidden = model.enter(ids)
    for index, name in enumerate(model.block_names):
        with model.block(index) as block:
            sites = block_sites(block, name)

            def on_call(site: Any, x: Tensor) -> None:
                found[site.name] = x.reshape(-1, x.shape[-1]).abs().amax(0)

            with SiteCalls(block, sites, on_call):
                hidden = model.run_block(block, index, hidden)
    return found


def test_the_planted_demo_computes_the_same_function(planted: OutlierTestBed) -> None:
    ids = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(3))
    assert planted.exact
    assert planted.max_logit_difference == 0
    assert torch.equal(transformers_logits(Path(planted.path), ids), transformers_logits(demo_model(), ids))


def test_planted_channels_grow_by_the_factor_and_no_others(planted: OutlierTestBed) -> None:
    ids = torch.randint(2048, (2, 48), generator=torch.Generator().manual_seed(3))
    before, after = channel_absmax(demo_model(), ids), channel_absmax(Path(planted.path), ids)
    columns = {site: edge.columns for edge in planted.edges for site in edge.consumers}
    assert {name.split(".")[-1] for name in columns} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert len(columns) == 5 * 4, "every block"
    assert len(set(columns.values())) == 1, "the same channels everywhere"
    for name, old in before.items():
        expected = old.clone()
        expected[list(columns.get(name, ()))] *= FACTOR
        assert torch.equal(after[name], expected), name


def test_the_directory_is_a_complete_model(planted: OutlierTestBed) -> None:
    path = Path(planted.path)
    original, written = open_checkpoint(demo_model()), open_checkpoint(path)
    assert {n: (i.shape, i.dtype) for n, i in written.stored.items()} == {
        n: (i.shape, i.dtype) for n, i in original.stored.items()
    }
    assert written.config == original.config
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (path / file).read_bytes() == (demo_model() / file).read_bytes()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert set(handle.keys()) == {name for name, shard in index["weight_map"].items() if shard == file.name}
    assert json.loads((path / TESTBED_FILE).read_text()) == json.loads(json.dumps(planted.to_json()))
    assert list(path.parent.iterdir()) == [path], "no temporary folder is left"


@pytest.mark.parametrize(
    ("config", "settings", "dtype"),
    [
        ("LlamaConfig", BASE, torch.bfloat16),
        ("Qwen2Config", BASE, torch.float16),
        ("Phi3Config", BASE, torch.float32),
        ("MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}, torch.bfloat16),
        ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                        "bos_token_id": 1, "eos_token_id": 2}, torch.float32),
    ],
    ids=["llama", "qwen2", "phi3", "mixtral", "gpt2"],
)  # fmt: skip
def test_every_edge_of_other_architectures(
    config: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Biases, grouped heads, fused and transposed weights, experts stored one by one."""
    source = saved(tmp_path / "source", config, settings, dtype)
    found = plant_outliers(source, tmp_path / "planted", channels=2, factor=16, edges="all")
    assert torch.equal(transformers_logits(tmp_path / "planted", IDS), transformers_logits(source, IDS))
    producers = {edge.producer for edge in found.edges}
    before, after = channel_absmax(source, IDS), channel_absmax(tmp_path / "planted", IDS)
    for edge in found.edges:
        for name in edge.consumers:
            if name in before:
                expected = before[name].clone()
                expected[list(edge.columns)] *= 16
                assert torch.equal(after[name], expected), name
    if config == "MixtralConfig":
        assert not any("post_attention_layernorm" in name for name in producers), "a router reads it"
        assert any("experts" in name for name in producers)


def test_norms_that_scale_by_one_plus_weight_are_planted_within_rounding(tmp_path: Path) -> None:
    settings = BASE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    source = saved(tmp_path / "source", "Gemma2Config", settings, torch.bfloat16)
    found = plant_outliers(source, tmp_path / "planted", channels=2)
    assert not found.exact
    expected = transformers_logits(source, IDS)
    moved = float((transformers_logits(tmp_path / "planted", IDS) - expected).abs().max())
    assert 0 < moved <= found.logit_bound
    grown = channel_absmax(tmp_path / "planted", IDS)["model.layers.0.mlp.up_proj"]
    original = channel_absmax(source, IDS)["model.layers.0.mlp.up_proj"]
    # 1 + w' is within half a unit of bfloat16 of 64 (1 + w); so is what the first norm of the block did before it.
    columns = list(found.edges[1].columns)
    torch.testing.assert_close(grown[columns], FACTOR * original[columns], rtol=2.0**-6, atol=0.0)


def test_the_seed_chooses_the_channels(tiny_llama_dir: Path, tmp_path: Path) -> None:
    chosen = [
        plant_outliers(tiny_llama_dir, tmp_path / str(place), channels=3, seed=seed).edges
        for place, seed in enumerate((0, 0, 1))
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0][0].columns != chosen[2][0].columns
    assert all(len(edge.columns) == 3 for edges in chosen for edge in edges)


@contextmanager
def nothing_written(out: Path) -> Iterator[None]:
    before = sorted(out.parent.iterdir())
    yield
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": 48}, RecipeError, r"^factor 48: must be a power of two above 1"),
        ({"factor": 1}, RecipeError, "power of two above 1"),
        ({"factor": 0.5}, RecipeError, "power of two above 1"),
        ({"factor": float("inf")}, RecipeError, "power of two above 1"),
        ({"channels": 0}, RecipeError, r"^channels 0: plant at least 1"),
        ({"channels": 65}, RecipeError, r"^channels 65: model\.layers\.0\.input_layernorm has 64"),
        ({"edges": "nrom"}, RecipeError, "Did you mean 'norm'"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    options: dict[str, Any], error: type[BitwrightError], message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with nothing_written(tmp_path / "out"), pytest.raises(error, match=message):
        plant_outliers(tiny_llama_dir, tmp_path / "out", **options)


def test_what_is_there_is_not_overwritten(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with nothing_written(tmp_path / "out"), pytest.raises(RunError, match="exists and is not empty"):
        plant_outliers(tiny_llama_dir, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty"):
        plant_outliers(tiny_llama_dir, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert plant_outliers(tiny_llama_dir, tmp_path / "empty").path == str(tmp_path / "empty")


def test_a_test_bed_can_be_quantized_and_a_quantized_model_is_refused(planted: OutlierTestBed, tmp_path: Path) -> None:
    result = quantize(planted.path, Recipe(scheme=Scheme.parse("W8A16-channel"), method="rtn"), tmp_path / "run")
    assert result.failure is None
    with nothing_written(tmp_path / "out"), pytest.raises(CheckpointError, match="already quantized"):
        plant_outliers(result.run / "4-model", tmp_path / "out")


def test_a_model_without_such_edges_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "Olmo2Config", BASE)
    with (
        nothing_written(tmp_path / "out"),
        pytest.raises(StructureError, match=r"no proven edge of kind 'norm' .* edges 'all'"),
    ):
        plant_outliers(source, tmp_path / "out")


@pytest.mark.parametrize("factor", [2.0**15, 2.0**20])
def test_leaving_the_range_of_the_stored_type_is_refused(factor: float, tmp_path: Path) -> None:
    """Float16 holds 65504 at most, and weights of some hundredths over 2^15 not exactly."""
    source = saved(tmp_path / "source", "LlamaConfig", BASE, torch.float16)
    with (
        nothing_written(tmp_path / "out"),
        pytest.raises(VerificationError, match=r"^model\.layers\.0\..*leaves the exact range of torch\.float16"),
    ):
        plant_outliers(source, tmp_path / "out", factor=factor)


def test_a_function_that_moved_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control for the verification: consumers that were forgotten are seen on the logits."""

    def forgetful(tensors: Any, sites: Any, scales: Any) -> dict[str, Tensor]:
        return {k: v for k, v in scale_edges(tensors, sites, scales).items() if "layernorm" in k}

    monkeypatch.setattr(testbed, "scale_edges", forgetful)
    with nothing_written(tmp_path / "out"), pytest.raises(VerificationError, match="planting moved the logits"):
        plant_outliers(tiny_llama_dir, tmp_path / "out")
