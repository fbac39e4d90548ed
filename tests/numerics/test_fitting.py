"""Every row of `FORMATS` fits and quantizes every weight that is finite, and refuses those that are not."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import FORMATS, Format
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.kmeans import fit_codebook
from bitwright.numerics.level_ranges import optimal_binary, optimal_ternary
from bitwright.numerics.nested import NestedScale
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import MIN_SCALE, FloatScale, ScaleFormat

EVERY_FORMAT = pytest.mark.parametrize("format", [FORMATS[name] for name in FORMATS], ids=list(FORMATS))
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=12),
    Granularity(kind="block", group_size=12, block_rows=2),
    Granularity(kind="columns", group_size=12),
]
CHANNEL, FLOAT32 = Granularity(kind="channel"), FloatScale(torch.float32)


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape) * torch.logspace(-2, 1, shape[0]).unsqueeze(1)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: rows_of(4, 24),
    "ragged": lambda: rows_of(5, 29),
    "one": lambda: torch.tensor([[-0.37]]),
    "one column": lambda: rows_of(5, 1),
    "one row": lambda: rows_of(1, 30),
    "zeros": lambda: torch.zeros(3, 26),
    "a row of zeros": lambda: rows_of(4, 24) * torch.tensor([[1.0], [0.0], [1.0], [0.0]]),
    "constant": lambda: torch.full((3, 26), 0.37),
    "negative constant": lambda: torch.full((3, 26), -0.37),
    "one value among zeros": lambda: torch.eye(3, 26) * -5,
    "positive": lambda: rows_of(4, 24).abs(),
    "negative": lambda: -rows_of(4, 24).abs(),
    "denormal": lambda: rows_of(4, 24) * 2.0**-130,
    "tiny": lambda: rows_of(4, 24) * 2.0**-60,
    "huge": lambda: rows_of(4, 24) * 2.0**60,
    "mixed": lambda: rows_of(4, 24) * torch.tensor([[2.0**-100], [1.0], [0.0], [2.0**60]]),
    "bfloat16": lambda: rows_of(4, 24).bfloat16(),
    "strided": lambda: rows_of(24, 4).T,
}


# Every format with every weight, and every granularity with both; all three together would take minutes.
EVERY_WEIGHT = [
    pytest.param(FORMATS[format], granularity, name, id=f"{format}-{granularity.kind}-{name}")
    for (i, format), (j, name) in itertools.product(enumerate(FORMATS), enumerate(WEIGHTS))
    for granularity in [GRANULARITIES[(i + j) % len(GRANULARITIES)]]
]


# Every format, with a granularity in turn.
EVERY_PAIR = pytest.mark.parametrize(
    ("format", "granularity"),
    [
        pytest.param(FORMATS[name], granularity, id=f"{name}-{granularity.kind}")
        for name, granularity in zip(FORMATS, itertools.cycle(GRANULARITIES))
    ],
)


def fitted(weight: Tensor, format: Format, granularity: Granularity, method: str = "mse") -> AnyGrid:
    return fit(weight, format, granularity, method=method, importance=None, scale=FLOAT32)


def smallest_gap(format: Format) -> float:
    """An upper bound of what is lost, as a fraction of the largest magnitude of a group, whatever the weights.

    Levels of a b-bit format over both signs leave gaps of less than the largest magnitude, except that full ranges and
    one-sided data reach it; nothing is ever farther than its own magnitude plus the smallest level.
    """
    return 2.0 if format.num_codes <= 4 else 1.0


@pytest.mark.parametrize(("format", "granularity", "name"), EVERY_WEIGHT)
def test_every_weight_is_fitted_and_quantized(format: Format, granularity: Granularity, name: str) -> None:
    weight = WEIGHTS[name]()
    before = weight.clone()
    grid = fitted(weight, format, granularity)
    assert grid.format.num_codes == format.num_codes
    assert grid.granularity == granularity
    assert grid.fits(weight.shape[0])
    result = QTensor(codes=grid.quantize(weight), grid=grid)
    values = result.dequantize()
    assert values.isfinite().all()
    error, magnitudes = (values - weight.float()).abs(), granularity.split(weight.float()).abs()
    largest = granularity.join(magnitudes.amax(-1, keepdim=True).expand_as(magnitudes), *weight.shape)
    tiny = 16 * torch.finfo(torch.float32).tiny
    assert bool((error <= smallest_gap(format) * largest + tiny).all())
    # What is on the grid stays where it is; two entries of a table may be the same number.
    assert torch.equal(grid.fake_quantize(values), values)
    assert torch.equal(weight, before)
    for j in range(weight.shape[1]):
        codes, column = grid.rounder(j, len(weight))(weight.float()[:, j])
        assert torch.equal(codes, result.codes[:, j])
        assert torch.equal(column, values[:, j])


@EVERY_PAIR
def test_a_weight_of_few_values_is_exact(format: Format, granularity: Granularity) -> None:
    """±a is within reach of every format, and a alone of those without a 0."""
    weight = torch.tensor([[0.5, -0.5, 0.5, 0.5, -0.5] * 5]).expand(4, 25)
    if format.symmetric:
        values = fitted(weight, format, granularity).fake_quantize(weight)
        torch.testing.assert_close(values, weight, rtol=2.0**-22, atol=0)
    constant = weight.abs()
    torch.testing.assert_close(
        fitted(constant, format, granularity).fake_quantize(constant), constant, rtol=2.0**-22, atol=0
    )


@EVERY_PAIR
def test_mse_is_no_worse_than_minmax(format: Format, granularity: Granularity) -> None:
    weight = rows_of(5, 29)
    mse, minmax = (
        granularity.split(
            (fitted(weight, format, granularity, method).fake_quantize(weight) - weight).double().square()
        )
        for method in ("mse", "minmax")
    )
    assert bool((mse.sum(-1) <= minmax.sum(-1) * (1 + 64 * 2.0**-24)).all())


@EVERY_FORMAT
def test_importance_counts(format: Format) -> None:
    weight, importance = torch.randn(6, 64), torch.rand(64) ** 6
    kinds = [CHANNEL, Granularity(kind="group", group_size=32)]
    for granularity in kinds:
        grids = [
            fit(weight, format, granularity, method="mse", importance=given, scale=FLOAT32)
            for given in (importance, None)
        ]
        with_it, without = (
            float(((grid.fake_quantize(weight) - weight).square() * importance).sum()) for grid in grids
        )
        # Eight bits over a group of 32 leave next to nothing to gain.
        assert with_it <= without * (1 + 64 * 2.0**-24)
        assert with_it < without or format.bits > 6


@EVERY_PAIR
def test_weights_that_are_not_finite_are_refused(format: Format, granularity: Granularity) -> None:
    weight = rows_of(4, 30)
    grid = fitted(weight, format, granularity)
    for value in (torch.nan, torch.inf, -torch.inf):
        weight[3, 29] = value
        with pytest.raises(VerificationError, match="NaN or Inf"):
            fitted(weight, format, granularity)
        with pytest.raises(VerificationError, match="NaN or Inf"):
            grid.quantize(weight)


@EVERY_FORMAT
def test_scales_beyond_float16_are_refused(format: Format) -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.5]]) * 2.0**80
    with pytest.raises(RecipeError, match="exceeds 65504"):
        fit(weight, format, CHANNEL, method="mse", importance=None, scale=FloatScale(torch.float16))
    for dtype in (torch.bfloat16, torch.float32):
        grid = fit(weight, format, CHANNEL, method="mse", importance=None, scale=FloatScale(dtype))
        assert grid.fake_quantize(weight).isfinite().all()


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", list(MIN_SCALE), ids=str)
def test_plain_scales_are_stored_in_their_dtype(format: Format, dtype: torch.dtype) -> None:
    grid = fit(rows_of(4, 24), format, CHANNEL, method="mse", importance=None, scale=FloatScale(dtype))
    assert (grid.codebook if isinstance(grid, CodebookGrid) else grid.scale).dtype == dtype


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("kmeans")])
@pytest.mark.parametrize("scale", ["e8m0", "e4m3", "nested"])
def test_codebooks_have_no_scales_to_quantize(name: str, scale: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: its tables are stored as plain floats, not as {scale}"):
        fit(rows_of(2, 8), FORMATS[name], CHANNEL, method="mse", importance=None, scale=SCALE_FORMATS[scale])


@pytest.mark.parametrize(
    "scale", [FLOAT32, SCALE_FORMATS["e8m0"], SCALE_FORMATS["e4m3"], NestedScale()], ids=lambda s: s.name
)
def test_who_fits_what(scale: ScaleFormat) -> None:
    weight, granularity = rows_of(4, 24), Granularity(kind="group", group_size=12)
    importance = torch.rand(24) + 0.1

    def grid(name: str, method: str = "mse") -> Grid:
        found = fit(weight, FORMATS[name], granularity, method=method, importance=importance, scale=scale)
        assert isinstance(found, Grid)
        return found

    for name, closed_form in (("ternary", optimal_ternary), ("binary", optimal_binary)):
        format = grid(name).format
        expected = fit_grid(weight, format, granularity, method=closed_form, importance=importance, scale=scale)
        assert torch.equal(grid(name).scale, expected.scale)
        absmean = fit_grid(weight, format, granularity, method="absmean", scale=scale)
        assert torch.equal(grid(name, "absmean").scale, absmean.scale)
    plain = fit_grid(weight, grid("int4").format, granularity, method="mse", importance=importance, scale=scale)
    assert torch.equal(grid("int4").scale, plain.scale)
    assert grid("lut4").format.name == "lut4"


def test_codebooks_take_an_importance_per_weight() -> None:
    weight, importance = rows_of(4, 64), torch.rand(4, 64)
    found = fit(weight, FORMATS["kmeans3"], CHANNEL, method="mse", importance=importance, scale=FLOAT32)
    expected = fit_codebook(weight, CodebookFormat(bits=3), CHANNEL, importance=importance)
    assert isinstance(found, CodebookGrid)
    assert torch.equal(found.codebook, expected.codebook)
    with pytest.raises(ShapeError, match="one per column"):
        fit(weight, LearnedTableFormat(bits=3), CHANNEL, method="mse", importance=importance, scale=FLOAT32)
