"""LLM.int8: which columns stay floats, and that every way of running the model treats them alike."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitwright import pipeline
from bitwright.errors import RecipeError
from bitwright.methods.llm_int8 import llm_int8
from bitwright.methods.stage import BlockStage
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.recipe import Recipe
from bitwright.testbed import plant_outliers

OpenStage = Callable[..., AbstractContextManager[BlockStage]]
SCHEMES = ["W8A8", "W8A8-static"]
CHANNELS = 3


def recipe(scheme: str = "W8A8", *, threshold: float = 6.0, **options: Any) -> Recipe:
    mapping = {"scheme": scheme, "method": "rtn", "transforms": ["llm_int8"], "llm_int8": {"threshold": threshold}}
    return Recipe.from_mapping(mapping | options)


def calibration(folder: Path, text: str) -> dict[str, Any]:
    (folder / "text.txt").write_text(text)
    return {"text": str(folder / "text.txt"), "num_samples": 8, "seqlen": 128}


def test_columns_above_the_threshold(open_stage: OpenStage) -> None:
    with open_stage("llama", recipe(), outliers=32.0) as stage:
        llm_int8(stage)
    outliers = [3, 15, 27]  # where the fixture puts them in every norm
    for name in ("q_proj", "k_proj", "v_proj"):
        assert stage.float_columns[f"{stage.name}.self_attn.{name}"].tolist() == outliers
    first = next(note for note in stage.notes if note["sites"][0].endswith("q_proj"))
    assert first["float_columns"] == outliers
    assert first["peak"] > 6.0
    assert all(0 <= note["invariance"] < 1e-5 for note in stage.notes)
    assert first["invariance"] > 0, "products were computed in two parts"


def test_no_column_is_above_a_high_threshold(open_stage: OpenStage) -> None:
    with open_stage("llama", recipe(threshold=1e6), outliers=32.0) as stage:
        llm_int8(stage)
    assert stage.float_columns == {}
    assert all(note["float_columns"] == [] for note in stage.notes)


def test_floats_as_inputs_are_refused(tiny_llama_dir: Path, tmp_path: Path, tiny_text: str) -> None:
    with pytest.raises(RecipeError, match=r"llm_int8 with W4A16-g32: its inputs stay in 16 bit"):
        pipeline.quantize(
            tiny_llama_dir, recipe("W4A16-g32", calibration=calibration(tmp_path, tiny_text)), tmp_path / "run"
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outliers_cost_almost_nothing_and_every_engine_agrees(
    scheme: str, tiny_llama_dir: Path, tmp_path: Path, tiny_text: str
) -> None:
    plant_outliers(tiny_llama_dir, tmp_path / "planted", channels=CHANNELS, factor=64.0)
    text = calibration(tmp_path, tiny_text)
    plain = recipe(scheme, transforms=[], calibration=text, max_kl=50.0)
    kept = recipe(scheme, threshold=20.0, calibration=text, max_kl=50.0)
    naive = pipeline.quantize(tmp_path / "planted", plain, tmp_path / "plain").results["kl_mean"]
    found = pipeline.quantize(tmp_path / "planted", kept, tmp_path / "kept").results["kl_mean"]
    assert found <= 0.05 * naive

    folder = tmp_path / "kept" / "4-model"
    checkpoint = open_checkpoint(folder)
    site = checkpoint.read_packed("model.layers.0.self_attn.q_proj.weight")
    assert site.columns is not None
    assert site.columns.index.numel() == CHANNELS
    assert site.columns.weight.dtype == torch.float32  # the model's

    ids = torch.randint(2, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel(checkpoint).logits(ids)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    # The same products; attention may be called in another way, a rounding of which can move a code.
    assert float((loaded - streamed).square().mean().sqrt()) <= 1e-4 * float(streamed.square().mean().sqrt())
