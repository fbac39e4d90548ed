"""Ranges where the scale is not a float, where 0 is no level, and where a table's ends differ."""

from dataclasses import replace
from typing import cast

import pytest
import torch

from bitwright.errors import RecipeError
from bitwright.numerics.block_scales import E8M0Scale, Fp8Scale
from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.formats import FORMATS, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.nested import NestedScale
from bitwright.numerics.ranges import FLOAT_FACTORS, RANGE_METHODS, SHRINK_FACTORS, fit_grid, store_scale
from bitwright.numerics.scales import MIN_SCALE, FloatScale, ScaleFormat
from bitwright.numerics.table import TableFormat

LEVELS = {name: cast(LevelFormat, FORMATS[name]) for name in FORMATS if not isinstance(FORMATS[name], CodebookFormat)}
COVERING = ["minmax", "mse", "percentile"]
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=24),
    Granularity(kind="block", group_size=24, block_rows=2),
    Granularity(kind="columns", group_size=24),
]
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
CHANNEL = Granularity(kind="channel")

# Errors are summed in float32 along a group: relative roundoff of a few hundred terms.
SUM_ROUNDOFF = 512 * 2.0**-24


def heavy(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Rows with outliers, of different sizes and with different means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_columns, generator=generator)
    x = x * x.abs() * torch.logspace(-3, 1, num_rows).unsqueeze(1)
    return x + 0.3 * x.std(1, keepdim=True)


def importance_of(num_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_columns, generator=torch.Generator().manual_seed(seed)) ** 6 * 50


def loss(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error per group in float64, by the definition."""
    squares = (weight.double() - grid.fake_quantize(weight.float()).double()).square()
    if importance is not None:
        squares = squares * importance.double()
    return grid.granularity.split(squares).sum(-1)


def assert_no_worse(first: torch.Tensor, second: torch.Tensor) -> None:
    assert (first <= second * (1 + SUM_ROUNDOFF)).all()


def test_the_names_in_recipes() -> None:
    assert list(RANGE_METHODS) == ["absmean", "minmax", "mse", "percentile", "twn"]


@pytest.mark.parametrize(("method", "names"), [("absmean", {"ternary", "binary"}), ("twn", {"ternary"})])
def test_methods_that_place_levels_refuse_other_formats(method: str, names: set[str]) -> None:
    weight = heavy(3, 30)
    for name, format in LEVELS.items():
        if name in names:
            assert fit_grid(weight, format, CHANNEL, method=method).scale.isfinite().all()
            continue
        with pytest.raises(RecipeError, match=f"{method}: places .* cannot fit {name}. Use the range method mse"):
            fit_grid(weight, format, CHANNEL, method=method)


WITHOUT_ZERO = [name for name, format in LEVELS.items() if format.symmetric and format.snap(torch.zeros(1), None) != 0]
ZERO_GROUP_SCALES: list[ScaleFormat] = [*map(FloatScale, MIN_SCALE), E8M0Scale(), Fp8Scale(), NestedScale()]


@pytest.mark.parametrize("name", WITHOUT_ZERO)
@pytest.mark.parametrize("method", COVERING)
@pytest.mark.parametrize("scale", ZERO_GROUP_SCALES, ids=lambda s: s.name)
def test_a_group_of_zeros_gets_the_smallest_scale_where_zero_is_no_level(
    name: str, method: str, scale: ScaleFormat
) -> None:
    weight = torch.zeros(3, 48)
    weight[0] = torch.linspace(-1, 1, 48)
    format = LEVELS[name]
    grid = fit_grid(weight, format, Granularity(kind="group", group_size=24), method=method, scale=scale)
    bound = scale.bind(torch.tensor(1 / format.max_value, dtype=torch.float64))
    smallest = bound.round(torch.full((2, 2), 1e-300, dtype=torch.float64))
    assert torch.equal(grid.scale[1:], smallest)
    assert float(smallest.abs().max()) <= 1 / 448 / 100
    assert (grid.scale[0].abs() > 100 * smallest[0]).all()


@pytest.mark.parametrize("name", ["int4", "uint4", "nf4", "fp4-e2m1", "ternary"])
@pytest.mark.parametrize("method", COVERING)
def test_a_group_of_zeros_stays_zero_where_zero_is_a_level(name: str, method: str) -> None:
    grid = fit_grid(torch.zeros(2, 48), LEVELS[name], CHANNEL, method=method)
    assert torch.equal(grid.scale, torch.ones(2, 1))
    assert torch.equal(grid.fake_quantize(torch.zeros(2, 48)), torch.zeros(2, 48))


@pytest.mark.parametrize("name", ["binary", "lloyd2-gaussian", "int4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_padding_carries_no_weight(name: str, weighted: bool) -> None:
    """A ragged group is fitted as if it were a whole one, also where the padding's 0 is no level and would cost."""
    weight, importance = heavy(5, 58), importance_of(58) + 0.1 if weighted else None
    tail_importance = None if importance is None else importance[48:]
    format = LEVELS[name]
    for kind in ("group", "columns"):
        grid = fit_grid(weight, format, Granularity(kind=kind, group_size=24), method="mse", importance=importance)
        whole = CHANNEL if kind == "group" else Granularity(kind="tensor")
        tail = fit_grid(weight[:, 48:], format, whole, method="mse", importance=tail_importance)
        assert torch.equal(grid.scale[:, 2:], tail.scale)
    tiles = fit_grid(
        weight, format, Granularity(kind="block", group_size=24, block_rows=3), method="mse", importance=importance
    )
    corner = fit_grid(weight[3:, 48:], format, Granularity(kind="tensor"), method="mse", importance=tail_importance)
    assert torch.equal(tiles.scale[1:, 2:], corner.scale)


@pytest.mark.parametrize("name", ["fp4-e2m1", "nf4", "ternary", "fp8-e4m3"])
@pytest.mark.parametrize("scale", [E8M0Scale(), Fp8Scale()], ids=lambda s: s.name)
@pytest.mark.parametrize("method", COVERING)
@EVERY_GRANULARITY
def test_quantized_scales_are_the_ones_that_are_searched_and_stored(
    name: str, scale: ScaleFormat, method: str, granularity: Granularity
) -> None:
    weight = heavy(6, 48)
    grid = fit_grid(weight, LEVELS[name], granularity, method=method, scale=scale)
    assert grid.stored is not None
    assert torch.equal(grid.stored.values(), grid.scale)
    assert torch.equal(scale.load(grid.stored.tensors()).values(), grid.scale)
    if method != "mse":
        return
    # The best of all candidates, each rounded as it will be stored before its error is measured.
    largest = (weight.abs().max() / LEVELS[name].max_value).double()
    bound = scale.bind(largest)
    reach = granularity.split(weight.abs()).amax(-1).double() / LEVELS[name].max_value
    candidates = [replace(grid, scale=bound.round(reach * f), stored=None) for f in bound.factors or FLOAT_FACTORS]
    if name not in ("fp4-e2m1", "fp8-e4m3"):
        candidates = candidates[: len(SHRINK_FACTORS)]
    best = torch.stack([loss(weight, candidate) for candidate in candidates]).amin(0)
    torch.testing.assert_close(loss(weight, grid), best, rtol=SUM_ROUNDOFF, atol=0)


@pytest.mark.parametrize("name", ["fp4-e2m1", "fp6-e2m3", "fp6-e3m2", "fp8-e4m3"])
def test_the_largest_weight_of_floats_may_become_a_smaller_level(name: str) -> None:
    """A block whose values lie on the levels of twice the scale is exact there; the covering scale misses them."""
    format = LEVELS[name]
    levels = torch.tensor([4.0, 3.0, 2.0, -1.5, 0.0, 1.0, -0.5])
    for unit in (1.0, 0.007, 31.0):
        weight = (levels * unit)[None]
        found, covering = (fit_grid(weight, format, CHANNEL, method=method) for method in ("mse", "minmax"))
        assert float(loss(weight, found)) < 0.05 * float(loss(weight, covering))


def test_nested_scales_are_stored_afterwards_and_cover_the_whole_weight() -> None:
    weight, granularity = heavy(6, 48), Granularity(kind="group", group_size=8)
    grid = fit_grid(weight, LEVELS["nf4"], granularity, scale=NestedScale())
    assert grid.stored is None
    assert (grid.scale > 0).all()
    stored = store_scale(grid, NestedScale())
    assert stored.stored is not None
    assert torch.equal(stored.stored.values(), stored.scale)
    assert not torch.equal(stored.scale, grid.scale)
    assert torch.equal(store_scale(grid, FloatScale(torch.float32)).scale, grid.scale)


@pytest.mark.parametrize("levels", [(-1.0, -0.5, -0.1, 0.2), (-1.0, -0.6, -0.3, -0.1), (0.1, 0.3, 0.6, 1.0)])
@pytest.mark.parametrize("signed", [True, False])
def test_tables_with_uneven_ends(levels: tuple[float, ...], signed: bool) -> None:
    """A learned table may reach farther on one side, or lie on one side of 0 altogether: the farther end counts."""
    format = TableFormat(name="uneven", values=tuple(torch.tensor(levels).tolist()))
    scales = torch.tensor([[0.01], [3.0], [500.0]])
    weight = scales * torch.tensor(levels * 6)
    grid = fit_grid(weight, format, CHANNEL, method="mse", scale=FloatScale(torch.float32) if signed else NestedScale())
    assert_no_worse(loss(weight, grid), 1e-12 * weight.square().sum(1, keepdim=True).double())
    if signed:
        # Turned round, the same table serves with negative scales.
        turned = fit_grid(-weight, format, CHANNEL, method="mse")
        assert_no_worse(loss(-weight, turned), 1e-12 * weight.square().sum(1, keepdim=True).double())
        assert (turned.scale < 0).all()
