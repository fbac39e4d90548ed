"""A site's histogram counts every weight once, and its levels are numbers that the grid can give."""

from typing import Any

import pytest
import torch

from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import FLOAT32, fit_grid
from bitwright.site_histogram import MAX_LEVELS, NUM_BINS, site_histogram, typical_levels

SHARED = (
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=16),
    Granularity(kind="block", group_size=16, block_rows=4),
)
FEW = [name for name in FORMATS.names if FORMATS[name].num_codes <= MAX_LEVELS]


def fitted(weight: torch.Tensor, name: str, granularity: Granularity) -> QTensor:
    grid: Any = fit(weight, FORMATS[name], granularity, method="minmax", importance=None, scale=FLOAT32)
    return QTensor(codes=grid.quantize(weight), grid=grid)


@pytest.mark.parametrize("granularity", SHARED, ids=lambda granularity: granularity.kind)
@pytest.mark.parametrize("name", FEW)
def test_levels_are_those_of_one_group(name: str, granularity: Granularity) -> None:
    weight = torch.randn(10, 40)
    quantized = fitted(weight, name, granularity)
    levels = typical_levels(quantized.grid)
    assert levels is not None
    assert list(levels) == sorted(set(levels))
    assert len(levels) <= FORMATS[name].num_codes
    groups = granularity.split(quantized.dequantize()).flatten(0, 1).tolist()
    assert any(set(group) <= {*levels, 0.0} for group in groups), "padding is 0"


def test_a_uniform_grid_has_all_its_levels_at_equal_steps() -> None:
    format = IntegerFormat(bits=4, symmetric=True)
    grid = fit_grid(torch.randn(4, 32), format, Granularity(kind="tensor"), method="minmax")
    levels = typical_levels(grid)
    assert levels is not None
    assert len(levels) == 16
    steps = torch.tensor(levels).diff() / grid.scale.abs().item()
    assert torch.allclose(steps, torch.ones(15), atol=1e-5)


def test_many_levels_are_left_out() -> None:
    assert typical_levels(fitted(torch.randn(4, 32), "int8", Granularity(kind="channel")).grid) is None


def test_every_weight_is_counted_once_and_outliers_in_the_end_bins() -> None:
    weight = torch.randn(300, 1000)
    weight[0, 0], weight[7, 3], weight[7, 4] = 1000.0, -900.0, -950.0
    found = site_histogram(weight, fitted(weight, "int4", Granularity(kind="group", group_size=100)))
    assert found is not None
    assert len(found.counts) == NUM_BINS
    assert sum(found.counts) == weight.numel()
    assert -900.0 < found.low < found.high < 1000.0
    assert (found.counts[0], found.counts[-1]) == (2, 1)


def test_without_outliers_the_ends_are_those_of_the_weights() -> None:
    weight = torch.linspace(-0.25, 0.5, 640).reshape(4, 160)
    found = site_histogram(weight, fitted(weight, "int4", Granularity(kind="channel")))
    assert found is not None
    assert (found.low, found.high) == (-0.25, 0.5)
    assert max(found.counts) - min(found.counts) <= 2


def test_equal_weights_have_no_histogram() -> None:
    weight = torch.full((4, 32), 0.5)
    assert site_histogram(weight, fitted(weight, "int4", Granularity(kind="channel"))) is None


def test_a_table_per_row_gives_its_entries() -> None:
    weight, rows = torch.randn(5, 64), Granularity(kind="channel")
    grid = fit(weight, CodebookFormat(bits=2), rows, method="minmax", importance=None, scale=FLOAT32)
    levels = typical_levels(grid)
    assert levels is not None
    assert any(torch.tensor(levels).equal(row.unique()) for row in grid.codebook[:, 0].float())  # type: ignore[attr-defined]
