"""The repair "bias": it takes the mean error away, and every way of running the model adds the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitwright import pipeline
from bitwright.calibration.collect import SiteStats
from bitwright.methods.repairs import REPAIRS, RepairTask
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.recipe import Recipe


def test_the_mean_error_is_gone_and_the_squared_one_smaller() -> None:
    weight, x = torch.randn(9, 32), torch.randn(200, 32) + 1.0
    grid = fit_grid(weight, FORMATS["int3"], Granularity(kind="channel"))
    site = QuantizedSite(weight=QTensor(codes=grid.quantize(weight), grid=grid))
    stats = SiteStats()
    stats.add(x, with_gram=False)
    task = RepairTask(weight=weight, stats=stats, recipe=Recipe(), dtype=torch.float32)
    repaired = REPAIRS["bias"].apply(site, task)
    assert repaired.correction is not None
    error = x @ (site.dense() - weight).T
    left = error + repaired.correction
    # float32 sums of 200 tokens and 32 columns
    assert float(left.mean(0).abs().max()) <= 200 * torch.finfo(torch.float32).eps * float(error.abs().max())
    assert float(left.square().sum()) < float(error.square().sum())


def test_without_tokens_nothing_is_corrected() -> None:
    grid = fit_grid(torch.randn(3, 8), FORMATS["int4"], Granularity(kind="channel"))
    site = QuantizedSite(weight=QTensor(codes=grid.quantize(torch.randn(3, 8)), grid=grid))
    task = RepairTask(weight=torch.randn(3, 8), stats=SiteStats(), recipe=Recipe(), dtype=torch.float32)
    assert REPAIRS["bias"].apply(site, task) is site


@pytest.mark.parametrize("scheme", ["W3A16-g32", "W4A8-g32"])
def test_every_engine_adds_it(scheme: str, tiny_llama_dir: Path, tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    calibration = {"text": str(tmp_path / "text.txt"), "num_samples": 8, "seqlen": 128}
    recipe = Recipe.from_mapping(
        {"scheme": scheme, "method": "rtn", "repairs": ["bias"], "calibration": calibration, "max_kl": 50.0}
    )
    pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "run")
    checkpoint = open_checkpoint(tmp_path / "run" / "4-model")
    correction = checkpoint.read_packed("model.layers.1.mlp.down_proj.weight").correction
    assert correction is not None
    assert bool(correction.any())
    ids = torch.randint(2, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel(checkpoint).logits(ids)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "4-model", dtype=torch.float32).eval()
        found = loaded(input_ids=ids).logits
    assert float((found - streamed).square().mean().sqrt()) <= 1e-4 * float(streamed.square().mean().sqrt())
