"""HQQ: the objective never rises, the minimum is that of a slow loop by the paper's formulas, and what is refused."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.methods.composition import check_composition
from bitwright.methods.hqq import hqq
from bitwright.methods.rtn import rtn
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import FORMATS, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.recipe import Plan, Recipe, SitePlan
from bitwright.schemes import Scheme

P = 0.7
EPS = torch.finfo(torch.float32).eps
NUM_ROWS, NUM_COLUMNS = 9, 77
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=16),  # with a ragged tail of 13
    Granularity(kind="block", group_size=16, block_rows=4),  # ragged on both sides
    Granularity(kind="columns", group_size=16),
]
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
NAMES = [name for name in FORMATS if name.startswith(("int", "uint"))]
# A residual is exact to EPS, its power and a sum of them hardly more; the same for the objective compared with.
SLACK = 8 * EPS


def heavy(shape: tuple[int, int] = (NUM_ROWS, NUM_COLUMNS), seed: int = 0, freedom: float = 3.0) -> Tensor:
    """Student's t with few degrees of freedom: mostly small weights and some very large ones."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    spread = torch.randn((*shape, round(freedom)), generator=generator).square().mean(-1).sqrt()
    return normal / spread


def grid_of(
    weight: Tensor,
    name: str,
    granularity: Granularity,
    method: str = "minmax",
    dtype: torch.dtype = torch.float32,
) -> Grid:
    format = cast(LevelFormat, FORMATS[name])
    return fit_grid(weight, format, granularity, method=method, scale=FloatScale(dtype))


def objective(weight: Tensor, result: QTensor, p: float = P) -> Tensor:
    """Σ |w - ŵ|^p of each group, by the definition."""
    errors = (weight.double() - result.dequantize().double()).abs()
    return result.grid.granularity.split(errors.pow(p)).sum(-1)


def assert_no_worse(weight: Tensor, found: QTensor, start: QTensor, p: float = P) -> None:
    assert bool((objective(weight, found, p) <= objective(weight, start, p) * (1 + SLACK)).all())


@given(
    name=st.sampled_from(NAMES),
    granularity=st.sampled_from(GRANULARITIES),
    method=st.sampled_from(["minmax", "mse", "percentile"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    p=st.floats(0.1, 1.0),
    beta=st.floats(0.01, 1000.0),
    iterations=st.integers(0, 25),
    seed=st.integers(0, 1000),
)
def test_the_objective_never_rises(
    name: str,
    granularity: Granularity,
    method: str,
    dtype: torch.dtype,
    p: float,
    beta: float,
    iterations: int,
    seed: int,
) -> None:
    weight = heavy(seed=seed, freedom=1 + seed % 4)
    grid = grid_of(weight, name, granularity, method, dtype)
    found = hqq(weight, grid, p=p, beta=beta, iterations=iterations)
    assert isinstance(found.grid, Grid)
    assert_no_worse(weight, found, rtn(weight, grid), p)
    assert (found.grid.format, found.grid.granularity) == (grid.format, grid.granularity)
    assert found.grid.scale.dtype == dtype
    assert torch.equal(found.codes, found.grid.quantize(weight)), "rounded to nearest"
    if grid.zero_point is not None:
        assert found.grid.zero_point is not None
        assert found.grid.zero_point.dtype == grid.zero_point.dtype
        assert torch.equal(found.grid.scale, grid.scale), "scales stay where zero points move"


@EVERY_GRANULARITY
@pytest.mark.parametrize("name", ["uint2-floatzero", "uint4-floatzero", "uint8-floatzero", "int2", "int4", "int8"])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_heavy_tails_gain(name: str, method: str, granularity: Granularity) -> None:
    weight = heavy((32, 128))
    grid = grid_of(weight, name, granularity, method)
    found, start = objective(weight, hqq(weight, grid)), objective(weight, rtn(weight, grid))
    assert float(found.sum()) < float(start.sum())


def test_integer_zero_points_gain_where_a_side_should_be_clipped() -> None:
    weight = heavy((64, 256), freedom=1)
    granularity = Granularity(kind="group", group_size=32)
    grid = grid_of(weight, "uint3", granularity, "mse")
    found = hqq(weight, grid)
    assert isinstance(found.grid, Grid)
    assert found.grid.zero_point is not None
    assert not torch.equal(found.grid.zero_point, cast(Tensor, grid.zero_point))
    assert float(objective(weight, found).sum()) < float(objective(weight, rtn(weight, grid)).sum())


def test_float_zero_points_gain_more_than_integers_from_the_same_start() -> None:
    weight = heavy((64, 256))
    granularity = Granularity(kind="group", group_size=64)
    integers = grid_of(weight, "uint3", granularity)
    assert integers.zero_point is not None
    format = FORMATS["uint3-floatzero"]
    floats = replace(integers, format=cast(LevelFormat, format), zero_point=integers.zero_point.half())
    totals = [float(objective(weight, hqq(weight, grid)).sum()) for grid in (floats, integers)]
    assert totals[0] < totals[1]


def naive(weight: Tensor, grid: Grid, p: float, beta: float, kappa: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The paper's loop for each group on its own, in float64 and unrounded: the best objective and its z or s."""
    objectives, moved = torch.zeros(2, *grid.scale.shape, dtype=torch.float64)
    for r in range(grid.scale.shape[0]):
        for k in range(grid.scale.shape[1]):
            w = weight.double()[r, k * 16 : (k + 1) * 16]
            s = grid.scale[r, k].double()
            z = torch.zeros(()).double() if grid.zero_point is None else grid.zero_point[r, k].double()
            low, high = grid.format.end_codes
            best, coupling = (torch.inf, torch.zeros(())), beta
            for _ in range(iterations + 1):
                q = (w / s + z).round().clamp(low, high)
                residual = w - s * (q - z)
                value = float(residual.abs().pow(p).sum())
                if value < best[0]:
                    best = (value, s if grid.zero_point is None else z)
                unit = (residual / s).abs()
                shrunk = s * (residual / s).sign() * (unit - unit.pow(p - 1) / coupling).clamp(min=0)
                if grid.zero_point is None:
                    s = (q @ (w - shrunk)) / (q @ q)
                else:
                    z = (q - (w - shrunk) / s).mean()
                coupling *= kappa
            objectives[r, k], moved[r, k] = best[0], best[1]
    return objectives, moved


@pytest.mark.parametrize("name", ["uint2-floatzero", "uint4-floatzero", "int3", "int4"])
@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_agrees_with_a_naive_loop(name: str, beta: float) -> None:
    weight = heavy((6, 64), seed=3)
    grid = grid_of(weight, name, GRANULARITIES[2])
    found = hqq(weight, grid, beta=beta, iterations=6)
    assert isinstance(found.grid, Grid)
    expected, moved = naive(weight, grid, P, beta, 1.01, 6)
    value = objective(weight, found)
    position = (found.grid.scale if grid.zero_point is None else cast(Tensor, found.grid.zero_point)).double()
    # Float32 may take another code where a weight lies between two; the zero point is rounded to float16 besides.
    close = (position - moved).abs() <= moved.abs() * torch.finfo(torch.float16).eps
    assert float(close.double().mean()) >= 0.9
    # A zero point rounded by eps moves residuals of order 1/16 or more by at most 2^bits eps steps.
    rounding = 16 * P * torch.finfo(torch.float16).eps * 2**grid.format.bits
    assert float(value.sum()) <= float(expected.sum()) * (1 + rounding)


@EVERY_GRANULARITY
@pytest.mark.parametrize("name", ["uint3-floatzero", "uint3", "int3"])
def test_chunks_leave_no_seam(name: str, granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy()
    grid = grid_of(weight, name, granularity)
    whole = hqq(weight, grid)
    monkeypatch.setattr("bitwright.numerics.granularity.CHUNK_ELEMENTS_CPU", 2 * NUM_COLUMNS)
    parts = hqq(weight, grid)
    torch.testing.assert_close(objective(weight, parts), objective(weight, whole), rtol=SLACK, atol=0)
    assert torch.equal(parts.codes, whole.codes)


@pytest.mark.parametrize("name", ["uint3-floatzero", "uint3", "int3"])
@pytest.mark.parametrize("exponent", [-60, 60])
def test_the_unit_of_the_weights_does_not_matter(name: str, exponent: int) -> None:
    weight = heavy()
    grid = grid_of(weight, name, GRANULARITIES[2])
    expected = hqq(weight, grid)
    found = hqq(weight * 2.0**exponent, replace(grid, scale=grid.scale * 2.0**exponent))
    assert torch.equal(found.codes, expected.codes)
    assert isinstance(found.grid, Grid)
    assert isinstance(expected.grid, Grid)
    assert torch.equal(found.grid.scale, expected.grid.scale * 2.0**exponent)


@EVERY_GRANULARITY
@pytest.mark.parametrize("name", NAMES)
def test_weights_on_the_grid_stay(name: str, granularity: Granularity) -> None:
    grid = grid_of(heavy(), name, granularity)
    weight = grid.fake_quantize(heavy())
    found = hqq(weight, grid)
    assert torch.equal(found.dequantize(), weight)
    zeros = torch.zeros_like(weight)
    assert torch.equal(hqq(zeros, grid_of(zeros, name, granularity)).dequantize(), zeros)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("huge", [1e30, 3e38])
def test_weights_far_outside_the_range_are_survived(name: str, huge: float) -> None:
    weight = heavy()
    grid = grid_of(weight, name, GRANULARITIES[2])
    weight[0, 0], weight[1, 20] = huge, -huge
    grid = replace(grid, scale=grid.scale * 1e-20)
    found = hqq(weight, grid)
    assert bool(torch.isfinite(found.dequantize()).all())
    others = objective(weight, found)[2:] <= objective(weight, rtn(weight, grid))[2:] * (1 + SLACK)
    assert bool(others.all())


def test_nothing_given_is_modified_and_half_precision_weights_work() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weight = heavy().to(dtype)
        for name in ("uint3-floatzero", "uint3", "int3"):
            grid = grid_of(weight, name, GRANULARITIES[2])
            tensors = [weight, grid.scale, *([] if grid.zero_point is None else [grid.zero_point])]
            before = [tensor.clone() for tensor in tensors]
            found = hqq(weight, grid)
            assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
            assert_no_worse(weight.float(), found, rtn(weight, grid))


@pytest.mark.parametrize(
    ("name", "scale"), [("kmeans4", "float32"), ("nf4", "float32"), ("fp4-e2m1", "e8m0"), ("int8", "e8m0-int8")]
)
def test_grids_without_a_scale_that_may_move_are_refused(name: str, scale: str) -> None:
    weight = heavy()
    granularity = Granularity(kind="group", group_size=16)
    grid = fit(weight, FORMATS[name], granularity, method="mse", importance=None, scale=SCALE_FORMATS[scale])
    with pytest.raises(RecipeError, match=rf"a grid of {name} lacks or stores in another way. Use rtn or gptq"):
        hqq(weight, grid)


@pytest.mark.parametrize("scheme", ["mxint8-a16", "nf4", "kmeans4", "fp8"])
def test_a_recipe_with_other_scales_or_formats_is_refused_before_any_work(scheme: str) -> None:
    for name in (scheme, "W4A16-g64-floatzero"):
        entry = SitePlan(scheme=Scheme.parse(name), group_size=None, method="hqq", reason="")
        plan = Plan(sites={"model.layers.0.mlp.down_proj": entry})
        if name == scheme:
            with pytest.raises(RecipeError, match=r"down_proj: method hqq does not work on .*moves float scales"):
                check_composition(Recipe(method="hqq"), plan)
        else:
            check_composition(Recipe(method="hqq"), plan)


@pytest.mark.parametrize(
    ("option", "value"), [("p", 0.0), ("p", 1.5), ("beta", 0.0), ("kappa", 0.9), ("iterations", -1)]
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    weight = heavy()
    with pytest.raises(RecipeError, match=f"hqq: {option} {value} is out of range"):
        hqq(weight, grid_of(weight, "uint4", GRANULARITIES[1]), **{option: value})  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_refused() -> None:
    weight = heavy()
    grid = grid_of(weight, "uint4", GRANULARITIES[1])
    with pytest.raises(ShapeError, match="does not fit this grid"):
        hqq(weight[:4], grid)
    weight[2, 3] = torch.nan
    with pytest.raises(VerificationError, match="NaN or Inf"):
        hqq(weight, grid)
