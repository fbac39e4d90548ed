"""What every solver must satisfy, whatever it does; an entry in `SOLVERS` is tested here without another line."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.solvers import SOLVERS
from bitwright.numerics.formats import FORMATS, Format
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import FloatScale
from bitwright.recipe import GptqOptions

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS = 9, 29, 120
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=8),  # with a ragged tail of 5
    Granularity(kind="group", group_size=64),  # wider than the weight
]
OPTIONS = [GptqOptions(), GptqOptions(act_order=False, block=5)]

EVERY_METHOD = pytest.mark.parametrize("method", list(SOLVERS))
EVERY_FORMAT = pytest.mark.parametrize("number", [FORMATS[name] for name in FORMATS], ids=lambda f: f.name)
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: f"{g.kind}{g.group_size or ''}")
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=["default", "storage-order"])


def weight_of(scale: float = 1.0) -> Tensor:
    weight = scale * torch.randn(NUM_ROWS, NUM_COLUMNS)
    weight[3] = 0.0  # a row with nothing in it
    return weight


def stats_of(x: Tensor) -> SiteStats:
    stats = SiteStats()
    stats.add(x, with_gram=True)
    return stats


def correlated() -> Tensor:
    x = torch.randn(NUM_TOKENS, 4) @ torch.randn(4, NUM_COLUMNS) + 0.3 * torch.randn(NUM_TOKENS, NUM_COLUMNS)
    x[:, 7] = 0.0  # an input that is never anything else
    return x


def solve(method: str, weight: Tensor, grid: Grid, stats: SiteStats, options: GptqOptions) -> QTensor:
    def refit(current: Tensor, first: int, end: int) -> Grid:
        return grid.columns(first, end)  # the same grid again, so that results are on the given one

    return SOLVERS[method].solve(weight, grid, stats, options, refit)


@EVERY_METHOD
@EVERY_FORMAT
@EVERY_GRANULARITY
@EVERY_OPTION
def test_result_is_a_finite_weight_on_the_given_grid(
    method: str, number: Format, granularity: Granularity, options: GptqOptions
) -> None:
    weight, stats = weight_of(), stats_of(correlated())
    grid = fit_grid(weight, number, granularity)
    given = [weight.clone(), grid.scale.clone()]
    result = solve(method, weight, grid, stats, options)
    assert result.shape == weight.shape
    assert result.codes.dtype == number.code_dtype
    values = number.decode(result.codes, None)
    assert float(values.min()) >= number.min_value
    assert float(values.max()) <= number.max_value
    dense = result.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert bool((dense[3] == 0).all()), "a row of zeros stays one: zero is exact in every format"
    assert torch.equal(result.grid.fake_quantize(dense), dense), "every value is one of the grid's"
    assert torch.equal(weight, given[0])
    assert torch.equal(grid.scale, given[1])
    again = solve(method, weight, grid, stats, options)
    assert torch.equal(again.codes, result.codes)
    assert torch.equal(again.dequantize(), dense)


@EVERY_METHOD
@EVERY_FORMAT
@EVERY_GRANULARITY
@EVERY_OPTION
def test_uncorrelated_inputs_leave_every_weight_within_half_a_step(
    method: str, number: Format, granularity: Granularity, options: GptqOptions
) -> None:
    """H = I: no error can be made up for, so that nothing can be gained by moving further than to the nearest value."""
    weight = weight_of()
    identity = SiteStats(
        num_tokens=2,  # (2/T) Σ x xᵀ = I
        gram=torch.eye(NUM_COLUMNS, dtype=torch.float64),
        square_sum=torch.ones(NUM_COLUMNS, dtype=torch.float64),
    )
    grid = fit_grid(weight, number, granularity)
    error = (solve(method, weight, grid, identity, options).dequantize() - weight).abs()
    columns = [j // granularity.columns_per_group(NUM_COLUMNS) for j in range(NUM_COLUMNS)]
    step = grid.scale.abs()[:, columns].expand(weight.shape)
    # Quotient and product round once each; the min-max range of an asymmetric format ends half a step short at most.
    assert bool((error <= step * (0.5 + 2.0 ** (number.bits - 22))).all())


@EVERY_METHOD
@pytest.mark.parametrize("exponent", [-60, 60])
def test_tiny_and_huge_weights(method: str, exponent: int) -> None:
    """The unit of the weights does not matter: a power of two changes the scales and nothing else."""
    stats = stats_of(correlated())
    weight = weight_of()
    for name in FORMATS:
        grid = fit_grid(weight, FORMATS[name], GRANULARITIES[2])
        scaled = fit_grid(weight * 2.0**exponent, FORMATS[name], GRANULARITIES[2])
        expected = solve(method, weight, grid, stats, OPTIONS[0])
        found = solve(method, weight * 2.0**exponent, scaled, stats, OPTIONS[0])
        assert torch.equal(found.codes[:3], expected.codes[:3])


@EVERY_METHOD
def test_one_row_and_one_column(method: str) -> None:
    for shape in ((1, NUM_COLUMNS), (NUM_ROWS, 1), (1, 1)):
        weight = torch.randn(shape)
        stats = stats_of(torch.randn(NUM_TOKENS, shape[1]))
        grid = fit_grid(weight, FORMATS["int4"], GRANULARITIES[1])
        assert solve(method, weight, grid, stats, OPTIONS[0]).shape == shape


@EVERY_METHOD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_scales_are_the_ones_that_codes_were_chosen_on(method: str, dtype: torch.dtype) -> None:
    weight, stats = weight_of(), stats_of(correlated())
    grid = fit_grid(weight, FORMATS["uint4"], GRANULARITIES[2], scale=FloatScale(dtype))
    result = solve(method, weight, grid, stats, OPTIONS[0])
    assert result.grid.scale.dtype == dtype
    same = replace(grid, scale=grid.scale.float())
    assert torch.equal(solve(method, weight, same, stats, OPTIONS[0]).codes, result.codes)


def test_only_solvers_without_hessian_do_without_text() -> None:
    """`needs_hessian` is what preparation goes by: a solver that says no must work on empty statistics."""
    weight = weight_of()
    grid = fit_grid(weight, FORMATS["int4"], GRANULARITIES[2])
    free = [method for method in SOLVERS if not SOLVERS[method].needs_hessian]
    assert "rtn" in free
    for method in free:
        dense = solve(method, weight, grid, SiteStats(), OPTIONS[0]).dequantize()
        assert bool((dense[3] == 0).all())
        assert bool(torch.isfinite(dense).all())
