"""Inputs rotated at inference leave the function alone, spread outliers, and are part of what is stored."""

import json
from pathlib import Path

import pytest
import torch

from bitwright.errors import RecipeError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import InputQuantizer, InputTransform
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.metrics import relative_error
from bitwright.pipeline import evaluate, export, quantize
from bitwright.recipe import Recipe


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text)
    return file


def recipe_of(text: Path, scheme: str = "W4A4-channel", *, block: int | None = None) -> Recipe:
    return Recipe.from_mapping(
        {
            "scheme": scheme, "method": "rtn", "transforms": ["hadamard"], "max_kl": 50.0, "range_method": "minmax",
            "rotation": {} if block is None else {"block": block},
            "calibration": {"text": str(text), "num_samples": 2, "seqlen": 32},
        }
    )  # fmt: skip


def notes_of(run: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run / "5-records.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "transform"]


@pytest.mark.parametrize("block", [None, 8])
def test_every_site_gets_a_rotation_that_is_stored_and_moves_nothing(
    block: int | None, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    run = quantize(tiny_llama_dir, recipe_of(text, block=block), tmp_path / "run").run
    checkpoint = open_checkpoint(run / "4-model")
    for name in checkpoint.packed_names():
        site = checkpoint.read_packed(name)
        assert site.transform is not None
        assert site.transform.hadamard == (site.weight.codes.shape[1] if block is None else block)
    notes = notes_of(run)
    assert len(notes) == 2 * 4  # blocks times groups: q k v, o, gate up, down
    assert all(0 < float(str(note["invariance"])) < 1e-5 for note in notes)


def test_8_bit_weights_for_rotated_inputs_are_the_weights_of_the_model(
    tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    run = quantize(tiny_llama_dir, recipe_of(text, "W8A16-channel"), tmp_path / "run").run
    original, result = open_checkpoint(tiny_llama_dir), open_checkpoint(run / "4-model")
    for name in result.packed_names():
        weight = original.read([name])[name]
        step = result.read_packed(name).weight.grid.scale.max()  # type: ignore[union-attr]
        error = result.read([name])[name] - weight
        assert float(error.square().mean().sqrt()) <= 0.5 * float(step)


def test_an_outlier_among_inputs_costs_less_when_it_is_spread() -> None:
    x, weight = torch.randn(64, 96), torch.randn(32, 96)
    x[:, 5] *= 64.0
    weight[:, 5] /= 64.0
    change = InputTransform(hadamard=96)
    granularity = Granularity(kind="token")
    quantizer = InputQuantizer(format=IntegerFormat(bits=4, symmetric=True), granularity=granularity)
    plain = quantizer.quantize(x).dequantize() @ weight.T
    spread = quantizer.quantize(change.apply(x)).dequantize() @ change.to_weight(weight).T
    assert relative_error(x @ weight.T, spread) < relative_error(x @ weight.T, plain)


def test_the_run_is_evaluated_and_exported_with_equal_logits(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    run = quantize(tiny_llama_dir, recipe_of(text), tmp_path / "run").run
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text.read_text().split())))
    score, _ = evaluate(run, str(other), reference=tiny_llama_dir, max_windows=2)
    assert score.kl_mean is not None
    done = export(run, "bitwright", tmp_path / "exported")
    assert done["max_logit_difference"] <= done["logit_bound"]


def test_blocks_that_do_not_divide_a_row_are_refused(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"q_proj: a Hadamard rotation in blocks of 24 does not fit rows of 64"):
        quantize(tiny_llama_dir, recipe_of(text, block=24), tmp_path / "run")
