"""SmoothQuant: its scales, its search, and what it recovers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright import pipeline
from bitwright.errors import RecipeError
from bitwright.methods.smoothquant import smoothing_scale, smoothquant
from bitwright.methods.stage import BlockStage
from bitwright.recipe import Recipe
from bitwright.testbed import plant_outliers

OpenStage = Callable[..., AbstractContextManager[BlockStage]]
SCHEMES = ["W8A8", "W8A8-static"]


def recipe(scheme: str = "W8A8", **options: Any) -> Recipe:
    return Recipe.from_mapping({"scheme": scheme, "method": "rtn", "transforms": ["smoothquant"], **options})


def test_scales() -> None:
    x, w = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    assert torch.allclose(smoothing_scale(x, w, 0.5), torch.tensor([2.0, 0.5, 1.0]))
    assert torch.equal(smoothing_scale(torch.ones(4), torch.ones(4), 0.7), torch.ones(4))
    assert torch.equal(smoothing_scale(torch.zeros(4), torch.ones(4), 0.7), torch.ones(4))
    # All of the difficulty moves to the weights: channels end equally large.
    assert torch.allclose((x / smoothing_scale(x, w, 1.0))[:2], torch.tensor([4.0, 4.0]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_is_never_above_that_of_the_identity(scheme: str, open_stage: OpenStage) -> None:
    for architecture in ("llama", "opt"):
        with open_stage(architecture, recipe(scheme), outliers=16.0) as stage:
            smoothquant(stage)
        assert all(note["loss"] <= note["identity_loss"] for note in stage.notes)
        assert min(note["loss"] / note["identity_loss"] for note in stage.notes) < 0.5


def test_no_better_scale_leaves_every_bit(open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.methods.smoothquant.smoothing_scale", lambda x, _w, _alpha: torch.ones_like(x))
    with open_stage("llama", recipe()) as stage:
        before = {name: value.detach().clone() for name, value in stage.block.named_parameters()}
        smoothquant(stage)
        assert all(torch.equal(before[name], value) for name, value in stage.block.named_parameters())
    assert stage.edited == set()
    assert {note["alpha"] for note in stage.notes} == {None}


def test_a_given_alpha_is_used_where_norms_produce_the_inputs(open_stage: OpenStage) -> None:
    with open_stage("llama", recipe(smoothquant={"alpha": 0.85}), outliers=16.0) as stage:
        smoothquant(stage)
    assert {note["alpha"] for note in stage.notes} == {0.85}
    assert {note["edge"].rpartition(".")[2] for note in stage.notes} == {"input_layernorm", "post_attention_layernorm"}


def test_floats_as_inputs_are_refused(tiny_llama_dir: Path, tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    with pytest.raises(RecipeError, match=r"smoothquant with W4A16-g32: its inputs stay in 16 bit.*Use awq"):
        pipeline.quantize(
            tiny_llama_dir, recipe("W4A16-g32", calibration={"text": str(tmp_path / "text.txt")}), tmp_path / "run"
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_planted_outliers_cost_almost_nothing(
    scheme: str, tiny_llama_dir: Path, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    plant_outliers(tiny_llama_dir, tmp_path / "planted", factor=64.0)
    calibration = {"text": str(tmp_path / "text.txt"), "num_samples": 8, "seqlen": 128}
    lost: dict[str, float] = {}
    for model, method in (("original", ()), ("planted", ()), ("planted", ("smoothquant",))):
        name = "-".join((model, *method))
        wished = Recipe.from_mapping(
            {"scheme": scheme, "method": "rtn", "transforms": list(method), "calibration": calibration, "max_kl": 50.0}
        )
        source = tiny_llama_dir if model == "original" else tmp_path / "planted"
        lost[name] = pipeline.quantize(source, wished, tmp_path / f"run-{name}").results["kl_mean"]
    assert lost["planted"] > 10 * lost["original"], "control: the outliers hurt"
    assert lost["planted-smoothquant"] <= 0.05 * lost["planted"]
