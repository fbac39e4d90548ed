"""The gain of a mix over a uniform scheme: no allocation of bits beats it, and it is reached."""

import math

import numpy as np
import pytest

from bitwright.errors import RecipeError
from bitwright.search.bound import water_filling


def loss(losses: np.ndarray, bits: np.ndarray) -> float:
    return float((losses * 4.0**-bits).sum())


def test_no_allocation_of_the_same_bits_beats_it_and_one_reaches_it() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.integers(1, 1000, 6)
        losses = generator.lognormal(0, 2, 6)
        found = water_filling(losses.tolist(), counts.tolist())
        for _ in range(20):
            bits = generator.normal(0, 1, 6)
            bits -= (bits * counts).sum() / counts.sum()
            assert loss(losses, bits) >= found.share * losses.sum() * (1 - 1e-9)
        best = 0.5 * np.log2(losses / counts)
        best -= (best * counts).sum() / counts.sum()
        assert loss(losses, best) == pytest.approx(found.share * losses.sum(), rel=1e-9)
        assert loss(losses, best - found.saved_bits) == pytest.approx(losses.sum(), rel=1e-9)


def test_weights_that_lose_alike_gain_nothing() -> None:
    found = water_filling([1.0, 2.0, 4.0], [10, 20, 40])
    assert math.isclose(found.share, 1.0)
    assert math.isclose(found.saved_bits, 0.0, abs_tol=1e-12)


def test_items_that_lose_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="lose something"):
        water_filling([0.0, 1.0], [1, 1])
