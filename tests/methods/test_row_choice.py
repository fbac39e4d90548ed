"""The choice among results, row by row, against the losses themselves."""

import pytest
import torch
from torch import Tensor

from bitwright.methods.gptq import gptq
from bitwright.methods.row_choice import best_rows, has_scales_of_rows, solve_on_each
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid

FORMATS = [IntegerFormat(bits=3, symmetric=True), IntegerFormat(bits=3, symmetric=False)]


def losses(weight: Tensor, hessian: Tensor, result: QTensor) -> Tensor:
    error = (weight - result.dequantize()).double()
    return torch.einsum("oi,ij,oj->o", error, hessian.double(), error)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("granularity", [Granularity(kind="channel"), Granularity(kind="group", group_size=16)])
def test_no_row_is_worse_than_in_any_of_the_results(format: IntegerFormat, granularity: Granularity) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 48, generator=generator) ** 3
    x = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    hessian = x.T @ x / 100
    grids = [fit_grid(weight, format, granularity, method=method) for method in ("mse", "minmax")]
    results = [gptq(weight, hessian, grid) for grid in grids]
    found = best_rows(weight, hessian, results)
    each = torch.stack([losses(weight, hessian, result) for result in results])
    assert torch.equal(losses(weight, hessian, found), each.amin(0))
    assert 0 < int((each[0] < each[1]).sum()) < 24, "both grids must win somewhere, or the test shows nothing"


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_all_grids_in_one_sweep_are_the_grids_one_by_one(format: IntegerFormat) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(24, 48, generator=generator, dtype=torch.float64) ** 3
    x = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / 100
    granularity = Granularity(kind="group", group_size=16)
    grids = [fit_grid(weight, format, granularity, method=method) for method in ("mse", "minmax")]
    expected = best_rows(weight, hessian, [gptq(weight, hessian, grid) for grid in grids])
    found = solve_on_each(weight, hessian, grids, gptq)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_only_floats_that_belong_to_rows_can_be_chosen() -> None:
    weight, format = torch.randn(8, 32), FORMATS[0]
    assert has_scales_of_rows(fit_grid(weight, format, Granularity(kind="channel")))
    assert not has_scales_of_rows(fit_grid(weight, format, Granularity(kind="tensor")))
    assert not has_scales_of_rows(fit_grid(weight, format, Granularity(kind="block", group_size=16, block_rows=4)))
