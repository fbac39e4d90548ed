"""transformers with the plug-in computes what we compute, and refuses what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import bitwright
from bitwright.errors import CheckpointError
from bitwright.model.checkpoint import WEIGHT_INDEX, open_checkpoint
from bitwright.model.layouts import own
from bitwright.model.stream import StreamedModel
from bitwright.nn.linear import QuantizedLinear
from bitwright.recipe import Recipe
from bitwright.schemes import FAMILIES, Scheme
from bitwright.transformers_plugin import BitwrightConfig, BitwrightQuantizer

PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
# Rows of 48 and 88 weights: most groups are ragged, and 88 columns fill no whole 32-bit words at odd widths.
SIZES = {"hidden_size": 48, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
OTHERS = (
    "W8A8-static-minmax-actasym", "W8A8-static-mse-actg32", "W4A4-channel", "W3A16-channel-asym", "W4A16-block32",
    "W4A16-g8-floatzero", "nf4-b64-dq", "kmeans4-channel-o0.45", "kmeans2-g32-o5", "fp8-tensor-static",
)  # fmt: skip
IDS = torch.arange(2 * 24).view(2, 24) * 5 % 256
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Make a random bfloat16 Llama and quantize it in our layout; return the run."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(tiny_text, encoding="utf-8")

    def make(scheme: str, rules: dict[str, str] | None = None, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("plugin")
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 64,
            "tie_word_embeddings": False, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 1,
            "dtype": "bfloat16", **SIZES, **changes,
        }  # fmt: skip
        model = cast(Any, LlamaForCausalLM(LlamaConfig(**sizes))).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / "model")
        tiny_tokenizer.save_pretrained(folder / "model")
        recipe = Recipe.from_mapping(
            {
                "scheme": scheme,
                "method": "rtn",
                "layout": "bitwright",
                "rules": [{"pattern": pattern, "scheme": other} for pattern, other in (rules or {}).items()],
                "calibration": {"text": str(text), "num_samples": 1, "seqlen": 32},
                "max_kl": 1e9,
            }
        )
        return bitwright.quantize(folder / "model", recipe, folder / "run").run

    return make


@pytest.fixture(scope="module")
def every_scheme(build: Build) -> Path:
    """A run with another scheme in each linear layer; read only."""
    schemes = [*FAMILIES, *OTHERS]
    num_blocks = -(-len(schemes) // len(PROJECTIONS))
    sites = [f"model.layers.{block}.{name}" for block in range(num_blocks) for name in PROJECTIONS]
    return build("nf4", dict(zip(sites, schemes, strict=False)), num_hidden_layers=num_blocks)


@pytest.fixture(scope="module")
def weight_only(build: Build) -> Path:
    """A run whose inputs are not quantized; read only."""
    return build("nf4-b64-dq", {"*.down_proj": "kmeans2-g32-o5", "*.o_proj": "W3A16-channel-asym"}, num_hidden_layers=2)


@pytest.fixture
def copy(weight_only: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(weight_only / "4-model", tmp_path / "copy"))


def load(directory: Path, **options: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(directory, **options))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def our_logits(directory: Path) -> Tensor:
    return StreamedModel(open_checkpoint(directory), dtype=torch.bfloat16).logits(IDS)


def packed_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def files_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bits_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_config(directory: Path, **changes: Any) -> None:
    edit(directory / "config.json", lambda config: config["quantization_config"].update(changes))


@pytest.mark.parametrize("folder", [".", "4-model"], ids=["run", "model"])
def test_every_scheme_loads_packed_and_computes_what_we_compute(every_scheme: Path, folder: str) -> None:
    model, info = cast(Any, load(every_scheme / folder, output_loading_info=True))
    assert not any(info.values()), info
    layers = packed_layers(model)
    assert {layer.scheme.base for layer in layers.values()} >= set(FAMILIES)
    assert len(layers) == len(PROJECTIONS) * model.config.num_hidden_layers
    # The same operations in the same order, so to the last bit.
    assert torch.equal(logits(model).float(), our_logits(every_scheme / "4-model"))


def test_memory_holds_what_the_files_hold(every_scheme: Path) -> None:
    model = load(every_scheme / "4-model")
    logits(model)
    assert_bits_equal(dict(nn.Module.state_dict(model)), files_of(every_scheme / "4-model"))
    dense = {name for name, _ in model.named_parameters() if ".layers." in name}
    assert {name.rpartition(".")[2] for name in dense} == {"weight", "bias"}
    assert all("norm" in name for name in dense if name.endswith("weight"))
    for name, module in packed_layers(model).items():
        guard = module.get_buffer("weight")
        assert guard.dtype == torch.bfloat16, f"{name}: model code asks layers for this"
        assert guard.numel() == 0


def test_saving_writes_an_equal_model(every_scheme: Path, tmp_path: Path) -> None:
    model = load(every_scheme / "4-model")
    model.save_pretrained(tmp_path / "saved")
    assert_bits_equal(files_of(tmp_path / "saved"), files_of(every_scheme / "4-model"))
    found, expected = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "saved", every_scheme / "4-model")
    )
    assert found["quantization_config"] == expected["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    assert torch.equal(our_logits(tmp_path / "saved"), our_logits(every_scheme / "4-model"))


def test_dequantized_it_is_an_ordinary_model(weight_only: Path, tmp_path: Path) -> None:
    packed, dense = load(weight_only), cast(Any, load(weight_only)).dequantize()
    assert not packed_layers(dense)
    checkpoint = open_checkpoint(weight_only / "4-model")
    for name, tensor in checkpoint.read(checkpoint.names).items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    # Inputs are not quantized here, so the packed layers' products are the dense ones.
    assert torch.equal(logits(dense), logits(packed))
    prompt = IDS[:1, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cast(Any, packed).generate(prompt, **options), dense.generate(prompt, **options))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert torch.equal(logits(load(tmp_path / "dense")), logits(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_dtype_leaves_stored_numbers_alone(weight_only: Path, dtype: torch.dtype) -> None:
    model = load(weight_only, dtype=dtype)
    stored = files_of(weight_only / "4-model")
    for name, layer in packed_layers(model).items():
        held = layer.stored()
        assert held.pop(own.GUARD).dtype == dtype
        assert_bits_equal(held, {part: stored[f"{name}.{part}"] for part in held})
    computed = logits(model)
    assert computed.dtype == dtype
    assert torch.equal(computed, logits(cast(Any, model).dequantize()))


def test_tied_embeddings(build: Build) -> None:
    run = build("W8A8", tie_word_embeddings=True)
    model = cast(Any, load(run))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model).float(), our_logits(run / "4-model"))


def test_a_class_that_names_its_layers_otherwise(weight_only: Path) -> None:
    base = cast(Any, AutoModel.from_pretrained(weight_only))
    assert len(packed_layers(base)) == 14
    with torch.no_grad():
        found = base(input_ids=IDS).last_hidden_state
        expected = cast(Any, load(weight_only)).model(input_ids=IDS).last_hidden_state
    assert torch.equal(found, expected)


@pytest.mark.parametrize("offload_buffers", [False, True], ids=["kept", "offloaded"])
def test_layers_may_be_spread_over_devices(every_scheme: Path, tmp_path: Path, offload_buffers: bool) -> None:
    pytest.importorskip("accelerate")
    if offload_buffers and transformers.__version__.startswith("5.10."):
        pytest.skip("5.10 reads offloaded codes as floats; that this is found is tested below")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    blocks = len(packed_layers(load(every_scheme))) // len(PROJECTIONS)
    places = dict.fromkeys((*names, *(f"model.layers.{index}" for index in range(blocks))), "cpu")
    spread = places | {f"model.layers.{index}": "disk" for index in range(0, blocks, 2)}
    whole = load(every_scheme / "4-model", device_map=places)
    model = load(every_scheme / "4-model", device_map=spread, offload_folder=tmp_path, offload_buffers=offload_buffers)
    on_disk = [name for name, layer in packed_layers(model).items() if layer.stored()["weight_codes"].is_meta]
    assert bool(on_disk) == offload_buffers
    assert torch.equal(logits(model), logits(whole))
    if on_disk:
        with pytest.raises(CheckpointError, match=rf"^{on_disk[0]}: offloaded; a model is dequantized only as a whole"):
            cast(Any, model).dequantize()


def test_offloaded_tensors_that_read_as_floats_are_found(every_scheme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers 5.10 does: codes lose their low bits, and nothing says so."""
    layer = next(iter(packed_layers(load(every_scheme / "4-model")).values()))
    shape = layer.stored()["weight_shape"]
    layer.to("meta")
    hook = SimpleNamespace(weights_map={"weight_shape": shape.bfloat16()})
    monkeypatch.setattr(layer, "_hf_hook", hook, raising=False)
    model = nn.ModuleDict({"layer": layer})
    cast(Any, model)._tp_size, cast(Any, model).config = None, LlamaConfig()
    quantizer = BitwrightQuantizer(cast(Any, BitwrightConfig)(schemes={}, version=1))
    with pytest.raises(CheckpointError, match=r"^layer\.weight_shape: reads as \[48.0, 48.0\] in torch.bfloat16\."):
        quantizer.postprocess_model(cast(Any, model))
    hook.weights_map["weight_shape"] = shape
    quantizer.postprocess_model(cast(Any, model))


def test_a_tensor_that_was_not_read_is_found(weight_only: Path) -> None:
    """transformers fills it with what lies in memory, and says so in a table only."""
    model = cast(Any, load(weight_only))
    layer = model.model.layers[0].mlp.gate_proj
    layer.weight_nested_absmax = torch.empty_like(layer.weight_nested_absmax)
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight_nested_absmax: transformers did not read it"):
        model.hf_quantizer.postprocess_model(model)


def test_a_model_split_by_rows_is_refused(weight_only: Path) -> None:
    model = cast(Any, load(weight_only))
    model._tp_size = 2
    with pytest.raises(CheckpointError, match="cannot be split over devices by rows or columns"):
        model.hf_quantizer.postprocess_model(model)


def drop(part: str) -> Callable[[Path], None]:
    """Take a tensor out of the files, as a damaged download does."""

    def spoil(directory: Path) -> None:
        name = f"model.layers.1.mlp.down_proj.{part}"
        for file in directory.glob("*.safetensors"):
            tensors = load_file(file)
            if tensors.pop(name, None) is not None:
                save_file(tensors, file, metadata={"format": "pt"})
        edit(directory / WEIGHT_INDEX, lambda index: index["weight_map"].pop(name))

    return spoil


def reshape(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("up_proj.weight_codes"):
                tensors[name] = tensors[name][:, 1:].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})


def other_model(directory: Path) -> None:
    edit(directory / "config.json", lambda config: config.update(intermediate_size=96))


def other_scheme(directory: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        schemes = config["quantization_config"]["schemes"]
        schemes["nf4-g32-dq"] = schemes.pop("nf4-g64-dq")

    edit(directory / "config.json", change)


def other_class(directory: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])

    edit(directory / "config.json", change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("weight_codebook"), r"model\.layers\.1\.mlp\.down_proj\.weight_codebook is missing; the file is incom"),
        (drop("weight_outlier_value"), r"^model\.layers\.1\.mlp\.down_proj\.weight_outlier_value: is missing; the mo"),
        (drop("weight"), r"model\.layers\.1\.mlp\.down_proj\.weight is missing; the file is incomplete"),
        (reshape, r"up_proj\.weight_codes: torch\.int32 \[88, 5\], but a weight \[88, 48\] in nf4-g64-dq has torch\.i"),
        (other_model, r"_proj\.weight_codes: torch\.int32 \[.*\], but a weight \[.*96.*\]"),
        (other_scheme, r"q_proj\.weight_scale: torch\.uint8 \[48, 1\], but .* in nf4-g32-dq has .*\[48, 2\]"),
        (other_class, r"model\.layers\.\d\.\w+\.\w+\.weight: GPTNeoXForCausalLM has no such layer\."),
        (lambda directory: edit_config(directory, version=2), r"written in version 2 of bitwright's layout; this rele"),
        (lambda directory: edit_config(directory, kernels="fast"), r"unknown entry kernels\. Update bitwright"),
        (lambda directory: edit_config(directory, schemes={"W9A16": []}), "quantization_config cannot be read"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(spoil: Callable[[Path], None], message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


class Doubling(nn.Linear):
    """Computes something else than a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_layer_that_is_not_linear_is_refused(weight_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "nn", SimpleNamespace(**{**vars(nn), "Linear": Doubling}))
    with pytest.raises(CheckpointError, match="is a Doubling, not a Linear, and cannot hold packed weights"):
        load(weight_only)


def test_a_dense_model_is_not_quantized_on_the_way(weight_only: Path) -> None:
    with pytest.raises(ValueError, match="bitwright does require the model to be pre-quantized"):
        load(weight_only.parent / "model", quantization_config=cast(Any, BitwrightConfig)(schemes={}, version=1))


def test_tensors_without_files_are_refused(weight_only: Path) -> None:
    config = AutoConfig.from_pretrained(weight_only)
    with pytest.raises(CheckpointError, match="loads from files only"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=files_of(weight_only / "4-model"))


def test_it_is_for_inference(weight_only: Path) -> None:
    quantizer = cast(Any, load(weight_only)).hf_quantizer
    assert quantizer.is_serializable() is True
    assert quantizer.is_trainable is False


def test_schemes_in_the_configuration_are_those_that_were_used(every_scheme: Path) -> None:
    config = json.loads((every_scheme / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    layers = packed_layers(load(every_scheme))
    assert {name: layer.scheme for name, layer in layers.items()} == {
        module: Scheme.parse(name) for name, modules in config["schemes"].items() for module in modules
    }
