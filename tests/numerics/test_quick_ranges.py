"""The coarse search of ranges: between covering everything and the full search."""

import pytest
import torch

from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.ranges import fit_grid, quick

EVERY_LEVEL_FORMAT = ["int3", "int4", "uint4", "int8", "nf4", "fp4-e2m1", "fp8-e4m3"]


@pytest.mark.parametrize("name", EVERY_LEVEL_FORMAT)
def test_it_is_never_worse_than_covering_and_mostly_much_better_at_few_bits(name: str) -> None:
    weight, importance = torch.randn(32, 64), torch.rand(64) + 0.1

    def error(method: object) -> torch.Tensor:
        grid = fit_grid(weight, FORMATS[name], Granularity(kind="channel"), method=method, importance=importance)
        return ((grid.fake_quantize(weight) - weight).square() * importance).sum(1).double()

    covering, coarse, full = error("minmax"), error(quick), error("mse")
    rounding = 64 * torch.finfo(torch.float32).eps
    assert bool((coarse <= covering * (1 + rounding)).all())
    assert float(full.sum()) <= float(coarse.sum())
    if name in ("int3", "uint4", "int4"):
        assert float((covering - coarse).sum()) >= 0.5 * float((covering - full).sum())
