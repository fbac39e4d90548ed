"""GPTQ against its definition, a naive float64 OBQ; its limits, such as dead columns; and what must not matter.

Everything here runs in float64, where only rounding noise of 1e-16 separates equivalent orders of summation; codes can
then be compared for equality.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from bitwright.errors import SingularHessian
from bitwright.methods.gptq import gptq
from bitwright.methods.rtn import rtn
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scale_formats import SCALE_FORMATS

NUM_ROWS, NUM_COLUMNS = 11, 50
INT3, UINT3 = IntegerFormat(bits=3, symmetric=True), IntegerFormat(bits=3, symmetric=False)
PER_TENSOR, PER_CHANNEL = Granularity(kind="tensor"), Granularity(kind="channel")
RAGGED = Granularity(kind="group", group_size=12)  # four groups of 12 and a tail of 2; crosses the borders of 7 and 32
BLOCKS = [1, 7, 32, 128, NUM_COLUMNS]
EVERY_FORMAT = pytest.mark.parametrize("number", [INT3, UINT3], ids=lambda f: f.name)
TILES = Granularity(kind="block", group_size=12, block_rows=4)  # ragged on both sides
EVERY_GRANULARITY = pytest.mark.parametrize(
    "granularity", [PER_TENSOR, PER_CHANNEL, RAGGED, TILES], ids=lambda g: g.kind
)
# Grids whose levels or scales are of another kind: format, granularity, scales.
OTHER_GRIDS = {
    "fp8": ("fp8-e4m3", PER_CHANNEL, "float32"),
    "fp8-block": ("fp8-e4m3", TILES, "float32"),
    "nvfp4": ("fp4-e2m1", Granularity(kind="group", group_size=16), "e4m3"),
    "mxfp4": ("fp4-e2m1", RAGGED, "e8m0"),
    "mxint8": ("int8", RAGGED, "e8m0-int8"),
    "nf4": ("nf4", RAGGED, "float32"),
    "lut3": ("lut3", RAGGED, "float32"),
    "lloyd3": ("lloyd3-gaussian", PER_CHANNEL, "float32"),
    "kmeans3": ("kmeans3", PER_CHANNEL, "float32"),
    "kmeans2-group": ("kmeans2", RAGGED, "float32"),
    "kmeans3-block": ("kmeans3", TILES, "float32"),
    "kmeans3-tensor": ("kmeans3", PER_TENSOR, "float32"),
    "ternary": ("ternary", RAGGED, "float32"),
    "binary": ("binary", RAGGED, "float32"),
}
EVERY_OTHER_GRID = pytest.mark.parametrize("kind", list(OTHER_GRIDS))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(seed: int = 0, num_rows: int = NUM_ROWS) -> Tensor:
    return torch.randn(num_rows, NUM_COLUMNS, dtype=torch.float64, generator=generator(seed))


def hessian_of(seed: int = 0, num_tokens: int = 200) -> Tensor:
    """Of inputs that share a few directions and differ in size, as a model's do."""
    directions = torch.randn(6, NUM_COLUMNS, dtype=torch.float64, generator=generator(seed + 1))
    x = torch.randn(num_tokens, 6, dtype=torch.float64, generator=generator(seed + 2)) @ directions
    x += 0.5 * torch.randn(num_tokens, NUM_COLUMNS, dtype=torch.float64, generator=generator(seed + 3))
    x *= torch.rand(NUM_COLUMNS, dtype=torch.float64, generator=generator(seed + 4)) + 0.1
    return 2 / num_tokens * x.T @ x


def loss(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    error = weight - result.double()
    return float(((error @ hessian) * error).sum())


class Refit:
    """Fits a group's grid to the weights it is given; remembers which columns those were."""

    def __init__(self, number: IntegerFormat) -> None:
        self.number, self.seen = number, list[tuple[int, int]]()

    def __call__(self, current: Tensor, first: int, end: int) -> Grid:
        assert current.shape[1] == end - first
        self.seen.append((first, end))
        return fit_grid(current, self.number, PER_CHANNEL)


def other_grid(kind: str, weight: Tensor) -> AnyGrid:
    name, granularity, scale = OTHER_GRIDS[kind]
    format = FORMATS[name]
    return fit(weight.float(), format, granularity, method="mse", importance=None, scale=SCALE_FORMATS[scale])


def naive_obq(
    weight: Tensor,
    hessian: Tensor,
    grid: AnyGrid,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    refit: Refit | None = None,
) -> Tensor:
    """Optimal brain quantization in a fixed column order, straight from its definition.

    Round one column; move all columns that are left to the least-squares optimum, which takes the inverse of the
    Hessian of just these columns; forget the rounded column. No Cholesky factor, no blocks, no lazy updates.
    """
    live = hessian.diagonal() != 0
    damped = hessian + damp * hessian.diagonal()[live].mean() * torch.eye(NUM_COLUMNS, dtype=torch.float64)
    left = sorted(range(NUM_COLUMNS), key=lambda j: -float(hessian[j, j])) if act_order else list(range(NUM_COLUMNS))
    work = torch.where(live, weight, 0.0)
    width = grid.granularity.columns_per_group(NUM_COLUMNS)
    codes = torch.zeros(weight.shape, dtype=grid.format.code_dtype)
    now, column = grid, 0
    while left:
        j = left[0]
        if refit is not None and j % width == 0:
            now, column = refit(work[:, j : j + width], j, min(j + width, NUM_COLUMNS)), j
        codes[:, j], value = now.rounder(j - column, len(work))(work[:, j])
        inverse = torch.linalg.inv(damped[left][:, left])
        work[:, left] -= torch.outer((work[:, j] - value) / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@EVERY_FORMAT
@EVERY_GRANULARITY
def test_the_result_does_not_depend_on_the_block_size(
    number: IntegerFormat, granularity: Granularity, act_order: bool
) -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = fit_grid(weight, number, granularity)
    results = [gptq(weight, hessian, grid, block=block, act_order=act_order).codes for block in BLOCKS]
    assert not torch.equal(results[0], rtn(weight, grid).codes), "no update took place; the test shows nothing"
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("act_order", [True, False])
@EVERY_OTHER_GRID
def test_every_kind_of_grid_is_solved_as_by_a_naive_obq_whatever_the_block_size(kind: str, act_order: bool) -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = other_grid(kind, weight)
    results = [gptq(weight, hessian, grid, block=block, act_order=act_order) for block in BLOCKS]
    expected = naive_obq(weight, hessian, grid, act_order=act_order)
    assert not torch.equal(expected, rtn(weight, grid).codes), "no update took place; the test shows nothing"
    for result in results:
        assert torch.equal(result.codes, expected)
        assert torch.equal(result.dequantize(), grid.dequantize(expected))


@EVERY_FORMAT
def test_the_result_does_not_depend_on_the_block_size_when_grids_are_refitted(number: IntegerFormat) -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = fit_grid(weight, number, RAGGED)
    results = [gptq(weight, hessian, grid, block=block, act_order=False, refit=Refit(number)) for block in BLOCKS]
    for result in results:
        assert torch.equal(result.codes, results[0].codes)
        # The weights that a grid is fitted to agree to 1e-16, the stored scale to its own precision.
        torch.testing.assert_close(result.grid.scale, results[0].grid.scale, rtol=2**-23, atol=0)


@pytest.mark.parametrize("act_order", [True, False])
@EVERY_FORMAT
@EVERY_GRANULARITY
def test_codes_are_those_of_a_naive_obq(number: IntegerFormat, granularity: Granularity, act_order: bool) -> None:
    weight, hessian = weight_of(5), hessian_of(5)
    grid = fit_grid(weight, number, granularity)
    found = gptq(weight, hessian, grid, act_order=act_order)
    assert torch.equal(found.codes, naive_obq(weight, hessian, grid, act_order=act_order))


@EVERY_FORMAT
def test_a_refitted_grid_sees_every_update_so_far(number: IntegerFormat) -> None:
    """Also those of its own lazy block, which two well-known implementations miss."""
    weight, hessian = weight_of(7), hessian_of(7)
    grid = fit_grid(weight, number, RAGGED)
    static = gptq(weight, hessian, grid, act_order=False)
    ours, naive = Refit(number), Refit(number)
    found = gptq(weight, hessian, grid, act_order=False, refit=ours)
    expected = naive_obq(weight, hessian, grid, refit=naive)
    assert ours.seen == naive.seen == [(0, 12), (12, 24), (24, 36), (36, 48), (48, 50)]
    assert torch.equal(found.codes, expected)
    assert torch.equal(found.grid.scale[:, 0], static.grid.scale[:, 0]), "nothing was rounded before the first group"
    assert not torch.equal(found.grid.scale[:, 1:], static.grid.scale[:, 1:])
    assert not torch.equal(found.codes, static.codes)


def test_refitting_needs_storage_order() -> None:
    weight = weight_of()
    with pytest.raises(ValueError, match="out of order"):
        gptq(weight, hessian_of(), fit_grid(weight, INT3, RAGGED), act_order=True, refit=Refit(INT3))


@pytest.mark.parametrize("act_order", [True, False])
@EVERY_FORMAT
@EVERY_GRANULARITY
def test_uncorrelated_inputs_give_round_to_nearest(
    number: IntegerFormat, granularity: Granularity, act_order: bool
) -> None:
    """H = I, and any diagonal H: no later column can make up for anything."""
    weight = weight_of().float()
    grid = fit_grid(weight, number, granularity)
    for diagonal in (torch.ones(NUM_COLUMNS), torch.rand(NUM_COLUMNS, generator=generator(1)) * 1e3 + 1e-3):
        found = gptq(weight, torch.diag(diagonal), grid, act_order=act_order)
        assert torch.equal(found.codes, rtn(weight, grid).codes)


@EVERY_OTHER_GRID
def test_every_kind_of_grid_gains_on_correlated_inputs_and_nothing_on_others(kind: str) -> None:
    for seed in range(3):
        weight, hessian = weight_of(seed), hessian_of(seed)
        grid = other_grid(kind, weight)
        nearest = rtn(weight, grid)
        found = gptq(weight, hessian, grid)
        assert loss(weight, found.dequantize(), hessian) < loss(weight, nearest.dequantize(), hessian)
        identity = gptq(weight, torch.eye(NUM_COLUMNS, dtype=torch.float64), grid)
        assert torch.equal(identity.codes, nearest.codes)


@pytest.mark.parametrize("act_order", [True, False])
def test_never_worse_than_round_to_nearest_on_correlated_inputs(act_order: bool) -> None:
    for seed, number in product(range(8), [INT3, UINT3, IntegerFormat(bits=4, symmetric=True)]):
        weight, hessian = weight_of(seed), hessian_of(seed)
        grid = fit_grid(weight, number, RAGGED)
        nearest = loss(weight, rtn(weight, grid).dequantize(), hessian)
        assert loss(weight, gptq(weight, hessian, grid, act_order=act_order).dequantize(), hessian) < nearest


@pytest.mark.parametrize("act_order", [True, False])
@EVERY_FORMAT
def test_dead_columns_become_zero_and_disturb_no_other(number: IntegerFormat, act_order: bool) -> None:
    """Neither their weights nor their number may matter: the rest is solved as if they were not there."""
    weight, hessian = weight_of(), hessian_of() * 2.0**-20  # small inputs: an absolute stand-in for H_ii would show
    dead = torch.zeros(NUM_COLUMNS, dtype=torch.bool)
    dead[[0, 13, 14, 49]] = True
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    grid = fit_grid(weight, number, PER_CHANNEL)
    found = gptq(weight, hessian, grid, act_order=act_order)
    assert bool((found.dequantize()[:, dead] == 0).all())
    live = Grid(
        format=number,
        granularity=PER_CHANNEL,
        in_features=int((~dead).sum()),
        scale=grid.scale,
        zero_point=grid.zero_point,
    )
    alone = gptq(weight[:, ~dead], hessian[~dead][:, ~dead], live, act_order=act_order)
    assert torch.equal(found.codes[:, ~dead], alone.codes)


@EVERY_OTHER_GRID
def test_dead_columns_become_the_level_next_to_zero(kind: str) -> None:
    weight, hessian = weight_of(), hessian_of()
    dead = [0, 13, 49]
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    grid = other_grid(kind, weight)
    zeros = torch.zeros(NUM_ROWS, NUM_COLUMNS)
    assert torch.equal(gptq(weight, hessian, grid).codes[:, dead], grid.quantize(zeros)[:, dead])


def test_inputs_that_are_all_dead_give_zero() -> None:
    weight = weight_of()
    zeros = torch.zeros(NUM_COLUMNS, NUM_COLUMNS, dtype=torch.float64)
    found = gptq(weight, zeros, fit_grid(weight, UINT3, RAGGED))
    assert torch.equal(found.dequantize(), torch.zeros(NUM_ROWS, NUM_COLUMNS))


@pytest.mark.parametrize("dead", [[], [3]])
def test_the_unit_of_the_inputs_does_not_matter(dead: list[int]) -> None:
    weight, hessian = weight_of(), hessian_of()
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    grid = fit_grid(weight, INT3, RAGGED)
    expected = gptq(weight, hessian, grid).codes
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(gptq(weight, hessian * factor, grid).codes, expected)


def test_stacked_rows_are_solved_as_if_alone() -> None:
    """q, k and v share one Hessian and are solved as one weight."""
    hessian = hessian_of()
    weights = [weight_of(seed, rows) for seed, rows in ((1, 4), (2, 1), (3, 9))]
    grid = fit_grid(torch.cat(weights), UINT3, RAGGED)
    stacked = gptq(torch.cat(weights), hessian, grid)
    first = 0
    for weight in weights:
        end = first + weight.shape[0]
        alone = gptq(weight, hessian, fit_grid(weight, UINT3, RAGGED))
        assert torch.equal(stacked.rows(first, end).codes, alone.codes)
        assert torch.equal(stacked.rows(first, end).dequantize(), alone.dequantize())
        first = end


@EVERY_OTHER_GRID
def test_stacked_rows_are_solved_as_if_alone_on_every_kind_of_grid(kind: str) -> None:
    weight, hessian = weight_of(num_rows=12), hessian_of()
    grid = other_grid(kind, weight)
    stacked = gptq(weight, hessian, grid)
    for first, end in ((0, 4), (4, 12)):
        alone = gptq(weight[first:end], hessian, grid.rows(first, end))
        assert torch.equal(stacked.rows(first, end).codes, alone.codes)
        assert torch.equal(stacked.rows(first, end).dequantize(), alone.dequantize())


@pytest.mark.parametrize("num_tokens", [1, 7, NUM_COLUMNS - 1])
def test_fewer_tokens_than_inputs(num_tokens: int) -> None:
    """The Hessian is singular; damping alone makes it invertible."""
    weight, hessian = weight_of(), hessian_of(num_tokens=num_tokens)
    assert int(torch.linalg.matrix_rank(hessian)) == num_tokens
    grid = fit_grid(weight, INT3, RAGGED)
    found = gptq(weight, hessian, grid, act_order=False)
    assert torch.equal(found.codes, naive_obq(weight, hessian, grid))
    assert loss(weight, found.dequantize(), hessian) < loss(weight, rtn(weight, grid).dequantize(), hessian)


def indefinite(smallest: float) -> Tensor:
    """A Hessian of mean diagonal about 1 whose smallest eigenvalue is `smallest`; no inputs have one below 0."""
    hessian = torch.eye(NUM_COLUMNS, dtype=torch.float64)
    hessian[2, 5] = hessian[5, 2] = 1 - smallest
    return hessian


def test_damping_grows_until_there_is_a_factor() -> None:
    weight = weight_of()
    grid = fit_grid(weight, INT3, RAGGED)
    found = gptq(weight, indefinite(-0.055), grid, damp=0.01)
    assert torch.equal(found.codes, gptq(weight, indefinite(-0.055), grid, damp=0.06).codes)


@pytest.mark.parametrize("hessian", [indefinite(-0.5), indefinite(float("nan"))], ids=["indefinite", "nan"])
def test_no_factor_at_all(hessian: Tensor) -> None:
    weight = weight_of()
    with pytest.raises(SingularHessian, match=r"no Cholesky factor up to damp 0\.25"):
        gptq(weight, hessian, fit_grid(weight, INT3, RAGGED))


@EVERY_FORMAT
def test_nothing_given_is_modified(number: IntegerFormat) -> None:
    weight, hessian = weight_of(), hessian_of()
    hessian[4], hessian[:, 4] = 0.0, 0.0
    grid = fit_grid(weight, number, RAGGED)
    given = [weight, hessian, grid.scale, *([] if grid.zero_point is None else [grid.zero_point])]
    before = [tensor.clone() for tensor in given]
    gptq(weight, hessian, grid)
    gptq(weight, hessian, grid, act_order=False, refit=Refit(number))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def test_float32_decides_as_float64_does() -> None:
    """A decision flips where a weight lies within float32's noise (1e-5 of a step) of a border: 1 row in 2000 here."""
    weight, hessian = weight_of().float(), hessian_of()
    grid = fit_grid(weight, INT3, RAGGED)
    wide = gptq(weight.double(), hessian, grid)
    narrow = gptq(weight, hessian.float(), grid)
    assert int((wide.codes != narrow.codes).any(dim=1).sum()) <= 1
