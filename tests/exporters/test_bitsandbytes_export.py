"""Checkpoints that bitsandbytes loads, and those that it made: equal in every bit, and trainable."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright import pipeline
from bitwright.adapter_run import AdapterTask, train_adapter
from bitwright.checkup.diagnose import diagnose_checkpoint
from bitwright.errors import CheckpointError, MissingDependency, RunError, VerificationError
from bitwright.exporters.bitsandbytes_directory import verify_with_bitsandbytes, write_bitsandbytes
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.layouts import bitsandbytes as layout
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.recipe import Recipe
from bitwright.train.options import TrainingOptions
from bitwright.training_run import load_in_memory
from bitwright.training_text import TrainingText

bnb: Any = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

SCHEMES = ["nf4-b64-dq", "nf4-b32", "fp4-bnb-b64-dq"]
SITE = "model.layers.1.mlp.down_proj"


def quantized(model: Path, folder: Path, scheme: str, rules: list[dict[str, str]] | None = None) -> Path:
    """A finished run in bitwright's own layout."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    recipe = Recipe.from_mapping(
        {
            "scheme": scheme,
            "method": "rtn",
            "layout": "bitwright",
            "range_method": "minmax",
            "rules": rules or [],
            "calibration": {"text": str(text), "num_samples": 1, "seqlen": 64},
            "max_kl": 50.0,
        }
    )
    return pipeline.quantize(model, recipe, folder / "run").run


@pytest.fixture(scope="module", params=SCHEMES)
def run(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny_llama_dir, tmp_path_factory.mktemp("bnb"), request.param)


@pytest.fixture(scope="module")
def sound(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    return quantized(tiny_llama_dir, tmp_path_factory.mktemp("sound"), "nf4-b64")


@pytest.fixture
def exported(sound: Path, tmp_path: Path) -> Path:
    """An export of it that a test may damage."""
    write_bitsandbytes(sound / "4-model", tmp_path / "exported")
    return tmp_path / "exported"


def change(directory: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the file that holds the site."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{SITE}.weight" in tensors:
            how(tensors)
            save_file(tensors, file, metadata={"format": "pt"})


def bnb_base(model: Path, folder: Path, dtype: torch.dtype, **how: Any) -> Path:
    """What transformers saves after bitsandbytes has quantized a model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **how)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    loaded.save_pretrained(folder)
    return folder


def test_an_export_loads_with_bitsandbytes(run: Path, tmp_path: Path) -> None:
    comparison = pipeline.export(run, "bitsandbytes", tmp_path / "exported")
    assert comparison["weights_compared"] == len(open_checkpoint(run / "4-model").names)
    assert comparison["max_logit_difference"] <= comparison["logit_bound"]
    config = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert "transformers_weights" not in config


def test_bitsandbytes_writes_the_same_bytes(tiny_llama_dir: Path, exported: Path, tmp_path: Path) -> None:
    """Of the same model, by the same formats: every tensor, and the JSON of the state."""
    base = bnb_base(tiny_llama_dir, tmp_path / "theirs", torch.float32, bnb_4bit_quant_type="nf4")
    ours, theirs = open_checkpoint(exported), open_checkpoint(base)
    assert ours.stored.keys() == theirs.stored.keys()
    for name in theirs.stored:
        found, expected = (checkpoint.read_stored([name])[name] for checkpoint in (ours, theirs))
        assert found.dtype == expected.dtype, name
        assert found.equal(expected), name


def test_other_schemes_are_refused_by_site(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run = quantized(tiny_llama_dir, tmp_path, "nf4-b64", [{"pattern": "*.layers.1.*down_proj", "scheme": "nf3-g64"}])
    with pytest.raises(RunError, match=f"^{SITE}: bitsandbytes cannot hold nf3-g64, only nf4 and fp4-bnb") as caught:
        pipeline.export(run, "bitsandbytes", tmp_path / "exported")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_two_kinds_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run = quantized(tiny_llama_dir, tmp_path, "nf4-b64", [{"pattern": "*.layers.1.*down_proj", "scheme": "nf4-b64-dq"}])
    with pytest.raises(RunError, match=f"{SITE}: nf4-g64-dq: bitsandbytes needs one kind of weight"):
        pipeline.export(run, "bitsandbytes", tmp_path / "exported")


def test_rows_that_blocks_do_not_divide_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run = quantized(tiny_llama_dir, tmp_path, "nf4-b128")
    with pytest.raises(RunError, match="rows of 64 weights do not end where a block of 128 ends"):
        pipeline.export(run, "bitsandbytes", tmp_path / "exported")


@pytest.fixture(
    scope="module",
    params=[("nf4", False, torch.bfloat16), ("nf4", True, torch.float32), ("fp4", True, torch.float32)],
    ids=["nf4", "nf4-dq", "fp4-dq"],
)
def base(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quant_type, nested, dtype = request.param
    folder = tmp_path_factory.mktemp("base") / "model"
    bnb_base(tiny_llama_dir, folder, dtype, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    for file in tiny_llama_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_a_base_of_bitsandbytes_is_read_as_it_reads_it(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    assert checkpoint.is_packed
    assert len(checkpoint.packed_names()) == 14
    assert checkpoint.shape(f"{SITE}.weight") == (64, 128)
    compared = verify_with_bitsandbytes(base, False)
    assert compared["weights_compared"] == len(checkpoint.names)


def test_its_layers_become_ours(base: Path) -> None:
    dtype = open_checkpoint(base).dense_dtype
    theirs: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    weights = {
        name: bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in theirs.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    assert len(weights) == 14
    ours = load_in_memory(base, "cpu", dtype, trust_remote_code=False)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, weight in weights.items():
        layer = ours.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert layer.dtype == dtype
        assert layer.site().dense(dtype).equal(weight)
        columns = x[:, : weight.shape[1]]
        with torch.no_grad():
            assert layer(columns).equal(nn.functional.linear(columns, weight))


def test_adapters_train_on_it(base: Path, tmp_path: Path, tiny_text: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text, encoding="utf-8")
    task = AdapterTask(
        text=TrainingText(data=str(text), seqlen=16, windows=4),
        training=TrainingOptions(steps=1, batch=1),
    )
    result = train_adapter(base, task, tmp_path / "run")
    assert len(result.losses) == 1
    assert (tmp_path / "run" / "4-adapter" / "adapter_model.safetensors").is_file()


def test_blocks_of_zeros_are_read_as_zeros() -> None:
    """bitsandbytes stores the scale 0 for them, or one that double quantization makes positive or negative."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    weight[9, 64:128] = 0
    for nested in (False, True):
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
        parts = {name.rpartition(".")[2]: tensor for name, tensor in state.as_dict(packed=True).items()}
        site = layout.decode({**parts, "weight": packed})
        assert site.dense().equal(bnb.functional.dequantize_4bit(packed, state))
        assert str(layout.scheme_of(site)) == ("nf4-g64-dq" if nested else "nf4-g64")
        layer = QuantizedLinear(layout.scheme_of(site), 64, 256, own.encode(site), None)
        assert layer.site().dense().equal(site.dense())


def test_a_state_of_zero_scales_alone_is_read() -> None:
    packed, state = bnb.functional.quantize_4bit(torch.zeros(4, 64), quant_type="nf4", compress_statistics=True)
    parts = {name.rpartition(".")[2]: tensor for name, tensor in state.as_dict(packed=True).items()}
    site = layout.decode({**parts, "weight": packed})
    assert not site.dense().any()
    assert str(layout.scheme_of(site)) == "nf4-g64"


def test_blocks_across_rows_are_refused() -> None:
    packed, state = bnb.functional.quantize_4bit(torch.randn(2, 96), quant_type="nf4", blocksize=64)
    parts = {name.rpartition(".")[2]: tensor for name, tensor in state.as_dict(packed=True).items()}
    with pytest.raises(CheckpointError, match="blocks of 64 weights run across the ends of rows of 96"):
        layout.decode({**parts, "weight": packed})


@pytest.mark.parametrize(
    ("config", "message"),
    [({"load_in_8bit": True}, "8-bit"), ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "as bfloat16")],
)
def test_what_cannot_be_read_is_refused(config: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(whole | {"quantization_config": {"quant_method": "bitsandbytes", **config}}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "base")


@pytest.mark.parametrize("part", ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"])
def test_a_missing_part_is_named(part: str, exported: Path) -> None:
    change(exported, lambda tensors: tensors.pop(f"{SITE}.weight.{part}"))
    with pytest.raises(CheckpointError, match=f"{SITE}.weight.{part} is missing; the file is incomplete"):
        open_checkpoint(exported)


def test_a_state_that_is_no_json_is_named(exported: Path) -> None:
    change(exported, lambda tensors: tensors[f"{SITE}.weight.quant_state.bitsandbytes__nf4"].zero_())
    with pytest.raises(CheckpointError, match=f"{SITE}.weight: its quant_state cannot be read"):
        open_checkpoint(exported).shape(f"{SITE}.weight")


def test_verification_finds_weights_read_otherwise(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = layout.unpack_high_first
    monkeypatch.setattr(layout, "unpack_high_first", lambda packed, n: unpack(packed, n).flip(-1))
    with pytest.raises(VerificationError, match=r"q_proj\.weight: transformers reads other values than were written"):
        verify_with_bitsandbytes(exported, False)


def test_a_copy_that_stands_for_other_weights_is_found(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = layout.encode

    def spoilt(site: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        parts = encode(site, dtype)
        return parts | {"weight.absmax": torch.nextafter(parts["weight.absmax"], torch.tensor(9.0))}

    monkeypatch.setattr(layout, "encode", spoilt)
    with pytest.raises(VerificationError, match="stands for other values than in"):
        pipeline.export(sound, "bitsandbytes", tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_without_bitsandbytes_the_message_says_how(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match="pip install bitsandbytes accelerate, or give --no-verify"):
        verify_with_bitsandbytes(exported, False)
    with pytest.raises(MissingDependency, match=r"pip install bitsandbytes\.$"):
        load_in_memory(exported, "cpu", torch.float32, trust_remote_code=False)


def test_the_check_up_understands_it(tiny_llama_dir: Path, exported: Path) -> None:
    checkup = diagnose_checkpoint(tiny_llama_dir, exported, num_windows=1, seqlen=32)
    assert checkup.num_quantized == 14
    assert [finding.kind for finding in checkup.findings if finding.severity == "error"] == []
    change(exported, lambda tensors: tensors[f"{SITE}.weight.absmax"].mul_(-1))
    spoilt = diagnose_checkpoint(tiny_llama_dir, exported, num_windows=1, seqlen=32)
    assert SITE in [finding.site for finding in spoilt.findings if finding.severity == "error"]


def test_the_check_up_finds_a_missing_part(tiny_llama_dir: Path, exported: Path) -> None:
    change(exported, lambda tensors: tensors.pop(f"{SITE}.weight.absmax"))
    checkup = diagnose_checkpoint(tiny_llama_dir, exported, num_windows=1, seqlen=32)
    found = [(finding.kind, finding.site) for finding in checkup.findings if finding.severity == "error"]
    assert found == [("missing-tensor", SITE)]


def test_a_base_is_inspected_and_evaluated(base: Path, tmp_path: Path, tiny_text: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text, encoding="utf-8")
    assert pipeline.inspect(base).schemes
    score, _ = pipeline.evaluate(base, str(text), max_windows=1, seqlen=32)
    assert score.perplexity > 1
