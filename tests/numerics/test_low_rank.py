"""The nearest matrix of low rank is the textbook's, takes error away from every input, and leaves nothing at full rank.

Legend: O out features, I in features.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.low_rank import LowRank, factor_shapes, nearest_low_rank, output_error

SHAPES = [(24, 32), (32, 24), (16, 16), (1, 9), (9, 1)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
EPS = torch.finfo(torch.float32).eps


def moments_of_inputs(size: int) -> Tensor:
    x = torch.randn(4 * size, size) * torch.logspace(-1, 1, size)
    return x.T @ x / len(x)


def textbook(error: Tensor, rank: int, moments: Tensor) -> Tensor:
    """SVD_r(E R^½) R^-½."""
    values, vectors = torch.linalg.eigh(moments.double())
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    left, singular, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ inverse


@EVERY_SHAPE
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("rank", [1, 4])
def test_it_is_the_truncated_svd_of_the_whitened_error(shape: tuple[int, int], kind: str, rank: int) -> None:
    error, full = torch.randn(shape), moments_of_inputs(shape[1])
    moments = {"none": None, "diagonal": full.diagonal(), "full": full}[kind]
    as_matrix = {"none": torch.eye(shape[1]), "diagonal": full.diagonal().diag(), "full": full}[kind]
    expected = textbook(error, rank, as_matrix)
    # Moments smaller than 1e-8 of the largest do not occur here: what is added to all of them changes that much.
    atol = 1e-5 * float(error.norm())
    torch.testing.assert_close(
        nearest_low_rank(error, rank, moments=moments).product().double(), expected, rtol=0, atol=atol
    )


def test_without_moments_what_is_left_is_the_smaller_singular_values() -> None:
    error = torch.randn(24, 32)
    values = torch.linalg.svdvals(error.double())
    left = output_error(error - nearest_low_rank(error, 4).product())
    assert left == pytest.approx(float(values[4:].square().sum()), rel=1e-5)


@settings(max_examples=60)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), rank=st.integers(1, 22), tokens=st.integers(1, 40))
def test_no_input_gets_a_larger_error(rows: int, columns: int, rank: int, tokens: int) -> None:
    """Not even one that calibration has never seen."""
    torch.manual_seed(rows * 1000 + columns * 40 + tokens)
    error, seen, other = torch.randn(rows, columns), torch.randn(tokens, columns), torch.randn(50, columns)
    left = error - nearest_low_rank(error, rank, moments=seen.T @ seen).product()
    for x in (seen, other):
        before, after = (x @ error.T).norm(dim=1), (x @ left.T).norm(dim=1)
        assert bool((after <= before + 100 * columns * EPS * x.norm(dim=1) * error.norm()).all())


@EVERY_SHAPE
def test_more_directions_leave_less_and_all_of_them_nothing(shape: tuple[int, int]) -> None:
    error, moments = torch.randn(shape), moments_of_inputs(shape[1])
    left = [
        output_error(error - nearest_low_rank(error, rank, moments=moments).product(), moments)
        for rank in range(1, min(shape) + 1)
    ]
    assert left == sorted(left, reverse=True)
    # Rounding of the factors to float32, of which each element is a sum over the directions.
    assert left[-1] <= (min(shape) * EPS) ** 2 * output_error(error, moments) * 100
    assert nearest_low_rank(error, 100, moments=moments).rank == min(shape)


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    error, moments = torch.randn(24, 32), torch.ones(32)
    moments[5] = 0
    start = nearest_low_rank(error, 4, moments=moments)
    assert output_error(error - start.product(), moments) < output_error(error, moments)
    unseen = nearest_low_rank(error, 4, moments=torch.zeros(32)).product()
    torch.testing.assert_close(unseen, nearest_low_rank(error, 4).product())


def test_both_factors_are_of_the_same_size() -> None:
    error = torch.randn(24, 32) * torch.logspace(-4, 4, 32)
    found = nearest_low_rank(error, 4, moments=torch.logspace(4, -8, 32))
    torch.testing.assert_close(found.a.abs().amax(dim=1), found.b.abs().amax(dim=0))


def test_where_nothing_lacks_there_are_no_directions() -> None:
    found = nearest_low_rank(torch.zeros(6, 8), 4)
    assert found.rank == 0
    assert not found.product().any()
    lacking = torch.randn(6, 1) @ torch.randn(1, 8)
    assert nearest_low_rank(lacking, 4).rank == 1


def test_what_it_adds_to_outputs_is_what_it_adds_to_the_weight() -> None:
    found, x = LowRank(a=torch.randn(3, 8), b=torch.randn(6, 3)).to(torch.bfloat16), torch.randn(5, 8)
    torch.testing.assert_close(found.apply(x), x @ found.product().T)
    assert found.num_bits == 16 * 3 * (6 + 8)
    assert factor_shapes(3, 6, 8) == (tuple(found.a.shape), tuple(found.b.shape))
    assert factor_shapes(100, 6, 8) == ((6, 8), (6, 6))


def test_moments_of_other_inputs_and_nan_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"moments \[16\] must be \[32\] or \[32, 32\]"):
        nearest_low_rank(torch.zeros(24, 32), 4, moments=torch.ones(16))
    for error, moments in ((torch.full((4, 4), torch.nan), None), (torch.ones(4, 4), torch.full((4,), torch.inf))):
        with pytest.raises(VerificationError, match="NaN or Inf"):
            nearest_low_rank(error, 2, moments=moments)
