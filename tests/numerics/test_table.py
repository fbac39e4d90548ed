import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, Distribution
from bitwright.numerics.lloyd_max import optimal_levels
from bitwright.numerics.table import FP4_BNB, NF4, TABLES, TableFormat, as_float32, lloyd_max, normal_float

EPS = torch.finfo(torch.float32).eps

every_table = pytest.mark.parametrize("format", TABLES, ids=lambda f: f.name)
floats = st.floats(allow_nan=False, width=32)
tables = st.lists(st.floats(-4, 4, width=32).map(lambda x: x + 0.0), min_size=2, max_size=40).map(sorted)


def levels_of(format: TableFormat) -> torch.Tensor:
    return torch.tensor(sorted(format.values))


def borders_of(format: TableFormat) -> torch.Tensor:
    levels = levels_of(format)
    return (levels[:-1] + levels[1:]) / 2


def around(x: torch.Tensor) -> torch.Tensor:
    """Numbers and their float32 neighbours, three on each side."""
    found = [x]
    for end in (-torch.inf, torch.inf):
        y = x
        for _ in range(3):
            y = torch.nextafter(y, torch.full_like(y, end))
            found.append(y)
    return torch.cat(found)


def test_names_and_sizes() -> None:
    sizes = {format.name: format.num_codes for format in TABLES}
    assert sizes == {
        **{"nf4": 16, "nf3": 8, "nf2": 4, "fp4-bnb": 16},
        **{f"lloyd{bits}-{shape}": 2**bits for bits in (4, 3, 2) for shape in ("gaussian", "laplace")},
    }


@every_table
def test_facts(format: TableFormat) -> None:
    assert 2**format.bits == format.num_codes
    assert format.symmetric
    assert format.min_code == 0
    assert format.code_dtype == torch.uint8
    lowest, highest = format.decode(torch.tensor(format.end_codes), None).tolist()
    assert (lowest, highest) == (format.min_value, format.max_value) == (min(format.values), max(format.values))
    assert hash(format) == hash(TableFormat(name=format.name, values=format.values, code_order=format.code_order))


@every_table
def test_every_code_survives(format: TableFormat) -> None:
    codes = torch.arange(format.num_codes, dtype=torch.uint8)
    values = format.decode(codes, None)
    assert values.tolist() == list(format.values)
    again = format.encode(values, None)
    assert again.dtype == torch.uint8
    if format is FP4_BNB:
        assert again[codes != 8].equal(codes[codes != 8])
        assert again[8] == 0
    else:
        assert again.equal(codes)


@every_table
@settings(deadline=None)
@given(values=st.lists(floats, min_size=1, max_size=50))
def test_snap_is_decode_of_encode_and_nearest(format: TableFormat, values: list[float]) -> None:
    x = torch.tensor(values)
    snapped = format.snap(x, None)
    decoded = format.decode(format.encode(x, None), None)
    assert snapped.view(torch.int32).equal(decoded.view(torch.int32))
    levels = levels_of(format).double()
    distance = (x.double() - snapped.double()).abs()
    least = (x.double()[:, None] - levels).abs().amin(1)
    # Borders are rounded to float32.
    assert bool((distance <= least + EPS * levels.abs().max()).all())


@every_table
def test_borders_belong_to_the_value_below(format: TableFormat) -> None:
    levels, borders = levels_of(format), borders_of(format)
    assert format.snap(borders, None).equal(levels[:-1])
    above = torch.nextafter(borders, torch.full_like(borders, torch.inf))
    assert format.snap(above, None).equal(levels[1:])


@every_table
def test_the_search_equals_a_binary_search(format: TableFormat) -> None:
    x = torch.cat([around(borders_of(format)), around(levels_of(format)), torch.linspace(-6, 6, 100_001)])
    positions = torch.bucketize(x, borders_of(format))
    assert format.snap(x, None).equal(levels_of(format)[positions])
    assert format.encode(x, None).equal(torch.tensor(format.codes, dtype=torch.uint8)[positions])


@settings(deadline=None, max_examples=200)
@given(values=tables, numbers=st.lists(floats, min_size=1))
def test_the_search_equals_a_binary_search_on_any_table(values: list[float], numbers: list[float]) -> None:
    """Also where values repeat or lie so close that several borders share a bin."""
    format = TableFormat(name="test", values=tuple(values))
    x = torch.cat([torch.tensor(numbers), around(borders_of(format))])
    assert format.encode(x, None).equal(torch.bucketize(x, borders_of(format)).to(torch.uint8))


def test_values_of_very_different_sizes() -> None:
    values = as_float32(tuple(sign * 10.0**-power for sign in (-1, 1) for power in range(20)))
    order = tuple(sorted(range(40), key=lambda code: values[code]))
    format = TableFormat(name="decades", values=values, code_order=order)
    x = around(borders_of(format))
    assert format.snap(x, None).equal(levels_of(format)[torch.bucketize(x, borders_of(format))])


@every_table
def test_saturates(format: TableFormat) -> None:
    x = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf])
    lowest, highest = format.min_value, format.max_value
    assert format.snap(x, None).tolist() == [lowest, lowest, highest, highest]


def test_a_nan_stays_inside_the_table() -> None:
    assert NF4.snap(torch.tensor([torch.nan]), None).item() in NF4.values


@every_table
def test_any_shape_and_layout(format: TableFormat) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    for part in (x, x.transpose(0, 2), x[:, ::2], x[0, 0, 0], x[:0]):
        expected = format.snap(part.contiguous().flatten(), None).view(part.shape)
        assert format.snap(part, None).equal(expected)
        assert format.decode(format.encode(part, None), None).equal(expected)
    assert x.equal(kept)


def test_tables_built_in_inference_mode_serve_training_too() -> None:
    format = TableFormat(name="inference", values=(-1.0, 0.25, 1.0))
    with torch.inference_mode():
        format.snap(torch.zeros(1), None)
    x = torch.tensor([0.3, -0.9], requires_grad=True)
    (x * format.snap(x.detach(), None)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.25, -1.0]


def test_the_construction_gives_nf4() -> None:
    assert normal_float(4) == NF4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_have_zero_and_both_ends(bits: int) -> None:
    format = normal_float(bits)
    half = 2 ** (bits - 1)
    assert len(set(format.values)) == format.num_codes == 2 * half
    assert format.values[0] == -1
    assert format.values[-1] == 1
    assert format.values[half - 1] == 0
    # Each half is equally spaced in probability.
    normal = torch.distributions.Normal(0.0, 1.0)
    largest = normal.icdf(torch.tensor(1 - (1 / (4 * half - 2) + 1 / (4 * half)) / 2, dtype=torch.float64))
    probability = normal.cdf(torch.tensor(format.values, dtype=torch.float64) * largest)
    for side, steps in ((probability[half - 1 :], half), (probability[:half], half - 1)):
        spacing = side.diff()
        assert len(spacing) == steps
        # The probabilities are float32, the published constant has seven digits.
        assert torch.allclose(spacing, spacing.mean(), rtol=0, atol=1e-6)


def test_fp4_is_a_float_with_a_sign_bit() -> None:
    # Exponent field 0 holds 0 and 1/16; the others 2, 4 and 8 in the order 11, 10, 01; all in twelfths.
    magnitudes = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    expected = torch.tensor([*magnitudes, *(-m for m in magnitudes)]) / 12
    assert FP4_BNB.decode(torch.arange(16), None).equal(expected)
    assert not torch.signbit(FP4_BNB.decode(torch.tensor([8]), None)).any()
    codes = FP4_BNB.encode(torch.tensor([-1e-3, -0.0, 0.0, 1e-3, -0.004, 0.004]), None)
    assert codes.tolist() == [0, 0, 0, 8, 9, 1]


@pytest.mark.parametrize("distribution", [GAUSSIAN, LAPLACE], ids=lambda d: d.name)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_tables_are_in_standard_deviations(distribution: Distribution, bits: int) -> None:
    format = lloyd_max(distribution, bits)
    result = optimal_levels(distribution, bits)
    assert format.name == f"lloyd{bits}-{distribution.name}"
    assert format.values == as_float32(result.levels)
    assert format.max_value == pytest.approx(result.levels[-1], rel=EPS)
    # No level is 0; 0 lies on a border.
    assert format.snap(torch.zeros(1), None).item() == format.values[2 ** (bits - 1) - 1] < 0


def test_a_lloyd_max_table_errs_as_predicted_and_less_than_nf4() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    format = lloyd_max(GAUSSIAN, 4)
    squares = (format.snap(x, None) - x).double().square()
    expected = optimal_levels(GAUSSIAN, 4).mse
    assert abs(squares.mean() - expected) < 5 * squares.std() / x.numel() ** 0.5
    best_nf4 = min(float((NF4.snap(x / s, None) * s - x).square().mean()) for s in torch.linspace(2, 4, 21))
    assert squares.mean() < best_nf4


@pytest.mark.parametrize(
    ("values", "order", "message"),
    [
        ((0.0,), None, "needs 2 to 256 values, not 1"),
        (tuple(map(float, range(257))), None, "needs 2 to 256 values, not 257"),
        ((0.0, 0.1), None, "every value must be a finite float32 number"),
        ((0.0, float("inf")), None, "every value must be a finite float32 number"),
        ((0.0, float("nan")), None, "every value must be a finite float32 number"),
        ((1.0, 0.0), None, "the values do not ascend"),
        ((1.0, 0.0), (0, 1), "the values do not ascend"),
        ((1.0, 0.0), (1, 1), "code_order must name each of 2 codes once"),
        ((1.0, 0.0), (1,), "code_order must name each of 2 codes once"),
    ],
)
def test_bad_tables_are_refused(values: tuple[float, ...], order: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TableFormat(name="bad", values=values, code_order=order)


@pytest.mark.parametrize("bits", [1, 5])
def test_normal_floats_of_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits must be 2 to 4, not {bits}"):
        normal_float(bits)
