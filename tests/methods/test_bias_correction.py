"""The correction is the mean output error, takes it away exactly, and never adds any."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError
from bitwright.methods.bias_correction import bias_correction
from bitwright.methods.rtn import rtn
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.ranges import fit_grid

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS = 7, 24, 50
GROUPS = Granularity(kind="group", group_size=8)
EPS = torch.finfo(torch.float32).eps


def problem(seed: int = 0, name: str = "int3") -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what is left of it, and inputs whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=generator)
    dense = rtn(weight, fit_grid(weight, FORMATS[name], GROUPS)).dequantize()  # type: ignore[arg-type]
    offset = torch.randn(NUM_COLUMNS, generator=generator)
    return weight, dense, torch.randn(NUM_TOKENS, NUM_COLUMNS, generator=generator).double() + offset


@given(seed=st.integers(0, 200), name=st.sampled_from(["int2", "int4", "uint3", "nf4", "fp8-e4m3"]))
def test_the_mean_output_error_is_taken_away_and_the_squared_error_falls_by_it(seed: int, name: str) -> None:
    weight, dense, x = problem(seed, name)
    errors = x @ (weight.double() - dense.double()).T
    correction = bias_correction(weight, dense, x.mean(0))
    assert correction.shape == (NUM_ROWS,)
    # One rounding to float32.
    torch.testing.assert_close(correction.double(), errors.mean(0), rtol=EPS, atol=1e-12)
    left = errors - correction.double()
    assert bool((left.mean(0).abs() <= EPS * errors.mean(0).abs() + 1e-12).all())
    before, after = errors.square().mean(0), left.square().mean(0)
    gained = errors.mean(0).square()
    torch.testing.assert_close(before - after, gained, rtol=EPS, atol=1e-12)
    assert bool((after <= before).all())


def test_an_exact_weight_needs_no_correction() -> None:
    weight, _, x = problem()
    assert torch.equal(bias_correction(weight, weight, x.mean(0)), torch.zeros(NUM_ROWS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_models(dtype: torch.dtype) -> None:
    weight, dense, x = (tensor.to(dtype) for tensor in problem())
    mean = x.double().mean(0)
    found = bias_correction(weight, dense, mean)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (weight.double() - dense.double()) @ mean, rtol=EPS, atol=1e-12)


@pytest.mark.parametrize(
    "shapes", [((4, 3), (4, 3), (4,)), ((4, 3), (3, 4), (3,)), ((4, 3), (4, 3), (1, 3)), ((12,), (12,), (12,))]
)
def test_shapes_that_do_not_belong_together_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ShapeError, match="do not belong together"):
        bias_correction(*(torch.zeros(shape) for shape in shapes))


def test_a_correction_that_is_not_finite_is_refused() -> None:
    weight, dense, x = problem()
    mean = x.mean(0)
    mean[3] = torch.nan
    with pytest.raises(VerificationError, match="not finite"):
        bias_correction(weight, dense, mean)
