"""Verification must be able to fail: every way an export can differ from its run, or from what an engine reads.

Two chains are checked. From run to export: the finished model still has the hash that the run recorded, and the copy is
byte for byte the model. From export to engine: transformers reads the same weights as we do, and computes the same.
"""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright import pipeline
from bitwright.errors import MissingDependency, ResourceError, VerificationError
from bitwright.exporters import transformers_directory
from bitwright.exporters.registered import EXPORTERS
from bitwright.exporters.transformers_directory import verify_with_transformers
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.layouts import compressed_tensors
from bitwright.model.stream import StreamedModel
from bitwright.recipe import Recipe

pytest.importorskip("compressed_tensors")
COPYING = [name for name in EXPORTERS if EXPORTERS[name].layout == name]
"""Exporters that copy a run's model as it is."""


@pytest.fixture(scope="module")
def runs(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of the tiny Llama in each layout that is copied; read only."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    finished: dict[str, Path] = {}
    for name in COPYING:
        recipe = Recipe.from_mapping(
            {
                "scheme": "W4A16-g32",
                "method": "rtn",
                "layout": EXPORTERS[name].layout,
                "calibration": {"text": str(folder / "text.txt"), "num_samples": 2, "seqlen": 64},
                "max_kl": 50.0,
            }
        )
        finished[name] = pipeline.quantize(tiny_llama_dir, recipe, folder / name).run
    return finished


@pytest.fixture(scope="module")
def finished(runs: dict[str, Path]) -> Path:
    """The run in compressed-tensors' layout; read only."""
    return runs["compressed-tensors"]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def exported(finished: Path, tmp_path: Path) -> Path:
    EXPORTERS["compressed-tensors"].write(finished / "4-model", tmp_path / "exported")
    return tmp_path / "exported"


def flip_bit(directory: Path, suffix: str) -> str:
    """Flip the lowest bit of one element of the first stored tensor whose name ends in `suffix`; return the name."""
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            if name.endswith(suffix):
                bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensors[name].element_size()]
                tensors[name].view(bits).view(-1)[3 if tensors[name].numel() > 3 else 0] ^= 1
                save_file(tensors, file, metadata={"format": "pt"})
                return name
    raise AssertionError(f"nothing ends in {suffix}")


@pytest.mark.parametrize("name", COPYING)
def test_a_sound_run_is_exported_and_verified(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    comparison = pipeline.export(runs[name], name, tmp_path / "exported")
    assert comparison["weights_compared"] == len(open_checkpoint(runs[name] / "4-model").names)
    assert comparison["max_logit_difference"] <= comparison["logit_bound"]
    found, expected = (open_checkpoint(path) for path in (tmp_path / "exported", runs[name] / "4-model"))
    assert found.audit() == expected.audit()


PARTS = ("_packed", "_scale", "layernorm.weight", "embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("part", PARTS)
def test_one_bit_flipped_in_the_finished_run_is_found(part: str, run: Path, tmp_path: Path) -> None:
    flip_bit(run / "4-model", part)
    with pytest.raises(VerificationError, match=r"4-model: its tensors or configuration are not those"):
        pipeline.export(run, "compressed-tensors", tmp_path / "exported")
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}, "nothing is left behind"


def test_a_changed_configuration_is_found(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "4-model" / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (run / "4-model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(VerificationError, match="its tensors or configuration are not those"):
        pipeline.export(run, "compressed-tensors", tmp_path / "exported")


@pytest.mark.parametrize("part", PARTS)
def test_one_bit_flipped_on_the_way_is_found(
    part: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree = shutil.copytree

    def spoilt(source: Path, target: Path) -> None:
        copytree(source, target)
        flip_bit(target, part)
        for file in target.iterdir():
            shutil.copystat(source / file.name, file)  # a bad disk does not change dates

    monkeypatch.setattr(transformers_directory.shutil, "copytree", spoilt)
    with pytest.raises(VerificationError, match=r"\.safetensors: differs from .*which it was copied from"):
        pipeline.export(finished, "compressed-tensors", tmp_path / "exported", verify=False)
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


def swap_nibbles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our reader unpacks the codes of a word in another order."""
    unpack = compressed_tensors.unpack
    monkeypatch.setattr(compressed_tensors, "unpack", lambda words, bits, n: unpack(words, bits, n).flip(-1))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (swap_nibbles, r"model\.layers\.0\.self_attn\.q_proj\.weight"),
        (change_first("model.layers.1.mlp.down_proj.weight"), r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (change_first("model.layers.0.input_layernorm.weight"), r"model\.layers\.0\.input_layernorm\.weight"),
        (change_first("model.embed_tokens.weight"), r"model\.embed_tokens\.weight"),
        (change_first("model.norm.weight"), r"model\.norm\.weight"),
        (change_first("lm_head.weight"), r"lm_head\.weight"),
    ],
    ids=["packing", "linear", "block-norm", "embedding", "norm", "head"],
)
def test_weights_that_the_engine_reads_otherwise_are_found(
    spoil: Callable[[pytest.MonkeyPatch], None], named: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(VerificationError, match=f"^{named}: transformers reads other values than were written"):
        verify_with_transformers(exported, False)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_logits_that_the_engine_computes_otherwise_are_found(
    value: float, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal weights are not enough: an architecture may be streamed wrongly. NaN equals nothing."""
    leave = StreamedModel.leave

    def spoilt(self: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
        logits = leave(self, ids, hidden)
        logits[0, 5, 7] += value
        return logits

    monkeypatch.setattr(StreamedModel, "leave", spoilt)
    with pytest.raises(VerificationError, match="transformers' logits differ from ours by"):
        verify_with_transformers(exported, False)


def test_without_compressed_tensors_the_message_says_how(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"pip install 'bitwright\[compressed-tensors\]', or give --no-verify"):
        verify_with_transformers(exported, False)


def test_a_model_larger_than_memory_is_not_loaded(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ResourceError, match=r"verification loads the whole model: .* GB needed"):
        verify_with_transformers(exported, False)


def test_verification_leaves_the_log_level_alone(exported: Path) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        verify_with_transformers(exported, False)
        assert logger.level == logging.CRITICAL
    finally:
        logger.setLevel(before)
