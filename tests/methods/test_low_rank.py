"""Low-rank compensation never raises the output error of a site, in whatever floats its factors are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError
from bitwright.methods.low_rank import low_rank_addend
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.low_rank import output_error
from bitwright.numerics.ranges import fit_grid
from bitwright.options import LowRankOptions

STORED = (torch.bfloat16, torch.float16, torch.float32)


def rounded(weight: Tensor, format: str = "int3") -> Tensor:
    grid = fit_grid(weight, FORMATS[format], Granularity(kind="channel"))
    return grid.dequantize(grid.quantize(weight))


def moments_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


@settings(max_examples=100)
@given(
    rows=st.integers(1, 24), columns=st.integers(1, 24), tokens=st.integers(1, 60), rank=st.integers(1, 30),
    dtype=st.sampled_from(STORED), scale=st.sampled_from((1e-3, 1.0, 1e3)), is_diagonal=st.booleans(),
)  # fmt: skip
def test_the_output_error_never_grows(
    rows: int, columns: int, tokens: int, rank: int, dtype: torch.dtype, scale: float, is_diagonal: bool
) -> None:
    torch.manual_seed(rows * 10_000 + columns * 100 + tokens)
    weight, x = scale * torch.randn(rows, columns), torch.randn(tokens, columns) * torch.logspace(-2, 2, columns)
    coded, moments = rounded(weight), moments_of(x)
    moments = moments.diagonal() if is_diagonal else moments
    addend = low_rank_addend(weight, coded, rank, moments=moments, dtype=dtype)
    if addend is not None:
        assert addend.a.dtype == addend.b.dtype == dtype
        error = weight.double() - coded
        assert output_error(error - addend.product(), moments) < output_error(error, moments)


def test_it_takes_most_where_the_inputs_move_along_few_directions() -> None:
    weight, x = torch.randn(48, 64), torch.randn(500, 4) @ torch.randn(4, 64) + 0.01 * torch.randn(500, 64)
    coded, moments = rounded(weight), moments_of(x)
    error = weight.double() - coded
    addends = [
        low_rank_addend(weight, coded, 4, moments=given, dtype=torch.bfloat16)
        for given in (moments, moments.diagonal(), None)
    ]
    left = [output_error(error - addend.product(), moments) for addend in addends if addend is not None]
    assert left[0] < 0.01 * output_error(error, moments)
    assert left[0] < 0.1 * min(left[1:]), "knowing how inputs go together is what helps"


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_full_rank_leaves_nothing_but_rounding(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), torch.randn(100, shape[1])
    coded = rounded(weight)
    error = weight.double() - coded
    for dtype in STORED:
        addend = low_rank_addend(weight, coded, min(shape), moments=moments_of(x), dtype=dtype)
        assert addend is not None
        # Each of 12 products is off by two roundings, relative to factors that are not larger than |E| together.
        bound = 2 * min(shape) * torch.finfo(dtype).eps * float(error.norm())
        assert float((error - addend.product()).norm()) <= bound


def test_rounding_of_the_factors_costs_next_to_nothing() -> None:
    """Which is why A is not solved for again once B is rounded."""
    weight, x = torch.randn(64, 96), torch.randn(400, 96) * torch.logspace(-1, 1, 96)
    coded, moments = rounded(weight), moments_of(x)
    error = weight.double() - coded
    exact, stored = (
        low_rank_addend(weight, coded, 16, moments=moments, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact is not None
    assert stored is not None
    left = [output_error(error - addend.product(), moments) for addend in (exact, stored)]
    taken = output_error(error, moments) - left[0]
    assert left[1] - left[0] < 2 * torch.finfo(torch.bfloat16).eps ** 2 * taken


def test_where_nothing_is_lacking_nothing_is_added() -> None:
    weight = torch.randn(6, 8)
    assert low_rank_addend(weight, weight, 4, moments=None, dtype=torch.bfloat16) is None


def test_no_rank_and_other_shapes_are_refused() -> None:
    with pytest.raises(RecipeError, match="rank 0 adds nothing"):
        low_rank_addend(torch.ones(4, 4), torch.zeros(4, 4), 0, moments=None, dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match=r"low_rank\.rank must be at least 1, got 0"):
        LowRankOptions(rank=0)
    with pytest.raises(ShapeError, match=r"weight \[4, 4\] and coded \[4, 5\] must be alike"):
        low_rank_addend(torch.ones(4, 4), torch.zeros(4, 5), 1, moments=None, dtype=torch.bfloat16)
