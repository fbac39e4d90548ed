"""What every solver must satisfy, whatever it does; an entry in `SOLVERS` is tested here without another line."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.solvers import SOLVERS, Problem
from bitwright.numerics.codebook_grid import CodebookGrid
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.options import GptqOptions
from bitwright.recipe import Recipe

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS = 9, 29, 120
ZERO_ROW = 3  # a row with nothing in it
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=8),  # with a ragged tail of 5
    Granularity(kind="group", group_size=64),  # wider than the weight
    Granularity(kind="block", group_size=8, block_rows=2),  # ragged on both sides
]
OPTIONS = [GptqOptions(), GptqOptions(act_order=False, block=5)]
# Scales that are not floats, beside those of every format above.
QUANTIZED_SCALES = [("fp4-e2m1", "e4m3"), ("fp4-e2m1", "e8m0"), ("int8", "e8m0-int8"), ("nf4", "e8m0")]

# Solvers of single weights; those of whole blocks need a block, and have tests of their own.
SINGLE = [method for method in SOLVERS if SOLVERS[method].solve is not None]
# Every one with every format it accepts, as (method, format, name of the scales).
CASES = [
    *((method, name, "float32") for method in SINGLE for name in FORMATS if SOLVERS[method].accepts(FORMATS[name])),
    *(
        (method, *case)
        for method in SINGLE
        for case in QUANTIZED_SCALES
        if SOLVERS[method].accepts(FORMATS[case[0]]) and not SOLVERS[method].moves_scales
    ),
]
EVERY_CASE = pytest.mark.parametrize(("method", "name", "scale"), CASES)
EVERY_METHOD = pytest.mark.parametrize("method", SINGLE)
# Every granularity with the default options, and the other options with one whose last group is ragged.
WAYS = [*((granularity, OPTIONS[0]) for granularity in GRANULARITIES), (GRANULARITIES[2], OPTIONS[1])]
EVERY_WAY = pytest.mark.parametrize(
    ("granularity", "options"),
    WAYS,
    ids=[f"{g.kind}{g.group_size or ''}-{'default' if o is OPTIONS[0] else 'storage-order'}" for g, o in WAYS],
)


def accepted_format(method: str) -> str:
    """A format of about four bits that a method works on."""
    return next(name for name in ("int4", "kmeans4") if SOLVERS[method].accepts(FORMATS[name]))


def weight_of() -> Tensor:
    weight = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[ZERO_ROW] = 0.0
    return weight


@cache
def grid_of(name: str, scale: str, granularity: Granularity) -> AnyGrid:
    format = FORMATS[name]
    return fit(weight_of(), format, granularity, method="minmax", importance=None, scale=SCALE_FORMATS[scale])


def tensors_of(grid: AnyGrid) -> list[Tensor]:
    if isinstance(grid, CodebookGrid):
        return [grid.codebook.clone()]
    assert isinstance(grid, Grid)
    return [grid.scale.clone(), *([] if grid.zero_point is None else [grid.zero_point.clone()])]


def stats_of(x: Tensor) -> SiteStats:
    """Everything that any solver needs; the inputs of the unquantized model differ a little."""
    stats = SiteStats()
    weights = {"site": torch.rand(1, x.shape[0])}  # one group of channels, so that refits are of all rows
    stats.add(x, with_gram=True, target=x + 0.1 * torch.randn(x.shape), weights=weights)
    return stats


def correlated() -> Tensor:
    x = torch.randn(NUM_TOKENS, 4) @ torch.randn(4, NUM_COLUMNS) + 0.3 * torch.randn(NUM_TOKENS, NUM_COLUMNS)
    x[:, 7] = 0.0  # an input that is never anything else
    return x


def solve(method: str, weight: Tensor, grid: AnyGrid, stats: SiteStats, options: GptqOptions) -> QTensor:
    def refit(current: Tensor, first: int, end: int) -> AnyGrid:
        return grid.columns(first, end)  # the same grid again, so that results are on the given one

    solver = SOLVERS[method].solve
    assert solver is not None
    rows = {"site": slice(0, weight.shape[0])}
    return solver(
        weight, grid, Problem(stats=stats, recipe=Recipe(gptq=options), refit=refit, fit=lambda _: grid, rows=rows)
    )


@EVERY_CASE
@EVERY_WAY
def test_result_is_a_finite_weight_on_a_grid_of_the_given_kind(
    method: str, name: str, scale: str, granularity: Granularity, options: GptqOptions
) -> None:
    weight, stats, grid = weight_of(), stats_of(correlated()), grid_of(name, scale, granularity)
    given = tensors_of(grid)
    result = solve(method, weight, grid, stats, options)
    assert result.shape == weight.shape
    assert result.codes.dtype == FORMATS[name].code_dtype
    assert (result.grid.format, result.grid.granularity) == (grid.format, grid.granularity)
    assert result.num_bits_total == QTensor(codes=grid.quantize(weight), grid=grid).num_bits_total
    dense = result.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert torch.equal(result.grid.fake_quantize(dense), dense), "every value is one of the grid's"
    if bool((grid.fake_quantize(weight)[ZERO_ROW] == 0).all()):
        assert bool((dense[ZERO_ROW] == 0).all()), "a row of zeros stays one where zero is exact"
    assert torch.equal(weight, weight_of())
    assert all(torch.equal(now, before) for now, before in zip(tensors_of(grid), given, strict=True))
    again = solve(method, weight, grid, stats, options)
    assert torch.equal(again.codes, result.codes)
    assert torch.equal(again.dequantize(), dense)


@EVERY_CASE
@EVERY_WAY
def test_uncorrelated_inputs_leave_nothing_to_gain_over_the_nearest_level(
    method: str, name: str, scale: str, granularity: Granularity, options: GptqOptions
) -> None:
    """H = I: no error can be made up for. On the given grid the nearest level is best; other tables may be better.

    A method that does not look at inputs may minimise another error than theirs.
    """
    weight, grid = weight_of(), grid_of(name, scale, granularity)
    identity = SiteStats(
        num_tokens=2,  # (2/T) Σ x xᵀ = I
        gram=torch.eye(NUM_COLUMNS, dtype=torch.float64),
        cross=torch.zeros(NUM_COLUMNS, NUM_COLUMNS, dtype=torch.float64),
        guided={"site": torch.eye(NUM_COLUMNS, dtype=torch.float64).unsqueeze(0)},
        square_sum=torch.ones(NUM_COLUMNS, dtype=torch.float64),
    )
    result = solve(method, weight, grid, identity, options)
    on_given_grid = all(torch.equal(a, b) for a, b in zip(tensors_of(result.grid), tensors_of(grid), strict=True))
    error, nearest = (
        (dense - weight).double().square().sum() for dense in (result.dequantize(), grid.fake_quantize(weight))
    )
    if on_given_grid:
        assert torch.equal(result.dequantize(), grid.fake_quantize(weight))
    elif SOLVERS[method].needs:
        assert float(error) < float(nearest)


@EVERY_METHOD
@pytest.mark.parametrize("exponent", [-60, 60])
def test_tiny_and_huge_weights(method: str, exponent: int) -> None:
    """The unit of the weights does not matter: a power of two changes scales or tables and nothing else."""
    stats, weight, factor = stats_of(correlated()), weight_of(), 2.0**exponent
    for solver, name, scale in CASES:
        if solver != method or scale != "float32":
            continue
        grid = grid_of(name, scale, GRANULARITIES[2])
        if isinstance(grid, CodebookGrid):
            scaled: AnyGrid = replace(grid, codebook=grid.codebook * factor)
        else:
            assert isinstance(grid, Grid)
            # The scale of a row of zeros may be the smallest there is; that row is not compared.
            smaller = grid.scale * factor
            scaled = replace(grid, scale=torch.where(smaller == 0, grid.scale, smaller))
        expected = solve(method, weight, grid, stats, OPTIONS[0])
        found = solve(method, weight * factor, scaled, stats, OPTIONS[0])
        assert torch.equal(found.codes[:ZERO_ROW], expected.codes[:ZERO_ROW])


@EVERY_METHOD
def test_one_row_and_one_column(method: str) -> None:
    for shape in ((1, NUM_COLUMNS), (NUM_ROWS, 1), (1, 1)):
        weight = torch.randn(shape)
        stats = stats_of(torch.randn(NUM_TOKENS, shape[1]))
        format = FORMATS[accepted_format(method)]
        for granularity in GRANULARITIES:
            grid = fit(weight, format, granularity, method="mse", importance=None, scale=FloatScale(torch.float32))
            assert solve(method, weight, grid, stats, OPTIONS[0]).shape == shape


@EVERY_METHOD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_metadata_keeps_its_dtype(method: str, dtype: torch.dtype) -> None:
    weight, stats, format = weight_of(), stats_of(correlated()), FORMATS[accepted_format(method)]
    grid = fit(weight, format, GRANULARITIES[2], method="mse", importance=None, scale=FloatScale(dtype))
    result = solve(method, weight, grid, stats, OPTIONS[0])
    assert tensors_of(result.grid)[0].dtype == dtype


@pytest.mark.parametrize("method", [method for method in SINGLE if SOLVERS[method].accepts(FORMATS["uint4"])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_scales_are_the_ones_that_codes_were_chosen_on(method: str, dtype: torch.dtype) -> None:
    weight, stats = weight_of(), stats_of(correlated())
    grid = fit(weight, FORMATS["uint4"], GRANULARITIES[2], method="mse", importance=None, scale=FloatScale(dtype))
    assert isinstance(grid, Grid)
    result = solve(method, weight, grid, stats, OPTIONS[0])
    same = replace(grid, scale=grid.scale.float())
    assert torch.equal(solve(method, weight, same, stats, OPTIONS[0]).codes, result.codes)


def test_only_solvers_without_needs_do_without_text() -> None:
    """`needs` is what preparation goes by: a solver that names none must work on empty statistics."""
    weight = weight_of()
    free = [method for method in SINGLE if not SOLVERS[method].needs]
    assert "rtn" in free
    for method in free:
        for solver, name, scale in CASES:
            if solver == method:
                grid = grid_of(name, scale, GRANULARITIES[2])
                dense = solve(method, weight, grid, SiteStats(), OPTIONS[0]).dequantize()
                assert bool(torch.isfinite(dense).all())


def test_every_format_has_a_solver_with_and_without_text() -> None:
    for name in FORMATS:
        needs = {bool(SOLVERS[method].needs) for method in SINGLE if SOLVERS[method].accepts(FORMATS[name])}
        assert needs == {True, False}
