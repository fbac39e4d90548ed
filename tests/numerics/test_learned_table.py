"""One learned table per weight: never worse than NormalFloat, better than even spacing, learned on a fair sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Laplace

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics import learned_table
from bitwright.numerics.codebook_grid import LearnedTableFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.learned_table import fit_learned_table
from bitwright.numerics.nested import NestedScale
from bitwright.numerics.ranges import FLOAT32, fit_grid
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.table import normal_float

GROUP = Granularity(kind="group", group_size=32)
GRANULARITIES = (
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    GROUP,
    Granularity(kind="block", group_size=32, block_rows=16),
    Granularity(kind="columns", group_size=32),
)


def learn(
    weight: Tensor,
    granularity: Granularity = GROUP,
    *,
    bits: int = 4,
    importance: Tensor | None = None,
    scale: ScaleFormat = FLOAT32,
) -> Grid:
    return fit_learned_table(weight, LearnedTableFormat(bits=bits), granularity, importance=importance, scale=scale)


def start(
    weight: Tensor,
    granularity: Granularity = GROUP,
    *,
    bits: int = 4,
    importance: Tensor | None = None,
    scale: ScaleFormat = FLOAT32,
) -> Grid:
    return fit_grid(weight, normal_float(bits), granularity, method="mse", importance=importance, scale=scale)


def error(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> float:
    """Σ importance · (w - ŵ)², with nothing shared with the code under test."""
    residual = weight.double() - grid.fake_quantize(weight.float()).double()
    return float((residual.square() * (1.0 if importance is None else importance.double())).sum())


def levels(grid: Grid) -> Tensor:
    return grid.format.decode(torch.arange(grid.format.num_codes, dtype=torch.uint8), None)


def same(first: Grid, second: Grid) -> bool:
    return torch.equal(levels(first), levels(second)) and torch.equal(first.scale, second.scale)


# Never worse than the start


@pytest.mark.parametrize("shape", [(48, 96), (37, 83), (1, 5), (3, 1), (300, 128)])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_never_worse_than_normal_float(bits: int, granularity: Granularity, shape: tuple[int, int]) -> None:
    weight, importance = Laplace(0.0, 0.02).sample(shape), torch.rand(shape[1])
    for counted, scale in ((None, FLOAT32), (importance, FloatScale(torch.bfloat16)), (importance, NestedScale())):
        learned = learn(weight, granularity, bits=bits, importance=counted, scale=scale)
        expected = start(weight, granularity, bits=bits, importance=counted, scale=scale)
        # Room for the order of summation: float64 sums of float32 residuals.
        assert error(weight, learned, counted) <= error(weight, expected, counted) * (1 + 1e-9)
        assert learned.granularity == granularity
        assert learned.format.name == f"lut{bits}"


@settings(max_examples=40)
@given(
    exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=6),
    zeros=st.sets(st.integers(0, 5)),
    bits=st.sampled_from([2, 3, 4]),
    kind=st.sampled_from(range(len(GRANULARITIES))),
    seed=st.integers(0, 1000),
)
def test_no_mixture_of_magnitudes_and_importance_breaks_the_promise(
    exponents: list[int], zeros: set[int], bits: int, kind: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.tensor([10.0**exponent for exponent in exponents]).unsqueeze(1)
    weight = torch.randn(len(exponents), 6, generator=generator) * factors
    importance = torch.rand(6, generator=generator)
    importance[list(zeros)] = 0
    # All unimportant counts all alike, as in every search.
    counted = importance if len(zeros) < 6 else None
    learned = learn(weight, GRANULARITIES[kind], bits=bits, importance=importance)
    expected = start(weight, GRANULARITIES[kind], bits=bits, importance=importance)
    assert error(weight, learned, counted) <= error(weight, expected, counted) * (1 + 1e-9)


@pytest.mark.parametrize("ratio", [1e5, 1e30, 1e37])
def test_weights_that_do_not_count_may_be_huge(ratio: float) -> None:
    weight, importance = torch.randn(16, 32), torch.ones(32)
    weight[:, 0], importance[0] = ratio, 0
    learned = learn(weight, importance=importance)
    assert error(weight, learned, importance) <= error(weight, start(weight, importance=importance), importance)


def test_a_sample_that_misleads_costs_nothing() -> None:
    weight = Laplace(0.0, 0.01).sample((512, 256))
    assert error(weight, learn(weight)) < error(weight, start(weight))
    # One row outweighs all the others, and NF4 holds it exactly.
    weight[1] = 1000 * levels(start(weight)).repeat(16)
    assert same(learn(weight), start(weight))
    assert error(weight[1:2], learn(weight).rows(1, 2)) == 0


# Better than even spacing


@pytest.mark.parametrize(
    "weight", [torch.distributions.Normal(0.0, 0.02), Laplace(0.0, 0.02)], ids=["normal", "laplace"]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_levels_beat_evenly_spaced_ones(weight: torch.distributions.Distribution, bits: int) -> None:
    drawn, importance = weight.sample((192, 256)), torch.rand(256).square()
    granularity = Granularity(kind="group", group_size=64)
    for symmetric in (True, False):
        if symmetric or bits > 2:  # Zero points add 2 bits to 2-bit codes' scales and may win there.
            integers = IntegerFormat(bits=bits, symmetric=symmetric)
            even = fit_grid(drawn, integers, granularity, method="mse", importance=importance)
            learned = learn(drawn, granularity, bits=bits, importance=importance)
            assert error(drawn, learned, importance) < error(drawn, even, importance)


def test_a_lattice_of_few_values_is_found_exactly() -> None:
    # Four values that no evenly spaced or normal table has, each present in every group.
    values = torch.tensor([-1.0, -0.9, 0.3, 0.5])
    weight = values[torch.randint(0, 4, (64, 64))]
    weight[:, ::32] = -1.0
    found = learn(weight, bits=2)
    assert error(weight, found) < 1e-6 * error(weight, start(weight, bits=2))


def test_the_largest_level_is_one() -> None:
    for bits in (2, 3, 4):
        assert levels(learn(Laplace(0.0, 0.02).sample((64, 64)), bits=bits)).abs().max() == 1


# Importance


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    weight, importance = Laplace(0.0, 0.02).sample((128, 128)), torch.rand(128) ** 4
    aware, blind = learn(weight, bits=3, importance=importance), learn(weight, bits=3)
    assert error(weight, aware, importance) < error(weight, blind, importance)
    assert error(weight, blind) < error(weight, aware)


def test_only_ratios_of_importance_count() -> None:
    weight, importance = torch.randn(32, 64), torch.rand(64)
    assert same(learn(weight, importance=importance), learn(weight, importance=importance * 2**20))
    assert same(learn(weight, importance=torch.full((64,), 0.25)), learn(weight))
    assert same(learn(weight, importance=torch.zeros(64)), learn(weight))


def test_groups_without_importance_have_no_say_in_the_table() -> None:
    weight, importance = torch.randn(32, 64), torch.ones(64)
    importance[32:] = 0
    other = weight.clone()
    other[:, 32:] = torch.rand(32, 32) ** 5
    torch.testing.assert_close(
        levels(learn(weight, importance=importance)), levels(learn(other, importance=importance))
    )


# The sample


def error_on_all(weight: Tensor, monkeypatch: pytest.MonkeyPatch, granularity: Granularity = GROUP) -> float:
    with monkeypatch.context() as patch:
        patch.setattr(learned_table, "SAMPLE", weight.numel())
        return error(weight, learn(weight, granularity))


# A level of 16 is the mean of some 2000 sampled weights, and its own variance is 1/2000 of theirs: far below 1 %.
SAMPLING = 1.01


@pytest.mark.parametrize("granularity", [GROUP, GRANULARITIES[3]], ids=lambda g: g.kind)
def test_a_sample_serves_as_well_as_the_whole(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1024, 128) * torch.rand(1024, 1)
    learned = error(weight, learn(weight, granularity))
    assert learned <= SAMPLING * error_on_all(weight, monkeypatch, granularity)
    assert learned < error(weight, start(weight, granularity))


@pytest.mark.parametrize("period", [2, 4, 16])
def test_rows_that_recur_are_not_sampled_alone(period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every such row has another shape; a stride that divides the period would see nothing else.
    weight = Laplace(0.0, 0.02).sample((1024, 128))
    weight[::period] = torch.rand(1024 // period, 128) - 0.5
    # They dominate the error, and only their share of the sample, at least 128 weights per level, knows their shape.
    limit = SAMPLING + 16 * period / learned_table.SAMPLE
    assert error(weight, learn(weight)) <= limit * error_on_all(weight, monkeypatch)


def test_the_sample_is_the_same_every_time() -> None:
    weight = torch.randn(512, 128)
    kept, state = weight.clone(), torch.get_rng_state()
    first = learn(weight)
    torch.manual_seed(12345)
    second = learn(weight)
    torch.set_rng_state(state)
    assert same(first, second)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2), (1, 33_000)])
def test_very_wide_and_very_tall_weights_are_sampled_too(shape: tuple[int, int]) -> None:
    weight = Laplace(0.0, 0.02).sample(shape)
    granularity = Granularity(kind="group", group_size=64)
    assert error(weight, learn(weight, granularity)) <= error(weight, start(weight, granularity)) * (1 + 1e-9)


# Degenerate weights and refusals


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
def test_zeros_and_constants_are_exact(granularity: Granularity) -> None:
    for value in (0.0, 0.375, -0.375):
        weight = torch.full((33, 40), value)
        assert error(weight, learn(weight, granularity)) == 0


def test_rows_of_zeros_do_not_disturb_the_others() -> None:
    weight = Laplace(0.0, 0.02).sample((64, 64))
    padded = torch.cat([weight, torch.zeros(64, 64)])
    found = learn(padded)
    # A table need not have a 0; then the smallest scale brings zeros as close to it as floats allow.
    assert found.fake_quantize(padded)[64:].abs().max() <= torch.finfo(torch.float32).tiny
    assert error(weight, found.rows(0, 64)) < error(weight, start(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_is_read_as_float32(dtype: torch.dtype) -> None:
    weight = (torch.randn(16, 64) * 0.1).to(torch.bfloat16).to(dtype)
    assert same(learn(weight), learn(weight.float()))


def test_what_cannot_be_fitted_is_refused() -> None:
    weight = torch.randn(4, 32)
    with pytest.raises(RecipeError, match="bits must be 2 to 4, not 5"):
        learn(weight, bits=5)
    with pytest.raises(ShapeError, match="must be"):
        learn(torch.zeros(0, 32))
    with pytest.raises(ShapeError, match="importance"):
        learn(weight, importance=torch.ones(31))
    with pytest.raises(VerificationError, match="importance"):
        learn(weight, importance=-torch.ones(32))
    with pytest.raises(VerificationError, match="NaN or Inf"):
        learn(torch.full((4, 32), torch.nan))
