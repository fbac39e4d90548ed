"""Exports in bitwright's own layout: the right runs only, and verification that can fail."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright import pipeline
from bitwright.errors import RunError, VerificationError
from bitwright.exporters.own_directory import verify_with_plugin
from bitwright.exporters.registered import EXPORTERS
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.nn.linear import QuantizedLinear
from bitwright.recipe import Recipe


@pytest.fixture(scope="module")
def runs(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run in each layout; read only."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    finished: dict[str, Path] = {}
    for layout in ("bitwright", "compressed-tensors"):
        recipe = Recipe.from_mapping(
            {
                "scheme": "W8A8",
                "method": "rtn",
                "layout": layout,
                "rules": [{"pattern": "*.up_proj", "scheme": "W4A16-g32"}],
                "calibration": {"text": str(folder / "text.txt"), "num_samples": 1, "seqlen": 64},
                "max_kl": 50.0,
            }
        )
        finished[layout] = pipeline.quantize(tiny_llama_dir, recipe, folder / layout).run
    return finished


@pytest.fixture
def exported(runs: dict[str, Path], tmp_path: Path) -> Path:
    EXPORTERS["bitwright"].write(runs["bitwright"] / "4-model", tmp_path / "exported")
    return tmp_path / "exported"


def test_a_sound_run_is_exported_and_verified(runs: dict[str, Path], tmp_path: Path) -> None:
    comparison = pipeline.export(runs["bitwright"], "bitwright", tmp_path / "exported")
    assert comparison["weights_compared"] == len(open_checkpoint(tmp_path / "exported").names)
    assert comparison["max_logit_difference"] <= comparison["logit_bound"]
    found, expected = (open_checkpoint(path) for path in (tmp_path / "exported", runs["bitwright"] / "4-model"))
    assert found.audit() == expected.audit()


@pytest.mark.parametrize(("layout", "to"), [("bitwright", "compressed-tensors"), ("compressed-tensors", "bitwright")])
def test_a_run_in_another_layout_is_refused_before_any_work(
    layout: str, to: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr(Checkpoint, "read_stored", read)
    message = (
        f"4-model: stored in layout {layout}, not {to}. Export it to {layout}, or quantize again with layout: {to}."
    )
    with pytest.raises(RunError) as caught:
        pipeline.export(runs[layout], to, tmp_path / "exported")
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def change_first(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Our reader returns another first element of the dense tensor `name`."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        read = Checkpoint.read

        def spoilt(self: Checkpoint, names: Any) -> dict[str, Tensor]:
            tensors = read(self, names)
            if name in tensors:
                first = tensors[name].view(-1)[:1]
                first.copy_(torch.nextafter(first, torch.tensor([9.0])))
            return tensors

        monkeypatch.setattr(Checkpoint, "read", spoilt)

    return spoil


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_weights_that_transformers_reads_otherwise_are_found(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_first(name)(monkeypatch)
    with pytest.raises(VerificationError, match=f"^{name}: transformers reads other values than were written"):
        verify_with_plugin(exported, False)


def test_layers_that_compute_otherwise_are_found(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = QuantizedLinear.forward

    def spoilt(self: QuantizedLinear, x: Tensor) -> Tensor:
        return 1.1 * forward(self, x)

    monkeypatch.setattr(QuantizedLinear, "forward", spoilt)
    with pytest.raises(VerificationError, match="transformers' logits differ from ours by"):
        verify_with_plugin(exported, False)


def test_logits_that_are_nan_are_found(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = StreamedModel.leave

    def spoilt(self: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
        return leave(self, ids, hidden) * float("nan")

    monkeypatch.setattr(StreamedModel, "leave", spoilt)
    with pytest.raises(VerificationError, match="transformers' logits differ from ours by nan"):
        verify_with_plugin(exported, False)


def test_an_export_that_does_not_load_is_found(exported: Path) -> None:
    for file in sorted(exported.glob("*.safetensors")):
        tensors = load_file(file)
        extra = {f"{name}_extra": torch.ones(1) for name in tensors if name.endswith("q_proj.weight_scale")}
        save_file(tensors | extra, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"transformers cannot load it \(.*weight_scale_extra: is not part of"):
        verify_with_plugin(exported, False)


def test_the_copy_is_checked(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree = shutil.copytree

    def spoilt(source: Path, target: Path) -> None:
        copytree(source, target)
        (target / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr("bitwright.exporters.transformers_directory.shutil.copytree", spoilt)
    with pytest.raises(VerificationError, match=r"config\.json: differs from .*which it was copied from"):
        pipeline.export(runs["bitwright"], "bitwright", tmp_path / "exported", verify=False)
