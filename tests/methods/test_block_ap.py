"""Block-AP: what is trained is what is stored, and rates are in units of the step."""

import pytest
import torch
from torch import Tensor

from bitwright.methods.block_ap import LearnedWeight
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import FloatScale

INTEGERS = ("int2", "uint2", "int4", "uint4", "int8", "uint3-floatzero")
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=8),  # with a ragged tail of 5
    Granularity(kind="block", group_size=8, block_rows=2),  # ragged on both sides
]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_trained_is_what_is_stored_bit_for_bit(name: str, granularity: Granularity, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 29)
    grid = fit_grid(weight, FORMATS[name], granularity, method="mse", scale=FloatScale(dtype))  # pyright: ignore[reportArgumentType]
    learned = LearnedWeight(weight, grid)
    start = learned.result()
    assert torch.equal(start.codes, grid.quantize(weight))
    assert torch.equal(start.dequantize(), grid.fake_quantize(weight))
    assert torch.equal(learned.values(), start.dequantize())
    with torch.no_grad():
        learned.moved.normal_()
        learned.wider.normal_()
        learned.shifted.normal_(std=4)
    result = learned.result()
    assert grid.format.min_value <= int(result.codes.min())
    assert int(result.codes.max()) <= grid.format.max_value
    assert isinstance(result.grid, Grid)
    assert result.grid.scale.dtype == dtype
    assert bool((result.grid.scale.sign() == grid.scale.sign()).all())
    assert torch.equal(learned.values(), result.dequantize())


@pytest.mark.parametrize("exponent", [-20, 20])
def test_the_unit_of_the_weights_does_not_matter(exponent: int) -> None:
    weight, factor = torch.randn(4, 16), 2.0**exponent
    grids = [fit_grid(each, FORMATS["int3"], GRANULARITIES[2]) for each in (weight, weight * factor)]  # pyright: ignore[reportArgumentType]
    moved = torch.randn(4, 2, 8)
    codes: list[Tensor] = []
    for each, grid in zip((weight, weight * factor), grids, strict=True):
        learned = LearnedWeight(each, grid)
        with torch.no_grad():
            learned.moved.copy_(moved)
        codes.append(learned.result().codes)
    assert torch.equal(*codes)
