import pytest
import torch

from bitwright.errors import RecipeError
from bitwright.numerics import level_ranges, ternary
from bitwright.numerics.block_scales import E8M0Scale, Fp8Scale
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.ranges import RangeMethod, fit_grid
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.ternary import BinaryFormat, TernaryFormat

TERNARY, BINARY = TernaryFormat(), BinaryFormat()
OPTIMAL: dict[TernaryFormat | BinaryFormat, RangeMethod] = {
    TERNARY: level_ranges.optimal_ternary,
    BINARY: level_ranges.optimal_binary,
}
EVERY_FORMAT = pytest.mark.parametrize("format", list(OPTIMAL), ids=lambda f: f.name)
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=32),
    Granularity(kind="group", group_size=24),
    Granularity(kind="block", group_size=24, block_rows=3),
    Granularity(kind="columns", group_size=24),
]
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: f"{g.kind}{g.group_size or ''}")
FLOAT32 = FloatScale(torch.float32)
# Largest relative distance of a stored scale to the ideal one: half the distance of neighbours; a power of two is
# farthest from 1.5 times itself.
SCALES: dict[ScaleFormat, float] = {
    FLOAT32: 2.0**-24,
    FloatScale(torch.bfloat16): 2.0**-8,
    FloatScale(torch.float16): 2.0**-11,
    Fp8Scale(): 2.0**-4,
    E8M0Scale(): 1 / 3,
}
EVERY_SCALE = pytest.mark.parametrize("scale", list(SCALES), ids=lambda s: s.name)

# Relative error of a float32 product and difference, squared by the norm, against the energy of the weights.
FLOAT32_ROUNDOFF = 8 * 2.0**-24


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces per scale, and several chunks of rows, from a small weight."""
    monkeypatch.setattr("bitwright.numerics.granularity.CHUNK_ELEMENTS_CPU", 600)


def heavy(num_rows: int, num_columns: int) -> torch.Tensor:
    x = torch.randn(num_rows, num_columns)
    return x * x.abs() * torch.logspace(-1, 1, num_rows).unsqueeze(1)


def importance_of(num_columns: int) -> torch.Tensor:
    return torch.rand(num_columns) ** 6 * 50


def sums(squares: torch.Tensor, granularity: Granularity, importance: torch.Tensor | None) -> torch.Tensor:
    """Weighted sums per group [R, G] in float64."""
    return granularity.split(squares.double() * (1.0 if importance is None else importance.double())).sum(-1)


def loss(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    squares = (weight.double() - grid.fake_quantize(weight).double()).square()
    return sums(squares, grid.granularity, importance)


def groups_of(
    weight: torch.Tensor, granularity: Granularity, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, importance (0 for padding) and counts, all weights of a scale in one row."""
    ones = torch.ones_like(weight, dtype=torch.float64)
    masses = granularity.split(ones if importance is None else ones * importance.double())
    return granularity.split(weight.double()), masses, granularity.split(ones).sum(-1)


@EVERY_FORMAT
@EVERY_GRANULARITY
@EVERY_SCALE
@pytest.mark.parametrize("weighted", [False, True])
def test_the_stored_scale_is_as_good_as_its_rounding_allows(
    format: TernaryFormat | BinaryFormat, granularity: Granularity, scale: ScaleFormat, weighted: bool
) -> None:
    weight, importance = heavy(13, 100), importance_of(100) if weighted else None
    grid = fit_grid(weight, format, granularity, method=OPTIMAL[format], importance=importance, scale=scale)
    groups, masses, counts = groups_of(weight, granularity, importance)
    if format is TERNARY:
        best = ternary.optimal_ternary([groups], masses)
    else:
        best = ternary.optimal_binary([groups], counts, masses)
    residual = groups - format.snap(groups / best.unsqueeze(-1), None) * best.unsqueeze(-1)
    least, energy = (masses * residual.square()).sum(-1), (masses * groups.square()).sum(-1)
    # With the same assignment a scale off by d costs d² Σ h more, and a² Σ h is the explained part of the energy.
    allowed = least + SCALES[scale] ** 2 * (energy - least) + FLOAT32_ROUNDOFF * energy
    assert (loss(weight, grid, importance) <= allowed).all()


@EVERY_FORMAT
@EVERY_GRANULARITY
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_never_worse_than_any_other_method(
    format: TernaryFormat | BinaryFormat, granularity: Granularity, weighted: bool
) -> None:
    weight, importance = heavy(13, 100), importance_of(100) if weighted else None
    methods = ["minmax", "mse", level_ranges.absmean] + ([level_ranges.twn] if format is TERNARY else [])
    others = [
        loss(weight, fit_grid(weight, format, granularity, method=method, importance=importance), importance)
        for method in methods
    ]
    grid = fit_grid(weight, format, granularity, method=OPTIMAL[format], importance=importance)
    optimal, slack = loss(weight, grid, importance), FLOAT32_ROUNDOFF * sums(weight.square(), granularity, importance)
    for other in others:
        assert (optimal <= other + slack).all()
    assert (optimal < others[0] * 0.9).any()
    assert (optimal < others[1]).any()


@EVERY_GRANULARITY
def test_the_published_rules_ignore_the_importance(granularity: Granularity) -> None:
    weight = heavy(13, 100)
    groups, _, counts = groups_of(weight, granularity, None)
    magnitudes = groups.abs()
    mean = magnitudes.sum(-1) / counts
    above = magnitudes > 0.7 * mean.unsqueeze(-1)
    expected = {
        level_ranges.absmean: mean,
        level_ranges.twn: (magnitudes * above).sum(-1) / above.sum(-1),
    }
    for method, scale in expected.items():
        for importance in (None, importance_of(100)):
            grid = fit_grid(weight, TERNARY, granularity, method=method, importance=importance)
            torch.testing.assert_close(grid.scale, scale.float(), rtol=2.0**-23, atol=0)


@EVERY_FORMAT
@EVERY_SCALE
def test_zeros_stay_zeros_as_far_as_the_format_allows(format: TernaryFormat | BinaryFormat, scale: ScaleFormat) -> None:
    weight = torch.stack([torch.zeros(8), torch.randn(8)])
    for method in (OPTIMAL[format], level_ranges.absmean):
        grid = fit_grid(weight, format, Granularity(kind="channel"), method=method, scale=scale)
        values = grid.fake_quantize(weight)
        if format is TERNARY:
            assert not values[0].any()
        else:
            # The smallest scale: a subnormal float16, or 2^-9 below the 448 of the largest FP8.
            assert values[0].abs().max() <= max(2.0**-24, 2.0**-17 * float(weight.abs().max()))
        assert values[1].any()


def test_formats_with_other_levels_are_refused() -> None:
    weight = torch.randn(2, 8)
    refused = [
        (level_ranges.absmean, IntegerFormat(bits=2, symmetric=True), "places binary or ternary levels and cannot"),
        (level_ranges.twn, BINARY, "twn: places ternary levels and cannot fit binary. Use the range method mse."),
        (level_ranges.optimal_ternary, IntegerFormat(bits=2, symmetric=False), "cannot fit uint2"),
        (level_ranges.optimal_binary, TERNARY, "optimal-binary: places binary levels and cannot fit ternary"),
    ]
    for method, format, message in refused:
        with pytest.raises(RecipeError, match=message):
            fit_grid(weight, format, Granularity(kind="channel"), method=method)


def test_two_bits_without_their_fourth_code_are_ternary() -> None:
    weight, channel = heavy(4, 32), Granularity(kind="channel")
    restricted = IntegerFormat(bits=2, symmetric=True, full_range=False)
    grids = [fit_grid(weight, format, channel, method=level_ranges.optimal_ternary) for format in (restricted, TERNARY)]
    assert torch.equal(grids[0].fake_quantize(weight), grids[1].fake_quantize(weight))
