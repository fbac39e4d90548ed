"""A learned table against its start, against uniform levels, and against its definition."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import LearnedTableFormat
from bitwright.numerics.formats import FORMATS, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.learned_table import fit_learned_table, table_format
from bitwright.numerics.nested import NestedScale
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.table import TABLES, TableFormat, normal_float

FLOAT32, BFLOAT16 = FloatScale(torch.float32), FloatScale(torch.bfloat16)
EVERY_WIDTH = pytest.mark.parametrize("bits", [2, 3, 4])
GROUPS = Granularity(kind="group", group_size=64)
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    GROUPS,
    Granularity(kind="group", group_size=50),  # with a ragged tail
    Granularity(kind="block", group_size=50, block_rows=5),
    Granularity(kind="columns", group_size=50),
]
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: f"{g.kind}{g.group_size or ''}")
Sample = Callable[..., Tensor]
SUM_ROUNDOFF = 2.0**-14  # of a float32 residual, squared and summed


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape)


def laplace(*shape: int) -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample(torch.Size(shape))


def skewed(*shape: int) -> Tensor:
    return torch.randn(*shape).exp() - 0.3


EVERY_DISTRIBUTION = pytest.mark.parametrize("sample", [gaussian, laplace, skewed], ids=lambda f: f.__name__)


def loss(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> float:
    squares = (weight.double() - grid.fake_quantize(weight.float()).double()).square()
    return float((squares if importance is None else squares * importance.double()).sum())


def learned(
    weight: Tensor, bits: int, granularity: Granularity, importance: Tensor | None = None, scale: ScaleFormat = FLOAT32
) -> Grid:
    return fit_learned_table(weight, LearnedTableFormat(bits=bits), granularity, importance=importance, scale=scale)


@EVERY_WIDTH
@EVERY_GRANULARITY
@pytest.mark.parametrize(("sample", "weighted"), [(gaussian, False), (laplace, True), (skewed, True)])
def test_never_worse_than_normal_float(bits: int, granularity: Granularity, sample: Sample, weighted: bool) -> None:
    weight = sample(12, 130)
    importance = torch.rand(130) ** 4 if weighted else None
    start = fit_grid(weight, normal_float(bits), granularity, method="mse", importance=importance)
    found = learned(weight, bits, granularity, importance)
    assert loss(weight, found, importance) <= loss(weight, start, importance) * (1 + SUM_ROUNDOFF)


@EVERY_WIDTH
@EVERY_DISTRIBUTION
@pytest.mark.parametrize("weighted", [False, True])
def test_beats_uniform_and_fixed_levels_of_the_same_size(bits: int, sample: Sample, weighted: bool) -> None:
    """With as many bits and as many scales; a zero point would cost more."""
    weight = sample(64, 256)
    importance = torch.rand(256) ** 4 if weighted else None
    found = loss(weight, learned(weight, bits, GROUPS, importance), importance)
    for name in (f"int{bits}", f"nf{bits}"):
        fixed = fit_grid(weight, cast(LevelFormat, FORMATS[name]), GROUPS, method="mse", importance=importance)
        assert found < 0.97 * loss(weight, fixed, importance)


@EVERY_WIDTH
def test_importance_counts(bits: int) -> None:
    weight = laplace(64, 256)
    weight[:, ::2] = weight[:, ::2].abs()  # columns whose levels are others
    importance = torch.ones(256)
    importance[1::2] = 0.001
    with_it, without = learned(weight, bits, GROUPS, importance), learned(weight, bits, GROUPS)
    assert loss(weight, with_it, importance) < 0.9 * loss(weight, without, importance)
    assert loss(weight, without) < loss(weight, with_it)
    assert with_it.format != without.format


def test_the_unit_of_the_importance_does_not_matter_and_none_at_all_is_all_alike() -> None:
    weight, importance = gaussian(16, 128), torch.rand(128)
    expected = learned(weight, 3, GROUPS, importance)
    for factor in (2.0**-100, 2.0**100):
        found = learned(weight, 3, GROUPS, importance * factor)
        assert found.format == expected.format
        assert torch.equal(found.scale, expected.scale)
    alike = [learned(weight, 3, GROUPS, given) for given in (None, torch.ones(128), torch.zeros(128))]
    assert all(grid.format == alike[0].format and torch.equal(grid.scale, alike[0].scale) for grid in alike)


@pytest.mark.parametrize("exponent", [-110, 110])
def test_the_unit_of_the_weights_does_not_matter(exponent: int) -> None:
    weight = gaussian(16, 128)
    expected, found = learned(weight, 3, GROUPS), learned(weight * 2.0**exponent, 3, GROUPS)
    assert found.format == expected.format
    assert torch.equal(found.scale, expected.scale * 2.0**exponent)


def test_clipped_weights_draw_the_outermost_level_with_their_own_value() -> None:
    """Each group has one large weight of two kinds; the shared table must find the places of both."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([-0.25, -0.1, 0.1, 1.0])[torch.randint(4, (32, 128), generator=generator)]
    grid = learned(weight, 2, Granularity(kind="tensor"))
    assert loss(weight, grid) < 1e-10 * float(weight.square().sum())
    levels = torch.tensor(grid.format.values) * float(grid.scale)
    torch.testing.assert_close(levels.sort().values, torch.tensor([-0.25, -0.1, 0.1, 1.0]), rtol=1e-5, atol=0)


@EVERY_WIDTH
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [FLOAT32, BFLOAT16, NestedScale()], ids=lambda s: s.name)
def test_weights_on_one_side_of_zero(bits: int, sign: int, scale: ScaleFormat) -> None:
    """Normal float wastes half of its levels on them."""
    weight = sign * (gaussian(16, 128).abs() + 0.1)
    start = fit_grid(weight, normal_float(bits), GROUPS, method="mse", scale=scale)
    assert loss(weight, learned(weight, bits, GROUPS, scale=scale)) < 0.6 * loss(weight, start)


@EVERY_WIDTH
def test_what_is_learned_is_a_table_under_its_own_name(bits: int) -> None:
    for weight in (gaussian(8, 64), torch.zeros(8, 64), torch.full((8, 64), -0.3)):
        grid = learned(weight, bits, GROUPS, scale=BFLOAT16)
        assert isinstance(grid.format, TableFormat)
        assert grid.format.name == FORMATS[f"lut{bits}"].name
        assert grid.format not in TABLES, "also where nothing was better than the start, which is then stored"
        assert grid.scale.dtype == torch.bfloat16
        assert grid.num_metadata_bits == 8 * 16 + 2**bits * 32
        stored = torch.tensor(grid.format.values, dtype=torch.float32)
        assert table_format(bits, stored) == grid.format


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = gaussian(24, 128), torch.rand(128)
    for granularity in GRANULARITIES:
        whole = learned(weight, 3, granularity, importance)
        with monkeypatch.context() as patch:
            patch.setattr("bitwright.numerics.granularity.CHUNK_ELEMENTS_CPU", 700)
            found = learned(weight, 3, granularity, importance)
        # Sums over other chunks round differently, which moves a level by its last digits.
        levels = [torch.tensor(cast(TableFormat, grid.format).values) for grid in (whole, found)]
        torch.testing.assert_close(*levels, rtol=1e-5, atol=1e-6)
        assert loss(weight, found, importance) == pytest.approx(loss(weight, whole, importance), rel=1e-4)


def test_nothing_given_is_modified_and_other_arguments_are_refused() -> None:
    weight, importance = gaussian(4, 64), torch.rand(64)
    before = weight.clone(), importance.clone()
    learned(weight, 3, GROUPS, importance)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])
    half = learned(weight.bfloat16(), 3, GROUPS)
    exact = learned(weight.bfloat16().float(), 3, GROUPS)
    assert half.format == exact.format
    with pytest.raises(RecipeError, match="bits must be 2 to 4, not 5"):
        learned(weight, 5, GROUPS)
    with pytest.raises(ShapeError, match="one per column"):
        learned(weight, 3, GROUPS, torch.rand(63))
    with pytest.raises(VerificationError, match="negative"):
        learned(weight, 3, GROUPS, -importance)
