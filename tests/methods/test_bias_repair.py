"""The repair "bias" takes the mean error away."""

import torch

from bitwright.calibration.collect import SiteStats
from bitwright.methods.repairs import REPAIRS, RepairTask
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
