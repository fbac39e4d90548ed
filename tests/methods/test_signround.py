"""Learned rounding: what is trained is what is stored; the steps and gradients of one weight."""

import pytest
import torch
from torch import Tensor

from bitwright.methods.gptq import compensated, gptq
from bitwright.methods.signround import LearnedRounding
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import FloatScale
from bitwright.options import SignRoundOptions

INTEGERS = ("int2", "uint2", "int4", "uint4", "int8", "uint3-floatzero")
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=8),  # with a ragged tail of 5
    Granularity(kind="block", group_size=8, block_rows=2),  # ragged on both sides
]
ZERO_ROW = 3


def weight_of(num_rows: int = 9, num_columns: int = 29) -> Tensor:
    weight = torch.randn(num_rows, num_columns)
    weight[ZERO_ROW] = 0.0
    return weight


def shaken(rounding: LearnedRounding) -> LearnedRounding:
    """Parameters as training may leave them."""
    with torch.no_grad():
        rounding.offset.uniform_(-0.5, 0.5)
        rounding.low.uniform_(*rounding.limits)
        rounding.high.uniform_(*rounding.limits)
    return rounding


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_trained_is_what_is_stored_bit_for_bit(name: str, granularity: Granularity, dtype: torch.dtype) -> None:
    weight = weight_of()
    grid = fit_grid(weight, FORMATS[name], granularity, method="mse", scale=FloatScale(dtype))  # pyright: ignore[reportArgumentType]
    rounding = LearnedRounding(weight, grid, SignRoundOptions())
    start = rounding.result()
    assert torch.equal(start.codes, grid.quantize(weight))
    assert torch.equal(start.dequantize(), grid.fake_quantize(weight))
    assert torch.equal(rounding.values(), start.dequantize())
    for options in (SignRoundOptions(), SignRoundOptions(importance=False)):
        changed = shaken(LearnedRounding(weight, grid, options))
        result = changed.result()
        assert grid.format.min_value <= int(result.codes.min())
        assert int(result.codes.max()) <= grid.format.max_value
        assert isinstance(result.grid, Grid)
        assert result.grid.scale.dtype == dtype
        assert torch.equal(changed.values(), result.dequantize())


def test_gradients_are_straight_through_inside_the_range_and_none_outside() -> None:
    """For one symmetric weight with scale s: d/dV = s and d/ds = q - w/s inside; 0 and q where it is clipped."""
    weight = torch.tensor([[0.6, -1.3, 30.0]])
    grid = Grid(
        format=FORMATS["int3"], granularity=Granularity(kind="channel"), in_features=3,  # pyright: ignore[reportArgumentType]
        scale=torch.tensor([[0.5]]), zero_point=None,
    )  # fmt: skip
    rounding = LearnedRounding(weight, grid, SignRoundOptions())
    rounding.values().sum().backward()
    assert rounding.offset.grad is not None
    assert rounding.high.grad is not None
    torch.testing.assert_close(rounding.offset.grad.flatten(), torch.tensor([0.5, 0.5, 0.0]))
    codes = torch.tensor([1.0, -3.0, 3.0])
    expected = 0.5 * (codes - torch.tensor([1.2, -2.6, 0.0])).sum()  # the factor multiplies a scale of 0.5
    torch.testing.assert_close(rounding.high.grad.sum(), expected)


def test_steps_have_one_size_and_stay_inside_their_limits() -> None:
    weight = weight_of()
    grid = fit_grid(weight, FORMATS["int4"], GRANULARITIES[2])  # pyright: ignore[reportArgumentType]
    rounding = LearnedRounding(weight, grid, SignRoundOptions())
    rounding.offset.grad = torch.randn_like(rounding.offset)
    rounding.step(0.125)
    assert set(rounding.offset.detach().abs().unique().tolist()) <= {0.125}
    rounding.offset.grad = torch.ones_like(rounding.offset)
    rounding.step(3.0)
    assert rounding.offset.detach().min().item() == -0.5


@pytest.mark.parametrize("act_order", [True, False])
def test_compensated_weights_round_to_the_codes_of_gptq(act_order: bool) -> None:
    x = torch.randn(200, 6) @ torch.randn(6, 24) + 0.3 * torch.randn(200, 24)
    x[:, 5] = 0.0
    hessian, weight = (x.T @ x / 100).double(), torch.randn(7, 24)
    grid = fit_grid(weight, FORMATS["int8"], GRANULARITIES[2])  # pyright: ignore[reportArgumentType]
    result = gptq(weight, hessian, grid, act_order=act_order, block=5)
    moved = compensated(weight, result, hessian, damp=0.01, act_order=act_order)
    different = grid.quantize(moved) != result.codes
    steps = (grid.dequantize(result.codes) - moved).abs() / grid.scale.abs().repeat_interleave(8, 1)
    assert float(different.float().mean()) < 0.01
    assert bool((steps[~different] < 0.5 + 1e-3).all() | (result.codes[~different].abs() >= 127).any())
