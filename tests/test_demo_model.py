"""The embedded model: trained, quantized at every width, read by transformers, better by GPTQ than by rounding."""

import math
from pathlib import Path

import pytest

from bitwright.demo import CALIBRATION, EVALUATION_TEXT, demo_model
from bitwright.pipeline import evaluate, export, quantize
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme

FEW = Calibration(text="stdlib", num_samples=16, seqlen=128)
WIDE_GATE = 20.0
SCHEMES = [f"W{bits}A16-g128{suffix}" for bits in (8, 3, 2) for suffix in ("", "-asym")]


def test_the_model_is_trained() -> None:
    score, _ = evaluate(demo_model(), EVALUATION_TEXT, seqlen=256, max_windows=8)
    card = (demo_model() / "README.md").read_text()
    unigram = float(card.split("a unigram model of the training text has ")[1].split(",")[0])
    assert score.perplexity < unigram / 10


def test_shapes_suit_production_formats() -> None:
    from bitwright.model.checkpoint import open_checkpoint

    config = open_checkpoint(demo_model()).config
    assert config["hidden_size"] % 128 == 0
    assert config["intermediate_size"] % 128 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert sum(file.stat().st_size for file in demo_model().iterdir()) <= 8_000_000


def test_gptq_loses_less_than_rounding_at_the_same_size(tmp_path: Path) -> None:
    losses, sizes = {}, {}
    for method in ("rtn", "gptq"):
        recipe = Recipe(scheme=Scheme.parse("W4A16-g128"), method=method, calibration=FEW)
        result = quantize(demo_model(), recipe, tmp_path / method)
        score, _ = evaluate(tmp_path / method, EVALUATION_TEXT, reference=demo_model(), seqlen=256, max_windows=8)
        losses[method], sizes[method] = score.kl_mean, result.results["size_bytes"]
    assert sizes["gptq"] == sizes["rtn"]
    assert losses["gptq"] < losses["rtn"]


def test_the_default_gate_catches_a_collapse(tmp_path: Path) -> None:
    result = quantize(demo_model(), Recipe(scheme=Scheme.parse("W2A16-tensor"), method="rtn"), tmp_path / "run")
    assert result.failure is not None
    assert result.results["perplexity"] > 2 * result.results["reference_perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_width_loads_in_transformers_with_equal_logits(scheme: str, tmp_path: Path) -> None:
    recipe = Recipe(scheme=Scheme.parse(scheme), calibration=CALIBRATION, max_kl=WIDE_GATE)
    result = quantize(demo_model(), recipe, tmp_path / "run")
    assert math.isfinite(result.results["kl_mean"])
    compared = export(tmp_path / "run", "compressed-tensors", tmp_path / "export")
    assert compared["max_logit_difference"] <= compared["logit_bound"]
