import itertools
import math

import pytest
import torch
from scipy.integrate import quad

from bitwright.errors import RecipeError, VerificationError
from bitwright.numerics import lloyd_max
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, UNIFORM, Distribution
from bitwright.numerics.lloyd_max import MAX_BITS, optimal_levels

# Max 1960, table I: positive levels and MSE. The printed digits of the MSE are good to about 5 in 10^4.
PUBLISHED = {
    1: ((0.7979,), 0.3634),
    2: ((0.4528, 1.510), 0.1175),
    3: ((0.2451, 0.7560, 1.344, 2.152), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), 0.009497),
}
DISTRIBUTIONS = (GAUSSIAN, LAPLACE, UNIFORM)
# Distances from the fixed point: step at the end times the number of steps, generously.
TOLERANCE = 1e-9


def mse(distribution: Distribution, levels: list[float]) -> float:
    """The error of a table, from the moments of its nearest-level cells."""
    borders = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    cells = [distribution.moments(a, b) for a, b in itertools.pairwise(borders)]
    return math.fsum(c.second - 2 * y * c.first + y * y * c.mass for y, c in zip(levels, cells, strict=True))


@pytest.mark.parametrize("bits", PUBLISHED)
def test_reproduces_the_published_gaussian_tables(bits: int) -> None:
    published, published_mse = PUBLISHED[bits]
    result = optimal_levels(GAUSSIAN, bits)
    assert len(result.levels) == 2**bits
    # Four digits are printed, the last of which is sometimes one too large.
    assert list(result.levels[2 ** (bits - 1) :]) == pytest.approx(published, rel=5e-4, abs=1e-4)
    assert result.mse == pytest.approx(published_mse, rel=5e-4)


def test_no_table_reaches_the_error_printed_for_sixteen_levels() -> None:
    levels, printed = PUBLISHED[4]
    both = [-y for y in reversed(levels)] + list(levels)
    assert printed < optimal_levels(GAUSSIAN, 4).mse <= mse(GAUSSIAN, both)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.name)
@pytest.mark.parametrize("bits", range(1, 5))
def test_every_level_is_the_mean_of_its_cell(distribution: Distribution, bits: int) -> None:
    levels = optimal_levels(distribution, bits).levels[2 ** (bits - 1) :]
    borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), distribution.support]
    for level, (low, high) in zip(levels, itertools.pairwise(borders), strict=True):
        mass = quad(distribution.density, low, high, epsabs=1e-12)[0]
        first = quad(lambda x: x * distribution.density(x), low, high, epsabs=1e-12)[0]
        assert level == pytest.approx(first / mass, abs=1e-8)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.name)
@pytest.mark.parametrize("bits", range(1, MAX_BITS))
def test_the_error_is_that_of_the_levels_and_a_minimum(distribution: Distribution, bits: int) -> None:
    result = optimal_levels(distribution, bits)
    assert result.mse == pytest.approx(mse(distribution, list(result.levels)), rel=TOLERANCE)
    assert list(result.levels) == sorted(result.levels)
    assert list(result.levels) == [-y for y in reversed(result.levels)]
    generator = torch.Generator().manual_seed(bits)
    for _ in range(20):
        shifts = torch.randn(2**bits, generator=generator, dtype=torch.float64) * 0.01 * 2.0**-bits
        moved = [level + shift for level, shift in zip(result.levels, shifts.tolist(), strict=True)]
        assert mse(distribution, moved) > result.mse


def test_is_the_uniform_grid_for_the_uniform_distribution() -> None:
    for bits in range(1, MAX_BITS + 1):
        result = optimal_levels(UNIFORM, bits)
        step = 2 * UNIFORM.support / 2**bits
        expected = [(i + 0.5) * step - UNIFORM.support for i in range(2**bits)]
        # The slowest mode shrinks by about 4^-bits per step.
        assert list(result.levels) == pytest.approx(expected, abs=TOLERANCE * 4 ** (bits - 3))
        assert result.mse == pytest.approx(step**2 / 12, rel=1e-8)


@pytest.mark.parametrize("bits", [0, 7])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits must be 1 to 6, not {bits}"):
        optimal_levels(GAUSSIAN, bits)


def test_levels_that_still_move_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd_max, "_MAX_STEPS", 3)
    with pytest.raises(VerificationError, match="gaussian, 4 bits: moves after 3 steps"):
        optimal_levels(GAUSSIAN, 4)
