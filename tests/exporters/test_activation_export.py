"""Models whose inputs are quantized, from a recipe to an export that transformers loads and computes alike.

What an engine does with inputs leaves no trace in its weights: only logits show it, and in bfloat16 rounding hides it.
So verification compares in float32, and must find an engine that does nothing with them, or something else.
"""

import importlib
import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from bitwright import pipeline
from bitwright.demo import demo_model
from bitwright.errors import ResourceError, VerificationError
from bitwright.exporters.registered import EXPORTERS
from bitwright.exporters.transformers_directory import SHARE_OF_EFFECT, verify_with_transformers
from bitwright.model.checkpoint import open_checkpoint
from bitwright.recipe import Recipe

pytest.importorskip("compressed_tensors")

SCHEMES = {
    "W8A8": "int-quantized",
    "W8A8-asym": "int-quantized",
    "W8A8-static-minmax": "int-quantized",
    "W8A8-static-minmax-actasym": "int-quantized",
    "W4A8-g32": "pack-quantized",
    "W4A4-g32-actasym": "pack-quantized",
    "fp8": "float-quantized",
    "fp8-static": "float-quantized",
    "fp8-block32": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4-a16": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp4-a16": "mxfp4-pack-quantized",
    "mxfp6-a16": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


@pytest.fixture(scope="module")
def model(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 Llama; read only."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bfloat16"
    save_model(LlamaForCausalLM(config), folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def save_model(model: Any, folder: Path) -> None:
    """Save a model in bfloat16 with heavier weights than at initialisation, so that its logits are far from even."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.05, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def text(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text, encoding="utf-8")
    return file


def quantize(model: Path, text: str | Path, out: Path, scheme: str, **changes: Any) -> Path:
    recipe = Recipe.from_mapping(
        {
            "scheme": scheme,
            "method": "rtn",
            "range_method": "minmax",
            "calibration": {"text": str(text), "num_samples": 2, "seqlen": 128},
            "max_kl": 50.0,
            **changes,
        }
    )
    return pipeline.quantize(model, recipe, out).run


def quantization_config(run: Path) -> dict[str, Any]:
    return json.loads((run / "4-model" / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def formats(run: Path) -> list[str]:
    return sorted({group["format"] for group in quantization_config(run)["config_groups"].values()})


def assert_computes_alike(comparison: dict[str, Any], *, quantizes_inputs: bool) -> None:
    assert comparison["max_logit_difference"] <= comparison["logit_bound"]
    assert ("rms_input_effect" in comparison) == quantizes_inputs
    if quantizes_inputs:
        assert comparison["rms_input_effect"] > 0
        assert comparison["rms_logit_difference"] <= comparison["rms_logit_bound"]
        assert comparison["rms_logit_bound"] < 1.1 * SHARE_OF_EFFECT * comparison["rms_input_effect"], "in float32"


@pytest.fixture(scope="module")
def runs(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs of the model by their scheme, each made when first asked for; read only."""
    folder = tmp_path_factory.mktemp("runs")

    def run(scheme: str) -> Path:
        path = folder / scheme
        return path if path.is_dir() else quantize(model, text, path, scheme)

    return run


@pytest.fixture
def exported(runs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def export(scheme: str) -> Path:
        EXPORTERS["compressed-tensors"].write(runs(scheme) / "4-model", tmp_path / "exported")
        return tmp_path / "exported"

    return export


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_export_is_verified(scheme: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    assert formats(runs(scheme)) == [SCHEMES[scheme]]
    comparison = pipeline.export(runs(scheme), "compressed-tensors", tmp_path / "exported")
    assert_computes_alike(comparison, quantizes_inputs=not scheme.endswith("a16"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES, "W4A4-g32", "fp8-block128", "mxfp6"])
def test_an_export_of_the_demo_model_is_verified(scheme: str, tmp_path: Path) -> None:
    run = quantize(demo_model(), "stdlib", tmp_path / "run", scheme)
    comparison = pipeline.export(run, "compressed-tensors", tmp_path / "exported")
    assert_computes_alike(comparison, quantizes_inputs=not scheme.endswith("a16"))


RULES = [
    {"pattern": "*.q_proj", "scheme": "nvfp4"},
    {"pattern": "*.k_proj", "scheme": "mxfp4-a16"},
    {"pattern": "*.v_proj", "scheme": None},
    {"pattern": "*.o_proj", "scheme": "mxfp8"},
    {"pattern": "*.gate_proj", "scheme": "W4A16-g32"},
    {"pattern": "*.up_proj", "scheme": "fp8-static"},
    {"pattern": "*.layers.1.mlp.down_proj", "scheme": "W4A8-g32"},
]


def test_many_layouts_in_one_model(model: Path, text: Path, tmp_path: Path) -> None:
    run = quantize(model, text, tmp_path / "run", "W8A8-static-minmax-actasym", rules=RULES)
    assert quantization_config(run)["format"] == "mixed-precision"
    assert formats(run) == [
        "float-quantized", "int-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized",
        "pack-quantized",
    ]  # fmt: skip
    comparison = pipeline.export(run, "compressed-tensors", tmp_path / "exported")
    assert_computes_alike(comparison, quantizes_inputs=True)


def test_experts_beside_quantized_inputs(tiny_tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path) -> None:
    """Experts in one 3-D parameter are packed; inputs of shared experts have no batch dimension and share one scale."""
    config = Qwen2MoeConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        dtype="bfloat16",
    )
    folder = tmp_path / "model"
    save_model(Qwen2MoeForCausalLM(config), folder)
    tiny_tokenizer.save_pretrained(folder)
    rules = [{"pattern": "*.self_attn.*", "scheme": "nvfp4"}, {"pattern": "*.shared_expert.*", "scheme": "W8A8"}]
    run = quantize(folder, text, tmp_path / "run", "W4A16-g32", rules=rules)
    assert formats(run) == ["int-quantized", "nvfp4-pack-quantized", "pack-quantized"]
    comparison = pipeline.export(run, "compressed-tensors", tmp_path / "exported")
    assert_computes_alike(comparison, quantizes_inputs=True)


def test_transformers_loads_the_run_directory(model: Path, runs: Callable[[str], Path]) -> None:
    ids = torch.arange(40).view(1, -1)
    with redirect_stderr(io.StringIO()), torch.no_grad():  # progress bars
        found, expected = (
            AutoModelForCausalLM.from_pretrained(path)(ids).logits.float() for path in (runs("W8A8-asym"), model)
        )
    # Eight bits lose less than a tenth, and something.
    assert 0 < float((found - expected).square().sum()) < 0.01 * float(expected.square().sum())


Spoil = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ignored(module: nn.Module, given: Tensor, rounded: Tensor) -> Tensor:
    return given


def ignored_in_one_site(module: nn.Module, given: Tensor, rounded: Tensor) -> Tensor:
    return given if getattr(module, "is_first", False) else rounded


def as_kernels_scale(module: nn.Module, given: Tensor, rounded: Tensor) -> Tensor:
    """Another convention for the step: absmax / 127."""
    scale = given.abs().amax(-1, keepdim=True) / 127
    return (given / scale).round() * scale


def per_tensor(module: nn.Module, given: Tensor, rounded: Tensor) -> Tensor:
    scale = given.abs().amax() / 127.5
    return (given / scale).clamp(-128, 127).round() * scale


@pytest.mark.parametrize(
    ("scheme", "spoil"),
    [
        *((scheme, ignored) for scheme in ("W8A8", "W8A8-static-minmax-actasym", "fp8", "mxfp8", "nvfp4")),
        ("W8A8", ignored_in_one_site),
        ("W8A8", as_kernels_scale),
        ("W8A8", per_tensor),
    ],
)
def test_an_engine_that_rounds_inputs_otherwise_is_found(
    scheme: str, spoil: Spoil, exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = exported(scheme)
    forward: Any = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    quantized, seen = forward.forward_quantize, list[nn.Module]()

    def spoilt(module: nn.Module, value: Tensor, base_name: str, args: Any) -> Tensor:
        if not seen:
            seen.append(module)
            vars(module)["is_first"] = True
        return spoil(module, value, quantized(module, value.clone(), base_name, args))

    monkeypatch.setattr(forward, "forward_quantize", spoilt)
    with pytest.raises(VerificationError, match=r"logits differ from ours by .* \(RMS\), where"):
        verify_with_transformers(directory, False)
    assert seen


def test_static_scales_are_those_that_the_engine_rounds_to(exported: Callable[[str], Path]) -> None:
    tensors: dict[str, Tensor] = {}
    for file in exported("W8A8-static-mse").glob("*.safetensors"):
        tensors |= load_file(file)
    scales = [tensor for name, tensor in tensors.items() if name.endswith("input_scale")]
    assert len(scales) == 14
    assert all(scale.equal(scale.bfloat16().to(scale.dtype)) for scale in scales)


def test_verification_needs_memory_for_float32(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = exported("W8A8")
    original = open_checkpoint(directory)
    parameters = sum(math.prod(original.shape(name)) for name in original.names)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * parameters))
    with pytest.raises(ResourceError, match=r"verification loads the whole model: .* GB needed"):
        verify_with_transformers(directory, False)


def changed_model(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the model with another configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_model_that_does_not_say_its_dtype(model: Path, text: Path, tmp_path: Path) -> None:
    """Transformers would take it from the first tensor, here an FP8 scale."""
    silent = changed_model(model, tmp_path / "model", lambda config: config.pop("dtype"))
    run = quantize(silent, text, tmp_path / "run", "nvfp4-a16")
    comparison = pipeline.export(run, "compressed-tensors", tmp_path / "exported")
    assert_computes_alike(comparison, quantizes_inputs=False)


def test_a_model_stored_in_another_dtype_than_it_says(model: Path, text: Path, tmp_path: Path) -> None:
    """Transformers would round the float32 scales to bfloat16."""
    wide = changed_model(model, tmp_path / "model", lambda _: None)
    tensors = {name: tensor.float() for name, tensor in load_file(wide / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    run = quantize(wide, text, tmp_path / "run", "W8A8")
    assert quantization_config(run)["quant_method"] == "bitwright"
