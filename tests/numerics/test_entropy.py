import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import entropy

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.entropy import (
    allocation_gain_db,
    code_entropy,
    gaussian_distortion,
    gaussian_rate,
    ideal_bits_per_weight,
    integer_allocation,
    reverse_water_filling,
)

# A few dozen float64 operations on numbers up to 100.
ROUNDOFF = 1e-12

EXPONENTS = st.lists(st.floats(-12, 12), min_size=1, max_size=7)
COUNTS = st.lists(st.integers(1, 1000), min_size=7, max_size=7)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def distortion(variances: torch.Tensor, counts: torch.Tensor, bits: torch.Tensor) -> float:
    return float((variances * counts * torch.pow(4.0, -bits.double())).sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_entropy_of_known_distributions(dtype: torch.dtype) -> None:
    def codes(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    assert code_entropy(codes(5, 5, 5)) == 0
    assert math.copysign(1, code_entropy(codes(5))) == 1
    assert code_entropy(codes(0, 1, 2, 3).repeat(7).reshape(2, 14)) == 2
    assert code_entropy(codes(*[0] * 4, *[1] * 2, 2, 7)) == 1.75
    assert code_entropy(codes(0, 1, 2)) == pytest.approx(math.log2(3), rel=ROUNDOFF)


def test_entropy_of_signed_codes_and_of_views() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    assert code_entropy(codes) == 8
    assert code_entropy(codes.reshape(16, 16).T[::2]) == 7


def test_entropy_equals_scipy() -> None:
    codes = (torch.randn(3, 1000) * 2).round().clamp(-8, 7).to(torch.int8)
    _, counts = np.unique(codes.numpy(), return_counts=True)
    assert code_entropy(codes) == pytest.approx(float(entropy(counts, base=2)), rel=ROUNDOFF)


def test_uniform_rounding_of_gaussians_is_a_quarter_bit_from_the_bound() -> None:
    # Fine steps, the condition of the law; codes of 8 bits reach 8 standard deviations. Quantiles leave no chance.
    n, step = 2**20, 1 / 16
    sample = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    codes = (sample / step).round().to(torch.int8)
    mse = float((sample - codes * step).square().mean())
    assert code_entropy(codes) - gaussian_rate(1.0, mse) == pytest.approx(math.log2(math.pi * math.e / 6) / 2, abs=1e-3)


def test_metadata_adds_to_the_ideal_bits() -> None:
    codes = torch.tensor([[0, 1, 2, 3]] * 16, dtype=torch.uint8)
    assert ideal_bits_per_weight(codes, 32) == 2.5


def test_wrong_codes_are_refused() -> None:
    with pytest.raises(ShapeError, match="no codes"):
        code_entropy(torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(VerificationError, match=r"uint8 or int8, not torch\.int32"):
        code_entropy(torch.zeros(3, dtype=torch.int32))


@given(variance=st.floats(1e-6, 1e6), bits=st.floats(0, 16))
def test_rate_and_distortion_are_inverse(variance: float, bits: float) -> None:
    assert gaussian_rate(variance, gaussian_distortion(variance, bits)) == pytest.approx(bits, abs=ROUNDOFF)


def test_rate_distortion_facts() -> None:
    assert gaussian_rate(4.0, 1.0) == 1
    assert gaussian_rate(1.0, 2.0) == gaussian_rate(0.0, 2.0) == 0
    assert gaussian_distortion(3.0, 0.0) == 3
    assert gaussian_distortion(16.0, 2.0) == 1
    for call in (
        lambda: gaussian_rate(1.0, 0.0),
        lambda: gaussian_rate(-1.0, 1.0),
        lambda: gaussian_distortion(1.0, -1.0),
        lambda: gaussian_distortion(-1.0, 1.0),
    ):
        with pytest.raises(RecipeError, match="entropy: needs"):
            call()


@given(exponents=EXPONENTS, counts=COUNTS, mean_bits=st.floats(0, 10))
def test_water_filling_meets_the_conditions_of_the_optimum(
    exponents: list[float], counts: list[int], mean_bits: float
) -> None:
    variances, sizes = torch.pow(2.0, doubles(*exponents)), doubles(*counts[: len(exponents)])
    bits = reverse_water_filling(variances, sizes, mean_bits)
    assert (bits >= 0).all()
    assert float((sizes * bits).sum() / sizes.sum()) == pytest.approx(mean_bits, abs=1e-10)
    # Kuhn and Tucker: one level of distortion for the active sources, and no source above it.
    remaining = (variances * torch.pow(4.0, -bits)).log2()
    active = bits > 0
    assert bool(active.any()) or mean_bits < 1e-10
    assert (remaining[active] >= remaining.max() - 1e-10).all()


@pytest.mark.parametrize("mean_bits", [0.3, 1.0, 2.5])
def test_water_filling_equals_numerical_minimisation(mean_bits: float) -> None:
    variances, counts = doubles(9.0, 0.02, 1.0, 0.3, 2.5), doubles(1, 4, 2, 3, 1)
    shares, total = counts.numpy(), float(counts.sum())
    found = minimize(
        lambda bits: float((variances.numpy() * shares * 4.0**-bits).sum()),
        np.full(5, mean_bits),
        bounds=[(0, None)] * 5,
        constraints={"type": "eq", "fun": lambda bits: float(shares @ bits) - mean_bits * total},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success
    bits = reverse_water_filling(variances, counts, mean_bits)
    # Flat at the optimum: an objective within 1e-10 allows arguments within its root.
    assert distortion(variances, counts, bits) == pytest.approx(found.fun, rel=1e-8)
    torch.testing.assert_close(bits, torch.from_numpy(found.x), rtol=0, atol=1e-4)


def test_water_filling_by_hand() -> None:
    # All active: half the log of the variance over the geometric mean, 4. Then the smallest drowns.
    bits = reverse_water_filling(doubles(16, 4, 1), doubles(1, 1, 1), 2.0)
    torch.testing.assert_close(bits, doubles(3, 2, 1), rtol=0, atol=ROUNDOFF)
    bits = reverse_water_filling(doubles(16, 4, 0), doubles(1, 1, 2), 0.75)
    torch.testing.assert_close(bits, doubles(2, 1, 0), rtol=0, atol=ROUNDOFF)
    assert reverse_water_filling(doubles(16, 16, 1), doubles(1, 5, 1), 0.0).tolist() == [0, 0, 0]


@given(
    exponents=st.lists(st.floats(-6, 6), min_size=1, max_size=4), mean_bits=st.sampled_from([0.0, 0.7, 1.5, 2.0, 3.9])
)
def test_integer_allocation_is_optimal_for_equal_counts(exponents: list[float], mean_bits: float) -> None:
    variances, counts = torch.pow(2.0, doubles(*exponents)), torch.full((len(exponents),), 12.0)
    choices = range(5)
    bits = integer_allocation(variances, counts, mean_bits, choices=choices)
    assert bits.dtype == torch.int64
    assert float(bits.double().mean()) <= mean_bits + ROUNDOFF
    least = min(
        distortion(variances, counts, doubles(*candidate))
        for candidate in itertools.product(choices, repeat=len(exponents))
        if sum(candidate) <= mean_bits * len(exponents) + ROUNDOFF
    )
    assert distortion(variances, counts, bits) == pytest.approx(least, rel=ROUNDOFF)


@given(
    exponents=st.lists(st.floats(-6, 6), min_size=2, max_size=4),
    counts=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    mean_bits=st.floats(2, 8),
)
def test_integer_allocation_loses_at_most_one_upgrade(
    exponents: list[float], counts: list[int], mean_bits: float
) -> None:
    choices = (8, 2, 3, 4)
    variances, sizes = torch.pow(2.0, doubles(*exponents)), doubles(*counts[: len(exponents)])
    budget = mean_bits * float(sizes.sum())
    bits = integer_allocation(variances, sizes, mean_bits, choices=choices)
    assert set(bits.tolist()) <= set(choices)
    assert float((sizes * bits).sum()) <= budget * (1 + ROUNDOFF)
    # The greedy order is the best use of real bits until an upgrade is passed over. What is lost is at most the budget
    # left at that moment, less than one upgrade, times the saving per bit, which is among those still open.
    largest_cost = 4 * float(sizes.max())
    following = {2: 3, 3: 4, 4: 8}
    savings = [
        float(variance) * (4.0**-now - 4.0 ** -following[now]) / (following[now] - now)
        for variance, now in zip(variances, bits.tolist(), strict=True)
        if now in following
    ]
    assert not savings or budget - float((sizes * bits).sum()) < largest_cost
    least = min(
        distortion(variances, sizes, doubles(*candidate))
        for candidate in itertools.product(choices, repeat=len(exponents))
        if float((sizes * doubles(*candidate)).sum()) <= budget
    )
    lost = max(savings, default=0.0) * largest_cost
    assert distortion(variances, sizes, bits) <= least * (1 + ROUNDOFF) + lost


def test_integer_allocation_by_hand() -> None:
    # After its first upgrade the second of the large source costs 10 of 1 left; the small source's first one fits.
    bits = integer_allocation(doubles(64, 1), doubles(10, 1), 1.0)
    assert bits.tolist() == [1, 1]
    # 49 times 1/49 is less than 1 in float64, but the budget of one bit is met.
    assert integer_allocation(torch.ones(49), torch.ones(49), 1 / 49).sum() == 1
    # Without its first upgrade a source cannot have its cheap second one.
    assert integer_allocation(doubles(1, 1), doubles(1, 1), 1.5, choices=(0, 4, 5)).tolist() == [0, 0]
    # Three bits for the first source save 2.46; one bit for each of the others saves 3 times 0.9.
    bits = integer_allocation(doubles(10, 1.2, 1.2, 1.2), torch.ones(4), 1.0, choices=(0, 1, 4))
    assert bits.tolist() == [1, 1, 1, 1]
    # No bits for a source without variance, whatever the budget.
    assert integer_allocation(doubles(4, 0), doubles(1, 1), 8.0, choices=(0, 2, 4)).tolist() == [4, 0]


def test_integers_lose_little_against_real_bits() -> None:
    variances, counts = torch.rand(200, dtype=torch.float64) ** 4 + 1e-3, torch.randint(1, 50, (200,))
    real = distortion(variances, counts, reverse_water_filling(variances, counts, 3.0))
    whole = distortion(variances, counts, integer_allocation(variances, counts, 3.0))
    uniform = distortion(variances, counts, torch.full((200,), 3.0))
    assert real < whole < uniform


@given(exponents=EXPONENTS, counts=COUNTS)
def test_gain_is_arithmetic_over_geometric_mean_when_all_are_active(exponents: list[float], counts: list[int]) -> None:
    variances, sizes = torch.pow(2.0, doubles(*exponents)), doubles(*counts[: len(exponents)])
    shares = sizes / sizes.sum()
    ratio = float((shares * variances).sum()) / 2 ** float((shares * variances.log2()).sum())
    # 25 bits lift every variance of this test above the level.
    assert allocation_gain_db(variances, sizes, 25.0) == pytest.approx(10 * math.log10(ratio), abs=1e-9)
    assert 0 <= allocation_gain_db(variances, sizes, 0.5) <= 10 * math.log10(ratio) + 1e-9


def test_gain_of_equal_sources_is_zero() -> None:
    assert allocation_gain_db(doubles(3, 3, 3), doubles(1, 2, 3), 2.0) == pytest.approx(0, abs=1e-9)
    assert allocation_gain_db(doubles(3, 1), doubles(1, 2), 0.0) == 0


ALLOCATORS = pytest.mark.parametrize("allocate", [reverse_water_filling, integer_allocation, allocation_gain_db])


@ALLOCATORS
def test_wrong_sources_are_refused(allocate) -> None:
    one = doubles(1)
    for variances, counts in ((doubles(1, 2), one), (doubles(), doubles()), (one.reshape(1, 1), one.reshape(1, 1))):
        with pytest.raises(ShapeError, match="two equally long vectors"):
            allocate(variances, counts, 2.0)
    for variances in (doubles(-1, 1), doubles(math.nan, 1), doubles(math.inf, 1), doubles(0, 0)):
        with pytest.raises(VerificationError, match="finite, not negative and not all 0"):
            allocate(variances, doubles(1, 1), 2.0)
    for count in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(VerificationError, match="counts must be finite and positive"):
            allocate(one, doubles(count), 2.0)
    for mean_bits in (-1.0, math.inf, math.nan):
        with pytest.raises(RecipeError, match="mean_bits must be finite and not negative"):
            allocate(one, one, mean_bits)


@pytest.mark.parametrize("choices", [(), (-1, 4), (3, 4)])
def test_choices_that_do_not_fit_the_budget_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match=r"do not fit a budget of 2\.5 bits per sample"):
        integer_allocation(doubles(1, 2), doubles(1, 1), 2.5, choices=choices)
