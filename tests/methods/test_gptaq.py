"""GPTAQ against least squares and column-by-column rounding straight from the objective, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.methods.gptaq import asymmetric_target
from bitwright.methods.gptq import gptq
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS, DAMP = 6, 24, 90, 0.01
INT3 = IntegerFormat(bits=3, symmetric=True)
GROUPS = Granularity(kind="group", group_size=10)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Drifted and undrifted inputs [T, I] of the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(5, NUM_COLUMNS, dtype=torch.float64, generator=generator)
    original = torch.randn(NUM_TOKENS, 5, dtype=torch.float64, generator=generator) @ directions
    original += 0.5 * torch.randn(NUM_TOKENS, NUM_COLUMNS, dtype=torch.float64, generator=generator)
    drift = 0.2 * torch.randn(NUM_TOKENS, NUM_COLUMNS, dtype=torch.float64, generator=generator)
    return original + drift - 0.1 * original, original


def gptaq(weight: Tensor, hessian: Tensor, drift: Tensor | None, grid: AnyGrid, **sweep: Any) -> QTensor:
    return gptq(asymmetric_target(weight, hessian, drift, damp=DAMP), hessian, grid, damp=DAMP, **sweep)


def weight_of() -> Tensor:
    return torch.randn(NUM_ROWS, NUM_COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def moments(x: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    return 2 / NUM_TOKENS * x.T @ x, 2 / NUM_TOKENS * (original - x).T @ x


def ridge(hessian: Tensor) -> Tensor:
    return DAMP * hessian.diagonal().mean() * NUM_TOKENS / 2 * torch.eye(NUM_COLUMNS, dtype=torch.float64)


def naive(weight: Tensor, x: Tensor, original: Tensor, grid: object, order: list[int]) -> Tensor:
    """Round a column; give the others what minimises ‖Ŵ X - W X'‖² + λ ‖Ŵ - W‖² with those before it fixed; go on."""
    damping = ridge(moments(x, original)[0])
    done: list[int] = []
    result = torch.zeros_like(weight)
    codes = torch.zeros(weight.shape, dtype=INT3.code_dtype)
    while len(done) < NUM_COLUMNS:
        left = [j for j in order if j not in done]
        missing = weight @ original.T - result[:, done] @ x[:, done].T
        normal = x[:, left].T @ x[:, left] + damping[left][:, left]
        best = torch.linalg.solve(normal, (missing @ x[:, left] + weight[:, left] @ damping[left][:, left]).T).T
        j = left[0]
        codes[:, j], value = grid.rounder(j, len(best))(best[:, 0])  # type: ignore[attr-defined]
        result[:, j] = value
        done.append(j)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_are_those_of_rounding_column_by_column_towards_the_unquantized_output(
    act_order: bool, seed: int
) -> None:
    weight, (x, original) = weight_of(), inputs(seed)
    hessian, drift = moments(x, original)
    grid = fit_grid(weight, INT3, GROUPS)
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order else list(range(NUM_COLUMNS))
    found = gptaq(weight, hessian, drift, grid, act_order=act_order)
    assert torch.equal(found.codes, naive(weight, x, original, grid, order))
    assert not torch.equal(found.codes, gptq(weight, hessian, grid, damp=DAMP, act_order=act_order).codes)


def test_the_target_is_the_least_squares_solution_and_a_part_of_the_drift_goes_a_part_of_the_way() -> None:
    weight, (x, original) = weight_of(), inputs()
    hessian, drift = moments(x, original)
    damping = ridge(hessian)
    expected = torch.linalg.solve(x.T @ x + damping, (weight @ original.T @ x + weight @ damping).T).T
    whole = asymmetric_target(weight, hessian, drift, damp=DAMP)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9)
    half = asymmetric_target(weight, hessian, 0.5 * drift, damp=DAMP)
    torch.testing.assert_close(half, (weight + expected) / 2, rtol=1e-9, atol=1e-9)


def test_it_is_closer_to_the_unquantized_output_than_gptq() -> None:
    for seed in range(4):
        weight, (x, original) = weight_of(), inputs(seed)
        hessian, drift = moments(x, original)
        grid = fit_grid(weight, INT3, GROUPS)
        found, plain = gptaq(weight, hessian, drift, grid), gptq(weight, hessian, grid)
        losses = [
            float((r.dequantize(torch.float64) @ x.T - weight @ original.T).square().sum()) for r in (found, plain)
        ]
        assert losses[0] < losses[1]


def test_no_asymmetry_and_no_drift_are_gptq_bit_for_bit() -> None:
    weight, (x, original) = weight_of().float(), inputs()
    hessian, drift = moments(x, original)
    grid = fit_grid(weight, INT3, GROUPS)
    expected = gptq(weight, hessian, grid).codes
    assert torch.equal(gptaq(weight, hessian, None, grid).codes, expected)
    assert torch.equal(gptaq(weight, hessian, torch.zeros_like(drift), grid).codes, expected)


def test_the_result_does_not_depend_on_the_block_size() -> None:
    weight, (x, original) = weight_of(), inputs()
    hessian, drift = moments(x, original)
    grid = fit_grid(weight, INT3, GROUPS)
    results = [gptaq(weight, hessian, drift, grid, block=block).codes for block in (1, 7, 24, 128)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_dead_columns_stay_out_of_it() -> None:
    weight, (x, original) = weight_of(), inputs()
    dead = [0, 11]
    x[:, dead] = 0.0
    hessian, drift = moments(x, original)
    live = [j for j in range(NUM_COLUMNS) if j not in dead]
    found = asymmetric_target(weight, hessian, drift, damp=DAMP)
    assert torch.equal(found[:, dead], weight[:, dead])
    assert not torch.equal(found[:, live], weight[:, live])
    zeros = torch.zeros_like(hessian)
    assert torch.equal(asymmetric_target(weight, zeros, zeros, damp=DAMP), weight)


def test_nothing_given_is_modified() -> None:
    weight, (x, original) = weight_of(), inputs()
    given = [weight, *moments(x, original)]
    before = [tensor.clone() for tensor in given]
    gptaq(*given, fit_grid(weight, INT3, GROUPS))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))
