import pytest
import torch

from bitwright.errors import RecipeError, ShapeError, SingularHessian
from bitwright.numerics import linalg
from bitwright.numerics.linalg import accumulate_gram, damped_inverse_cholesky, dead_columns


def inputs(num_tokens: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(num_tokens, in_features, generator=generator)
    return mixed @ torch.randn(in_features, in_features, generator=generator)


def test_gram_is_symmetric_and_invariant_to_the_batch_split() -> None:
    x = inputs(300, 33)
    whole, split = torch.zeros(33, 33, dtype=torch.float64), torch.zeros(33, 33, dtype=torch.float64)
    accumulate_gram(whole, x)
    for batch in x.split([1, 99, 150, 50]):
        accumulate_gram(split, batch)
    assert torch.equal(whole, whole.T)
    assert torch.equal(split, split.T)
    exact = x.double().T @ x.double()
    # A float32 dot product over T terms: T units of roundoff of Σ|x_i x_j|, for either route.
    bound = 300 * 2.0**-24 * (x.double().abs().T @ x.double().abs())
    assert ((whole - exact).abs() <= bound).all()
    assert ((split - exact).abs() <= bound).all()


def test_gram_takes_half_precision_inputs() -> None:
    x = torch.full((1000, 2), 300.0, dtype=torch.float16)
    gram = torch.zeros(2, 2, dtype=torch.float64)
    accumulate_gram(gram, x)
    assert torch.equal(gram, torch.full((2, 2), 9e7, dtype=torch.float64))


def test_gram_wants_flat_inputs() -> None:
    with pytest.raises(ShapeError, match=r"flatten to \[T, I\]"):
        accumulate_gram(torch.zeros(4, 4), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [5, 200])
def test_factor_of_the_inverse(dtype: torch.dtype, num_tokens: int) -> None:
    x = inputs(num_tokens, 24).to(dtype)
    hessian = x.T @ x
    before = hessian.clone()
    factor = damped_inverse_cholesky(hessian, 0.01)
    assert torch.equal(hessian, before)
    assert factor.dtype == dtype
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    roundoff = torch.finfo(dtype).eps + torch.linalg.cond(damped) * torch.finfo(torch.float64).eps
    assert torch.linalg.norm(factor - expected) <= 24 * roundoff * torch.linalg.norm(expected)


def test_identity_is_its_own_factor() -> None:
    assert torch.equal(damped_inverse_cholesky(torch.eye(4), 0.0), torch.eye(4))


def test_damping_grows_until_the_factor_exists() -> None:
    # Eigenvalues 2.06 and -0.06, mean diagonal 1: the first damping that makes it definite is 0.07.
    hessian = torch.tensor([[1.0, 1.06], [1.06, 1.0]], dtype=torch.float64)
    factor = damped_inverse_cholesky(hessian, 0.01)
    damped = torch.linalg.inv(factor.T @ factor)
    torch.testing.assert_close(damped, hessian + 0.07 * torch.eye(2, dtype=torch.float64))


def test_damping_beyond_the_largest_step_is_still_used() -> None:
    factor = damped_inverse_cholesky(torch.ones(2, 2, dtype=torch.float64), 3.0)
    torch.testing.assert_close(
        torch.linalg.inv(factor.T @ factor), torch.ones(2, 2).double() + 3 * torch.eye(2).double()
    )


@pytest.mark.parametrize(
    "hessian", [torch.tensor([[1.0, 9.0], [9.0, 1.0]]), torch.full((2, 2), torch.nan), torch.zeros(3, 3)]
)
def test_hopeless_hessians(hessian: torch.Tensor) -> None:
    with pytest.raises(SingularHessian, match=r"no Cholesky factor up to damp 0\.25"):
        damped_inverse_cholesky(hessian, 0.01)


def test_wrong_arguments() -> None:
    with pytest.raises(RecipeError, match="damp must be at least 0"):
        damped_inverse_cholesky(torch.eye(2), -0.1)
    with pytest.raises(ShapeError, match="not square"):
        damped_inverse_cholesky(torch.ones(2, 3), 0.1)


def test_dead_columns() -> None:
    x = inputs(10, 4)
    x[:, 2] = 0
    assert dead_columns(x.T @ x).tolist() == [False, False, True, False]


@pytest.mark.parametrize("stripe", [1, 7, 23, 24, 25])
def test_the_stripe_width_changes_speed_only(stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(200, 24).double()
    whole = torch.zeros(24, 24, dtype=torch.float64)
    accumulate_gram(whole, x)
    factor = damped_inverse_cholesky(whole, 0.01)
    monkeypatch.setattr(linalg, "STRIPE", stripe)
    gram = torch.zeros(24, 24, dtype=torch.float64)
    accumulate_gram(gram, x)
    assert torch.equal(gram, gram.T)
    eps = torch.finfo(torch.float64).eps
    assert ((gram - whole).abs() <= 200 * eps * (x.abs().T @ x.abs())).all()
    striped = damped_inverse_cholesky(whole, 0.01)
    assert torch.equal(striped, striped.triu())
    assert torch.linalg.norm(striped - factor) <= 24 * torch.linalg.cond(factor) * eps * torch.linalg.norm(factor)
