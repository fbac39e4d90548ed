"""Hadamard matrices are orthogonal at every size that can be built, and the fast transform is the product with them.

Tolerances: a product of length n in a dtype of precision eps is off by at most n · eps · |x|·|h|, and |h| = 1.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import ShapeError
from bitwright.numerics.hadamard import hadamard, hadamard_matrix, largest_hadamard_factor, random_hadamard

LARGEST = 1024
CORES = (12, 20, 24, 28, 36, 40, 44, 52, 60, 76, 92, 108, 140, 156, 172)
SIZES = [size for size in range(1, LARGEST + 1) if largest_hadamard_factor(size) == size]
SMALL_SIZES = [size for size in SIZES if size <= 180]
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounding(size: int, wide: torch.dtype) -> float:
    """Bound on the relative error of a transform: entries, then sums of `size` terms."""
    return (size + 2) * torch.finfo(wide).eps


def test_which_sizes_can_be_built() -> None:
    assert set(CORES) <= set(SIZES)
    assert [size for size in SIZES if size < 4] == [1, 2]
    assert all(size % 4 == 0 for size in SIZES if size > 2)
    assert [size for size in range(4, 256, 4) if size not in SIZES] == [116, 188, 232, 236]
    assert {size for size in SIZES if 2 * size <= LARGEST} <= {size // 2 for size in SIZES}, "doubling always works"


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal_and_entries_alike(size: int) -> None:
    matrix = hadamard_matrix(size, dtype=torch.float64)
    signs = (matrix * math.sqrt(size)).round()
    assert torch.equal(signs.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, signs / math.sqrt(size), rtol=2 * torch.finfo(torch.float64).eps, atol=0)
    assert hadamard_matrix(size).dtype == torch.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_the_fast_transform_is_the_product_with_the_matrix(size: int, transpose: bool) -> None:
    x = torch.randn(3, size, dtype=torch.float64, generator=generator(size))
    matrix = hadamard_matrix(size, dtype=torch.float64)
    expected = x @ (matrix.T if transpose else matrix)
    atol = 2 * rounding(size, torch.float64) * float(x.norm(dim=-1).max())
    torch.testing.assert_close(hadamard(x, transpose=transpose), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [64, 4096, 5120, 11008, 13824, 14336, 18944])
def test_large_sizes_of_models(size: int) -> None:
    x = torch.randn(2, size, generator=generator(), dtype=torch.float64)
    y = hadamard(x)
    bound = rounding(size, torch.float64) * x.norm(dim=-1)
    assert bool(((y.norm(dim=-1) - x.norm(dim=-1)).abs() <= bound).all())
    assert bool(((hadamard(y, transpose=True) - x).abs().amax(-1) <= 2 * bound).all())


@EVERY_DTYPE
@given(size=st.sampled_from(SMALL_SIZES), num_blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_blocks_are_transformed_each_for_itself(dtype: torch.dtype, size: int, num_blocks: int, seed: int) -> None:
    x = torch.randn(2, 3, size * num_blocks, generator=generator(seed)).to(dtype)
    found = hadamard(x, block=size)
    assert found.dtype == dtype
    assert found.shape == x.shape
    each = torch.cat([hadamard(part) for part in x.split(size, dim=-1)], dim=-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # The same sums in an order that may differ, and one rounding to the dtype.
    slack = 2 * rounding(size, wide) * float(x.double().norm(dim=-1).max())
    torch.testing.assert_close(found, each, rtol=torch.finfo(dtype).eps, atol=slack)


@EVERY_DTYPE
@given(size=st.sampled_from(SMALL_SIZES), seed=st.integers(0, 99), transpose=st.booleans())
def test_norms_are_kept(dtype: torch.dtype, size: int, seed: int, transpose: bool) -> None:
    x = torch.randn(4, size, generator=generator(seed)).to(dtype)
    before, after = (each.double().norm(dim=-1) for each in (x, hadamard(x, transpose=transpose)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Each entry is off by `rounding`, hence the vector by sqrt(size) as much, and is rounded once more to the dtype.
    bound = math.sqrt(size) * rounding(size, wide) + torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert bool(((after - before).abs() <= bound * before + torch.finfo(dtype).tiny).all())


@EVERY_DTYPE
@given(
    shape=st.sampled_from([(12, None), (24, 12), (64, None), (64, 16), (84, 28), (172, None), (172, 4), (188, 4)]),
    seed=st.integers(0, 99),
    transpose=st.booleans(),
)
def test_rotating_weights_and_inputs_alike_changes_no_product(
    dtype: torch.dtype, shape: tuple[int, int | None], seed: int, transpose: bool
) -> None:
    size, block = shape
    x = torch.randn(5, size, generator=generator(seed)).to(dtype)
    weight = torch.randn(3, size, generator=generator(seed + 1)).to(dtype)
    expected = x.double() @ weight.double().T
    rotated = [hadamard(each, block=block, transpose=transpose).double() for each in (x, weight)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    each = math.sqrt(size) * rounding(size, wide) + torch.finfo(dtype).eps
    bound = (2 * each + each**2 + rounding(size, torch.float64)) * x.double().norm(dim=-1)[:, None]
    difference = rotated[0] @ rotated[1].T - expected
    assert bool((difference.abs() <= bound * weight.double().norm(dim=-1)).all())


def test_an_outlier_is_spread_evenly() -> None:
    for size in CORES:
        x = torch.zeros(1, size)
        x[0, 5] = 3.0
        torch.testing.assert_close(hadamard(x).abs(), torch.full((1, size), 3 / math.sqrt(size)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2, 28, 64, 172])
def test_random_signs_stand_before_the_matrix(size: int) -> None:
    found = random_hadamard(size, generator(7), dtype=torch.float64)
    matrix = hadamard_matrix(size, dtype=torch.float64)
    signs = torch.sign(found[:, 0] * matrix[:, 0])
    assert torch.equal(found, signs[:, None] * matrix)
    assert torch.equal(random_hadamard(size, generator(7), dtype=torch.float64), found), "the same for the same seed"
    assert random_hadamard(size, generator(7)).dtype == torch.float32
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=size * 2.0**-52)


def test_seeds_give_different_magnitudes() -> None:
    x = torch.randn(1, 64, generator=generator())
    results = [x @ random_hadamard(64, generator(seed)) for seed in range(3)]
    assert not torch.allclose(results[0].abs(), results[1].abs())
    assert not torch.allclose(results[1].abs(), results[2].abs())


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 1), (7, 1), (94, 2), (188, 4), (172, 172), (11008, 11008), (4 * 29, 4), (16 * 29, 464), (8 * 47, 8)],
)
def test_largest_factor(size: int, expected: int) -> None:
    assert largest_hadamard_factor(size) == expected
    x = torch.randn(2, size, dtype=torch.float64)
    restored = hadamard(hadamard(x, block=expected), block=expected, transpose=True)
    atol = 4 * rounding(size, torch.float64) * float(x.norm(dim=-1).max())
    torch.testing.assert_close(restored, x, rtol=0, atol=atol)


def test_gradients_are_rotated_back() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 24, dtype=torch.float64)
    (hadamard(x) * upstream).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, hadamard(upstream, transpose=True), rtol=0, atol=1e-13)


def test_nothing_given_is_modified_and_strides_do_not_matter() -> None:
    x = torch.randn(24, 6)
    before = x.clone()
    torch.testing.assert_close(hadamard(x.T), hadamard(x.T.contiguous()), rtol=0, atol=0)
    assert torch.equal(x, before)
    assert hadamard(x.T[:0]).shape == (0, 24)
    hadamard_matrix(28).zero_()
    assert bool((hadamard_matrix(28) != 0).all()), "the cache is not handed out"


@pytest.mark.parametrize(
    ("x", "block", "message"),
    [
        (torch.zeros(2, 188), None, r"size 188 can be built. Use block=4"),
        (torch.zeros(2, 30), None, r"size 30 can be built. Use block=2"),
        (torch.zeros(2, 64), 24, r"blocks of 24 do not divide the 64 columns of inputs \[2, 64\]"),
        (torch.zeros(2, 64), 0, "blocks of 0 do not divide"),
        (torch.zeros(2, 0), None, "do not divide the 0 columns"),
        (torch.zeros(()), None, "do not divide the 0 columns"),
    ],
)
def test_impossible_sizes_are_refused(x: Tensor, block: int | None, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        hadamard(x, block=block)


@pytest.mark.parametrize("size", [-4, 0, 3, 116])
def test_impossible_matrices_are_refused(size: int) -> None:
    with pytest.raises(ShapeError, match=f"size {size} can be built|must be positive, not {size}"):
        hadamard_matrix(size)
