"""GPTQ for quantized inputs: what is solved is what inference computes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.demo import demo_model
from bitwright.methods.solvers import SOLVERS, Problem
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import InputQuantizer
from bitwright.numerics.ranges import fit_grid
from bitwright.pipeline import quantize
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS = 8, 24, 200
INT4 = InputQuantizer(format=FORMATS["int4"], granularity=Granularity(kind="token"))  # type: ignore[arg-type]


def inputs() -> Tensor:
    """Correlated, with one large channel, as a model's are."""
    x = torch.randn(NUM_TOKENS, 5) @ torch.randn(5, NUM_COLUMNS) + 0.3 * torch.randn(NUM_TOKENS, NUM_COLUMNS)
    x[:, 3] *= 8
    return x


def solved(x: Tensor, quantizer: InputQuantizer | None, weight: Tensor) -> Tensor:
    stats = SiteStats(quantizer=quantizer)
    stats.add(x, with_gram=True)
    grid = fit_grid(weight, FORMATS["int4"], Granularity(kind="channel"))  # type: ignore[arg-type]
    solve = SOLVERS["gptq"].solve
    assert solve is not None
    return solve(
        weight, grid, Problem(stats=stats, recipe=Recipe(), refit=lambda *_: grid, fit=lambda _: grid)
    ).dequantize()


def test_the_error_of_what_inference_computes_is_smaller() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        x, weight = inputs(), torch.randn(NUM_ROWS, NUM_COLUMNS)
        rounded = INT4.quantize(x).dequantize()
        losses = [
            float((rounded @ solved(x, quantizer, weight).T - x @ weight.T).square().sum())
            for quantizer in (INT4, None)
        ]
        assert losses[0] < losses[1]


def test_inputs_that_rounding_does_not_change_give_the_same_codes() -> None:
    x, weight = torch.randint(-7, 8, (NUM_TOKENS, NUM_COLUMNS)).float(), torch.randn(NUM_ROWS, NUM_COLUMNS)
    x[:, 0] = -8.0  # every token has the scale 1
    assert torch.equal(solved(x, INT4, weight), solved(x, None, weight))


@pytest.mark.parametrize("scheme", ["W4A4", "W4A8-static", "W8A8", "nvfp4"])
def test_runs_with_dynamic_and_calibrated_inputs_resume_to_the_same(scheme: str, tmp_path: Path) -> None:
    recipe = Recipe(
        scheme=Scheme.parse(scheme), method="gptq", calibration=Calibration(text="stdlib", num_samples=4, seqlen=64),
        max_kl=100.0,
    )  # fmt: skip
    results = [quantize(demo_model(), recipe, tmp_path / name).results for name in ("a", "b")]
    assert results[0]["result_hash"] == results[1]["result_hash"]


def test_four_bit_inputs_lose_less_when_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same run whose statistics are of inputs that stay floats."""
    calibration = Calibration(text="stdlib", num_samples=8, seqlen=128)
    recipe = Recipe(scheme=Scheme.parse("W4A4"), method="gptq", calibration=calibration, max_kl=100.0)
    losses: list[float] = []
    for name in ("known", "unknown"):
        if name == "unknown":
            monkeypatch.setattr("bitwright.methods.gatherer.Gatherer._quantizers", lambda *_: {})
        run = quantize(demo_model(), recipe, tmp_path / name)
        losses.append(float(run.results["kl_mean"]))
    assert losses[0] < losses[1]
