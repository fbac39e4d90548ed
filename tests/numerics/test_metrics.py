import math

import pytest
import torch

from bitwright.errors import ShapeError
from bitwright.numerics import metrics


def test_known_values() -> None:
    reference, result = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 0.5])
    assert metrics.mse(reference, result) == pytest.approx(0.25 / 3)
    assert metrics.sqnr_db(reference, result) == pytest.approx(20.0)
    assert metrics.relative_error(reference, result) == pytest.approx(0.1)


def test_limits() -> None:
    x, zero = torch.ones(2, 3), torch.zeros(2, 3)
    assert metrics.mse(x, x) == 0
    assert metrics.sqnr_db(x, x) == math.inf
    assert metrics.sqnr_db(zero, x) == -math.inf
    assert metrics.relative_error(zero, x) == math.inf
    assert metrics.relative_error(zero, zero) == 0


def test_bfloat16_and_many_rows_lose_nothing() -> None:
    x = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = (x.float() + 0.125).double()
    assert metrics.mse(x, y) == pytest.approx(0.125**2, rel=1e-5)


def test_kl_of_equal_logits_is_zero() -> None:
    logits = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)) * 20
    assert torch.equal(metrics.kl_divergence(logits, logits), torch.zeros(7, dtype=torch.float64))
    # softmax ignores a constant: only float32 rounding of the shifted logits (up to 2^-16 at 100) remains, squared.
    assert metrics.kl_divergence(logits, logits + 100).max() < 2.0**-30
    assert metrics.top1_agreement(logits, logits) == 1.0


def test_kl_matches_the_definition_and_is_not_symmetric() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert metrics.kl_divergence(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-6)
    skewed = torch.tensor([[0.9, 0.05, 0.05]])
    forward, backward = metrics.kl_divergence(p.log(), skewed.log()), metrics.kl_divergence(skewed.log(), p.log())
    assert forward.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-6)
    assert abs(forward - backward) > 0.1


def test_kl_of_tiny_and_huge_differences() -> None:
    logits = torch.zeros(1, 4)
    shifted = logits + torch.tensor([[1e-4, -1e-4, 0, 0]])
    # Second order: half the variance of the logit difference.
    assert metrics.kl_divergence(logits, shifted).item() == pytest.approx(0.5 * 0.5e-8, rel=1e-3)
    extreme = torch.tensor([[1e4, 0.0, 0.0, -1e4]])
    assert metrics.kl_divergence(extreme, -extreme).item() == pytest.approx(2e4)


def test_masked_entries_count_nothing_and_missing_mass_is_infinite() -> None:
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert metrics.kl_divergence(masked, masked).item() == 0
    assert metrics.kl_divergence(masked, torch.zeros(1, 3)).item() == pytest.approx(math.log(1.5), rel=1e-6)
    assert metrics.kl_divergence(torch.zeros(1, 3), masked).item() == math.inf


def test_top1_counts_tokens() -> None:
    p = torch.eye(4)
    assert metrics.top1_agreement(p, p[[0, 1, 3, 2]]) == 0.5


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match="cannot compare"):
        metrics.mse(torch.ones(2), torch.ones(3))
    with pytest.raises(ShapeError, match=r"must both be \[T, V\]"):
        metrics.kl_divergence(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ShapeError, match=r"must both be \[T, V\]"):
        metrics.top1_agreement(torch.ones(3), torch.ones(3))
