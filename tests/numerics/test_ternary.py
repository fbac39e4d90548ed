import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.ternary import (
    NUM_BINS,
    SLACK,
    TWN_FACTOR,
    BinaryFormat,
    TernaryFormat,
    absmean,
    optimal_binary,
    optimal_ternary,
    twn,
)
from bitwright.numerics.ternary import _condense as condense

TERNARY, BINARY = TernaryFormat(), BinaryFormat()
LEVELS = {TERNARY: (-1.0, 0.0, 1.0), BINARY: (-1.0, 1.0)}
EVERY_FORMAT = pytest.mark.parametrize("format", list(LEVELS), ids=lambda f: f.name)

# Sums of at most 2^20 float64 terms of the same sign.
ROUNDOFF = 2**20 * 2.0**-52

WEIGHTS = st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=6)
IMPORTANCES = st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0, 7.0, 100.0]), min_size=6, max_size=6)


def counts_of(groups: torch.Tensor) -> torch.Tensor:
    return torch.full(groups.shape[:-1], groups.shape[-1], dtype=torch.float32)


def squared_error(
    groups: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None, format: TernaryFormat | BinaryFormat
) -> torch.Tensor:
    """Σ h (w - ŵ)² per group in float64 for weights rounded to the nearest level."""
    step = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    values = format.snap(groups.double() / step, None) * step
    squares = (groups.double() - values).square()
    return (squares if importance is None else squares * importance).sum(-1)


def least_error(weight: torch.Tensor, importance: torch.Tensor, levels: tuple[float, ...]) -> float:
    """Try every assignment of levels, each with its own least-squares scale."""
    assignments = torch.cartesian_prod(*[torch.tensor(levels, dtype=torch.float64)] * len(weight))
    assignments = assignments.reshape(-1, len(weight))
    cross = (assignments * weight * importance).sum(-1)
    energy = (assignments.square() * importance).sum(-1)
    explained = torch.where(energy > 0, cross.square() / energy.clamp(min=1e-300), 0.0)
    return float((weight.square() * importance).sum() - explained.max())


def normal_sample(n: int) -> torch.Tensor:
    """N(0, 1) without chance: its quantiles at the middle of n equal shares."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def heavy(num_rows: int, num_columns: int) -> torch.Tensor:
    x = torch.randn(num_rows, 3, num_columns)
    return x * x.abs() * torch.logspace(-3, 1, num_rows).reshape(-1, 1, 1)


@EVERY_FORMAT
def test_codes_are_the_table(format: TernaryFormat | BinaryFormat) -> None:
    codes = torch.arange(format.num_codes, dtype=format.code_dtype)
    values = format.decode(codes, None)
    assert values.dtype == torch.float32
    assert values.tolist() == list(LEVELS[format])
    assert torch.equal(format.encode(values, None), codes)
    assert format.encode(values, None).dtype == format.code_dtype
    assert (format.min_value, format.max_value) == (values.min(), values.max())
    assert format.end_codes == (int(codes[values.argmin()]), int(codes[values.argmax()]))
    assert format.num_codes <= 2**format.bits
    assert hash(format) == hash(type(format)())


@EVERY_FORMAT
def test_snap_is_the_nearest_level_and_equals_decoded_codes_bitwise(format: TernaryFormat | BinaryFormat) -> None:
    half = torch.tensor(0.5)
    edges = torch.stack([half, torch.nextafter(half, half * 2), torch.nextafter(half, half * 0)])
    special = torch.tensor([0.0, 1e-45, 1e-3, 1.0, 1.5, 3e38, math.inf])
    scaled = torch.cat([torch.randn(1000), edges, special])
    scaled = torch.cat([scaled, -scaled])
    before = scaled.clone()
    values = format.snap(scaled, None)
    assert torch.equal(scaled, before)
    decoded = format.decode(format.encode(scaled, None), None)
    assert torch.equal(values.view(torch.int32), decoded.view(torch.int32))
    finite = scaled.isfinite()
    distances = (scaled[finite].double().unsqueeze(-1) - torch.tensor(LEVELS[format], dtype=torch.float64)).abs()
    assert torch.equal((scaled[finite].double() - values[finite]).abs(), distances.min(-1).values)
    assert torch.equal(values[~finite], scaled[~finite].sign())


def test_ties_are_settled() -> None:
    assert TERNARY.snap(torch.tensor([0.5, -0.5]), None).tolist() == [0, 0]
    assert BINARY.snap(torch.tensor([0.0, -0.0]), None).tolist() == [1, 1]


@EVERY_FORMAT
def test_a_zero_point_is_refused(format: TernaryFormat | BinaryFormat) -> None:
    zero_point, codes = torch.zeros(1), torch.zeros(1, dtype=torch.uint8)
    for call in (format.snap, format.encode):
        with pytest.raises(AssertionError):
            call(torch.zeros(1), zero_point)
    with pytest.raises(AssertionError):
        format.decode(codes, zero_point)


def test_binary_codes_pack_into_one_bit() -> None:
    codes = BINARY.encode(torch.randn(3, 77), None)
    words = pack(codes, 1)
    assert words.shape == (3, 3)
    assert torch.equal(unpack(words, 1, 77), codes)


@given(values=WEIGHTS, importances=IMPORTANCES, weighted=st.booleans())
def test_optimal_ternary_beats_every_assignment(values: list[float], importances: list[float], weighted: bool) -> None:
    weight = torch.tensor(values, dtype=torch.float64)
    importance = torch.tensor(importances[: len(values)] if weighted else [1.0] * len(values), dtype=torch.float64)
    groups, given_importance = weight.reshape(1, 1, -1), importance.reshape(1, 1, -1) if weighted else None
    scale = optimal_ternary([groups], given_importance)
    error = float(squared_error(groups, scale, given_importance, TERNARY))
    energy = float((weight.square() * importance).sum())
    assert error == pytest.approx(least_error(weight, importance, LEVELS[TERNARY]), abs=energy * ROUNDOFF)


@given(values=WEIGHTS, importances=IMPORTANCES, weighted=st.booleans())
def test_optimal_binary_beats_every_assignment(values: list[float], importances: list[float], weighted: bool) -> None:
    weight = torch.tensor(values, dtype=torch.float64)
    importance = torch.tensor(importances[: len(values)] if weighted else [1.0] * len(values), dtype=torch.float64)
    if float((weight.abs() * importance).sum()) == 0:
        return  # The best scale would be 0, which no checkpoint stores.
    groups, given_importance = weight.reshape(1, 1, -1), importance.reshape(1, 1, -1) if weighted else None
    scale = optimal_binary([groups], counts_of(groups), given_importance)
    error = float(squared_error(groups, scale, given_importance, BINARY))
    energy = float((weight.square() * importance).sum())
    assert error == pytest.approx(least_error(weight, importance, LEVELS[BINARY]), abs=energy * ROUNDOFF)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_scale_of_a_fine_search_is_better(weighted: bool) -> None:
    groups = heavy(4, 50)
    importance = torch.rand(1, 3, 50, dtype=torch.float64) ** 4 if weighted else None
    ternary = optimal_ternary([groups], importance)
    binary = optimal_binary([groups], counts_of(groups), importance)
    assert ternary.shape == binary.shape == (4, 3)
    for format, best in ((TERNARY, ternary), (BINARY, binary)):
        least = squared_error(groups, best, importance, format)
        for factor in torch.linspace(0.01, 1, 400).tolist():
            scale = groups.double().abs().amax(-1) * factor
            assert (least <= squared_error(groups, scale, importance, format) * (1 + ROUNDOFF)).all()


def test_gaussian_weights_have_the_known_optima() -> None:
    # Quantiles cut the tail at about 5 standard deviations, of which n P(x > 5) = 0.3 samples are missing: 1e-5.
    groups = normal_sample(2**20).reshape(1, 1, -1)
    counts = counts_of(groups)

    def ternary_mse(a: float) -> float:
        return 1 - 4 * a * norm.pdf(a / 2) + 2 * a * a * norm.sf(a / 2)

    best = minimize_scalar(ternary_mse, bounds=(0.5, 2), method="bounded", options={"xatol": 1e-10})
    assert best.x == pytest.approx(1.224, abs=5e-4)
    assert best.fun == pytest.approx(0.1902, abs=5e-5)
    scale = optimal_ternary([groups], None)
    assert float(scale) == pytest.approx(best.x, abs=1e-3)
    assert float(squared_error(groups, scale, None, TERNARY)) / 2**20 == pytest.approx(best.fun, abs=1e-4)
    scale = optimal_binary([groups], counts, None)
    assert float(scale) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-4)
    assert float(squared_error(groups, scale, None, BINARY)) / 2**20 == pytest.approx(1 - 2 / math.pi, abs=1e-4)
    mean = math.sqrt(2 / math.pi)
    assert float(absmean([groups], counts)) == pytest.approx(mean, abs=1e-4)
    threshold = TWN_FACTOR * mean
    assert float(twn([groups], counts)) == pytest.approx(norm.pdf(threshold) / norm.sf(threshold), abs=1e-4)


@given(values=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=20))
def test_published_rules_follow_their_definitions(values: list[float]) -> None:
    groups = torch.tensor(values).reshape(1, 1, -1)
    magnitudes = [abs(value) for value in values]
    mean = math.fsum(magnitudes) / len(values)
    # A magnitude equal to the threshold up to roundoff may fall on either side.
    if any(math.isclose(magnitude, TWN_FACTOR * mean, rel_tol=1e-9) for magnitude in magnitudes):
        return
    above = [magnitude for magnitude in magnitudes if magnitude > TWN_FACTOR * mean]
    expected = math.fsum(above) / len(above) if above else 0.0
    assert float(absmean([groups], counts_of(groups))) == pytest.approx(mean, rel=ROUNDOFF)
    assert float(twn([groups], counts_of(groups))) == pytest.approx(expected, rel=ROUNDOFF)


def test_nearest_rounding_is_never_worse_than_the_threshold_of_twn() -> None:
    groups = heavy(50, 64)
    scale = twn([groups], counts_of(groups))
    threshold = TWN_FACTOR * groups.double().abs().mean(-1, keepdim=True)
    thresholded = groups.sign() * (groups.abs() > threshold) * scale.unsqueeze(-1)
    published = (groups.double() - thresholded).square().sum(-1)
    nearest = squared_error(groups, scale, None, TERNARY)
    assert (nearest <= published * (1 + ROUNDOFF)).all()
    assert (nearest < 0.999 * published).any()
    optimal = squared_error(groups, optimal_ternary([groups], None), None, TERNARY)
    assert (optimal <= nearest * (1 + ROUNDOFF)).all()
    assert (optimal < 0.99 * nearest).any()
    assert (nearest < 0.9 * squared_error(groups, absmean([groups], counts_of(groups)), None, TERNARY)).any()


def test_padding_changes_nothing() -> None:
    groups, importance = heavy(4, 50), torch.rand(1, 3, 50, dtype=torch.float64)
    padded, mask = (torch.nn.functional.pad(x, (0, 14)) for x in (groups, torch.ones_like(importance)))
    padded_importance = torch.nn.functional.pad(importance, (0, 14))
    counts = counts_of(groups)
    pairs = [
        (absmean([padded], counts), absmean([groups], counts)),
        (twn([padded], counts), twn([groups], counts)),
        (optimal_ternary([padded], mask), optimal_ternary([groups], None)),
        (optimal_ternary([padded], padded_importance), optimal_ternary([groups], importance)),
        (optimal_binary([padded], counts, mask), optimal_binary([groups], counts, None)),
        (optimal_binary([padded], counts, padded_importance), optimal_binary([groups], counts, importance)),
    ]
    for with_padding, without in pairs:
        torch.testing.assert_close(with_padding, without, rtol=ROUNDOFF, atol=0)


def test_groups_of_zeros_have_scale_zero() -> None:
    groups = torch.stack([torch.zeros(8), torch.randn(8)]).reshape(1, 2, 8)
    counts, importance = counts_of(groups), torch.ones(1, 2, 8)
    for scale in (
        absmean([groups], counts),
        twn([groups], counts),
        optimal_ternary([groups], None),
        optimal_ternary([groups], importance),
        optimal_ternary([groups, groups], importance),
        optimal_binary([groups], counts, importance),
    ):
        assert scale[0, 0] == 0
        assert scale[0, 1] > 0


@pytest.mark.parametrize("num_pieces", [1, 3])
def test_importance_that_says_nothing_counts_every_weight_alike(num_pieces: int) -> None:
    # The second group has weights only where the importance is 0, the third an ordinary importance.
    importance = torch.tensor([[0.0] * 4, [0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]]).unsqueeze(0)
    groups = torch.tensor([[1.0, -2.0, 3.0, 4.0], [5.0, -6.0, 0.0, 0.0], [1.0, 2.0, -3.0, 4.0]]).unsqueeze(0)
    pieces, counts = [groups] * num_pieces, counts_of(groups) * num_pieces
    for weighted, plain in (
        (optimal_ternary(pieces, importance), optimal_ternary(pieces, None)),
        (optimal_binary(pieces, counts, importance), optimal_binary(pieces, counts, None)),
    ):
        torch.testing.assert_close(weighted[0, :2], plain[0, :2], rtol=ROUNDOFF, atol=0)
        assert weighted[0, 2] != plain[0, 2]


@pytest.mark.parametrize("factor", [2.0**-130, 2.0**120])
def test_tiny_and_huge_weights_scale_exactly(factor: float) -> None:
    # Magnitudes of 10 bits stay exact as subnormals.
    groups = torch.randint(-1023, 1024, (2, 2, 40)).float() / 64
    counts = counts_of(groups)
    for rule in (
        lambda x: absmean([x], counts),
        lambda x: twn([x], counts),
        lambda x: optimal_ternary([x], None),
        lambda x: optimal_ternary(list(x.split(20, -1)), None),
        lambda x: optimal_binary([x], counts, groups.abs()),
    ):
        assert torch.equal(rule(groups * factor), rule(groups) * factor)


MANY = {
    "normal": torch.randn,
    "bfloat16": lambda n: torch.randn(n).bfloat16(),
    "heavy": lambda n: torch.distributions.StudentT(2.0).sample((n,)),
    "two clusters": lambda n: torch.randn(n) * torch.where(torch.rand(n) < 0.01, 30.0, 1.0),
    "already ternary": lambda n: torch.randint(-1, 2, (n,)) * 0.0371,
    "equal": lambda n: torch.full((n,), -0.3),
    "ties": lambda n: torch.randint(-5, 6, (n,)).float(),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_have_the_optimum_of_the_whole(name: str, weighted: bool) -> None:
    # The last piece is shorter; the importance of a piece starts anew with each.
    num_pieces, size = 5, 4000
    whole = torch.stack([MANY[name](num_pieces * size - 100), MANY[name](num_pieces * size - 100) * 7]).unsqueeze(0)
    importance = torch.rand(1, 2, size, dtype=torch.float64) ** 3 if weighted else None
    tiled = None if importance is None else importance.repeat(1, 1, num_pieces)[..., : whole.shape[-1]]
    pieces = list(whole.split(size, -1))
    energy = (whole.double().square() * (1.0 if tiled is None else tiled)).sum(-1)
    explained = [
        energy - squared_error(whole, scale, tiled, TERNARY)
        for scale in (optimal_ternary(pieces, importance), optimal_ternary([whole], tiled))
    ]
    assert (explained[0] >= explained[1] * (1 - SLACK - ROUNDOFF)).all()
    counts = counts_of(whole)
    for of_pieces, of_whole in (
        (absmean(pieces, counts), absmean([whole], counts)),
        (twn(pieces, counts), twn([whole], counts)),
        (optimal_binary(pieces, counts, importance), optimal_binary([whole], counts, tiled)),
    ):
        torch.testing.assert_close(of_pieces, of_whole, rtol=ROUNDOFF, atol=0)


@pytest.mark.parametrize("name", MANY)
def test_few_weights_of_many_pieces_are_looked_at_one_by_one(name: str) -> None:
    pieces = [MANY[name](2**16) for _ in range(8)]
    values, masses = condense(pieces, None)
    # One magnitude per bin, and the weights of a few bins.
    assert len(values) <= NUM_BINS + 0.05 * 2**19
    assert float(masses.sum()) == 2**19
    total = sum(float(piece.double().abs().sum()) for piece in pieces)
    assert float((values * masses).sum()) == pytest.approx(total, rel=ROUNDOFF)
