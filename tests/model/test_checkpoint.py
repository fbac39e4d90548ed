"""Reading model directories: the same tensors whatever the files, one hash for one content, and clear refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.model.checkpoint import WEIGHT_INDEX, Checkpoint, open_checkpoint
from bitwright.model.layouts import compressed_tensors
from bitwright.model.layouts.stored import ct_config
from bitwright.numerics.fitting import fit
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.schemes import MODEL_SCALE, Scheme

WEIGHT = "layers.0.linear.weight"


def tensors_of() -> dict[str, Tensor]:
    return {
        WEIGHT: torch.randn(6, 40),
        "layers.1.linear.weight": torch.randn(6, 40).bfloat16(),
        "norm.weight": torch.rand(40).half(),
        "scalar": torch.tensor(3.0),
        "counter": torch.tensor([1, 2], dtype=torch.int64),
    }


def write_model(folder: Path, tensors: dict[str, Tensor], num_shards: int = 1, config: Any = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "test"} if config is None else config))
    names = sorted(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::num_shards]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / WEIGHT_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return checkpoint.read(checkpoint.names)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_tensors_are_read_from_any_number_of_files(num_shards: int, tmp_path: Path) -> None:
    tensors = tensors_of()
    checkpoint = open_checkpoint(write_model(tmp_path / "model", tensors, num_shards))
    assert checkpoint.names == sorted(tensors)
    assert_same(read_all(checkpoint), tensors)
    assert {name: checkpoint.shape(name) for name in tensors} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert not checkpoint.is_packed
    assert len({info.file for info in checkpoint.stored.values()}) == num_shards


def test_one_safetensors_file_of_another_name_is_enough(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tensors_of())
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_checkpoint(folder).names == sorted(tensors_of())


def test_what_is_read_is_the_readers_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", tensors_of()))
    first = read_all(checkpoint)
    expected = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()
    assert_same(read_all(checkpoint), expected)


def packed_model(folder: Path, dtype: torch.dtype, name: str) -> tuple[Path, QTensor, dict[str, Tensor]]:
    """A directory with one quantized weight; return it, the weight, and the tensors stored beside it."""
    scheme = Scheme.parse(name)
    layout = compressed_tensors.layout_of(scheme, 64, torch.bfloat16)
    assert layout is not None
    weight = torch.randn(6, 64)
    dtype_name, scale_name = str(dtype).removeprefix("torch."), scheme.weights.scale
    scale = SCALE_FORMATS[dtype_name if scale_name == MODEL_SCALE else scale_name]
    format, granularity = scheme.weights.format, scheme.weights.granularity
    grid = fit(weight, format, granularity, method="minmax", importance=None, scale=scale)
    result = QTensor(codes=grid.quantize(weight), grid=grid)
    acts = scheme.activations
    inputs = None if acts is None else InputQuantizer(format=acts.format, granularity=acts.granularity)
    stored = compressed_tensors.encode(layout, QuantizedSite(weight=result, inputs=inputs))
    beside = {name: tensor for name, tensor in tensors_of().items() if name != WEIGHT}
    config = {
        "model_type": "test",
        "dtype": dtype_name,
        "quantization_config": ct_config([(scheme, layout, ["Linear"])], []),
    }
    module = WEIGHT.removesuffix("weight")
    write_model(folder, {**beside, **{module + part: tensor for part, tensor in stored.items()}}, 2, config)
    return folder, result, beside


PACKED = [
    (name, dtype)
    for name in ("W3A16-g16", "W3A16-g16-asym", "W8A8", "W8A8-asym", "fp8", "fp8-block4x32-a16")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
] + [(name, torch.bfloat16) for name in ("nvfp4-a16", "mxfp4", "mxfp6-a16", "mxfp8")]


@pytest.mark.parametrize(("name", "dtype"), PACKED, ids=str)
def test_a_packed_model_reads_as_the_dense_one(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, result, beside = packed_model(tmp_path / "model", dtype, name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.is_packed
    assert checkpoint.quantizes_inputs == (Scheme.parse(name).activations is not None)
    assert checkpoint.packed_names() == [WEIGHT]
    assert checkpoint.names == sorted([*beside, WEIGHT])
    assert checkpoint.shape(WEIGHT) == (6, 64)
    assert_same(read_all(checkpoint), {**beside, WEIGHT: result.dequantize(dtype)})
    site = checkpoint.read_packed(WEIGHT)
    assert torch.equal(site.weight.codes, result.codes)
    assert (site.inputs is None) == (Scheme.parse(name).activations is None)


def test_the_hash_does_not_depend_on_the_files(tmp_path: Path) -> None:
    """It identifies the model: the same tensors and configuration in other shards are the same model."""
    tensors = tensors_of()
    hashes = {open_checkpoint(write_model(tmp_path / str(n), tensors, n)).audit() for n in (1, 2, 3)}
    assert len(hashes) == 1


def change_value(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[WEIGHT][3, 7] = torch.nextafter(tensors[WEIGHT][3, 7], torch.tensor(9.0))


def change_shape(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].reshape(40, 6)


def change_dtype(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].view(torch.bfloat16)


def change_name(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["layers.2.linear.weight"] = tensors.pop(WEIGHT)


def change_config(_: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["rope_theta"] = 1e6


@pytest.mark.parametrize("change", [change_value, change_shape, change_dtype, change_name, change_config])
def test_the_hash_changes_with_the_content(
    change: Callable[[dict[str, Tensor], dict[str, Any]], None], tmp_path: Path
) -> None:
    tensors, config = tensors_of(), {"model_type": "test"}
    before = open_checkpoint(write_model(tmp_path / "before", tensors, config=config)).audit()
    change(tensors, config)
    assert open_checkpoint(write_model(tmp_path / "after", tensors, config=config)).audit() != before


def test_the_audit_reads_every_byte_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", tensors_of(), 2))
    steps: list[int] = []
    checkpoint.audit(steps.append)
    assert len(steps) == len(checkpoint.stored)
    assert sum(steps) == checkpoint.num_bytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [WEIGHT, "layers.1.linear.weight", "norm.weight"])
def test_values_that_are_not_finite_are_refused(name: str, value: float, tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors[name].view(-1)[[3, 5]] = value
    checkpoint = open_checkpoint(write_model(tmp_path / "model", tensors))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds 2 values that are NaN or Inf"):
        checkpoint.audit()


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytest_model.bin").write_bytes(b"never read")


def list_in_index(folder: Path) -> None:
    (folder / WEIGHT_INDEX).write_text('{"weight_map": ["model-00001-of-00002.safetensors"]}')


SPOILT: list[tuple[Callable[[Path], None], str]] = [
    (remove("config.json"), r"model: no config\.json\. Give the directory"),
    (write("config.json", "{"), r"config\.json: not readable as JSON"),
    (write("config.json", "[]"), r"config\.json: not a JSON object"),
    (remove("model-00002-of-00002.safetensors"), r"1 of 2 weight shards missing, first model-00002-of-00002"),
    (remove(WEIGHT_INDEX), r"2 safetensors files but no model\.safetensors\.index\.json"),
    (write(WEIGHT_INDEX, "{}"), r"index\.json: not a valid index"),
    (list_in_index, r"index\.json: not a valid index"),
    (truncate, r"model-00002-of-00002\.safetensors: not a valid safetensors file .*truncated or corrupt"),
    (write("model-00001-of-00002.safetensors", "garbage"), r"model-00001-of-00002\.safetensors: not a valid"),
    (pickled, r"only pickled weights \(pytest_model\.bin\).*refused"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=lambda each: each if isinstance(each, str) else "")
def test_a_damaged_directory_is_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tensors_of(), 2)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_file_damaged_after_opening_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tensors_of())
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        read_all(checkpoint)


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tensors_of())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        open_checkpoint(folder)


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {"x": torch.zeros(4, dtype=torch.uint32)})
    with pytest.raises(CheckpointError, match="x has dtype U32, which is not supported"):
        open_checkpoint(folder)


@pytest.mark.parametrize("group", [{}, {"targets": ["Linear"]}, {"targets": ["Linear"], "weights": None}])
def test_an_incomplete_quantization_config_is_refused(group: dict[str, Any], tmp_path: Path) -> None:
    folder, *_ = packed_model(tmp_path / "model", torch.float32, "W3A16-g16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": group}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config has a config group that cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "./organisation/name", "a/b/c"])
def test_a_path_that_is_not_there(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{source}: no such directory. Give a model directory or a hub id"):
        open_checkpoint(source)


def test_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable HF_HUB_OFFLINE=1 is read when the package is imported; this is what it sets."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^organisation/name: no such directory, and no such model") as caught:
        open_checkpoint("organisation/name")
    assert "\n" not in str(caught.value)


def test_a_downloaded_hub_id_is_opened_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--organisation--name"
    model = write_model(tmp_path / "model", tensors_of())
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.move(model, place / "snapshots" / ("0" * 40))
    assert_same(read_all(open_checkpoint("organisation/name")), load_file(next(place.rglob("*.safetensors"))))
