"""The comparisons behind the results of benchmarks/formats.py: what it concludes from rows must follow from them."""

import importlib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.schemes import Scheme

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


rows_module, page, plot, bench = (load(name) for name in ("formats_rows", "formats_page", "formats_plot", "formats"))


def row(bits: float, kl: Sequence[float] | float, **other: Any) -> Any:
    windows = tuple(kl) if isinstance(kl, Sequence) else (0.9 * kl, 1.1 * kl)
    values = {
        "key": f"{bits} {kl} {other}", "scheme": "W4A16-g128", "method": "rtn", "family": "integer", "code_bits": 4.0,
        "bits": bits, "ideal_bits": bits, "kl": windows, "nll": tuple(1.0 + each for each in windows),
    }  # fmt: skip
    return rows_module.Row(**{**values, **other})


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9)), min_size=1, max_size=20))
def test_the_pareto_set_is_what_no_other_row_equals_or_beats(points: list[tuple[int, int]]) -> None:
    rows = [row(bits, kl) for bits, kl in points]
    found = {(each.bits, round(each.kl_mean)) for each in rows_module.pareto_set(rows)}
    expected = {
        (bits, kl) for bits, kl in points if not any(b <= bits and k <= kl and (b, k) != (bits, kl) for b, k in points)
    }
    assert found == expected


def test_a_rival_within_the_same_size_is_the_best_one_there() -> None:
    better, worse, far = row(4.13, 0.02), row(4.12, 0.03), row(4.3, 0.001)
    assert rows_module.rival_at(4.125, [worse, better, far]) == ((1.0, better),)


def test_a_rival_is_never_worse_than_a_smaller_one() -> None:
    small, worse, large = row(4.0, 0.1), row(4.12, 0.4), row(4.4, 0.025)
    assert rows_module.rival_at(4.1, [small, worse, large]) == (
        (pytest.approx(0.75), small),
        (pytest.approx(0.25), large),
    )


def test_between_sizes_the_logarithm_of_kl_is_interpolated() -> None:
    small, inefficient, large = row(4.0, 0.08), row(4.3, 0.5), row(5.0, 0.02)
    rival = rows_module.rival_at(4.25, [large, inefficient, small])
    assert rival == ((0.75, small), (0.25, large))
    found = rows_module.Comparison(row=row(4.25, 0.06), rival=rival)
    assert found.rival_kl == pytest.approx(0.08**0.75 * 0.02**0.25)
    assert found.rival_bits == pytest.approx(4.25)
    assert found.ratio.value == pytest.approx(0.06 / found.rival_kl)
    assert rows_module.bits_for(0.04, [small, inefficient, large]) == pytest.approx(4.5)


def test_nothing_is_extrapolated() -> None:
    curve = [row(4.0, 0.08), row(5.0, 0.02)]
    assert rows_module.rival_at(3.9, curve) is None
    assert rows_module.rival_at(5.1, curve) is None
    assert rows_module.bits_for(0.01, curve) is None
    assert rows_module.bits_for(0.1, curve) is None
    assert rows_module.comparisons([row(3.9, 0.1)], curve) == []


def test_what_two_rows_share_leaves_no_error_in_their_ratio() -> None:
    common = (0.01, 0.05, 0.02)
    found = rows_module.ratio([2 * each for each in common], [(1.0, common)])
    assert found.value == pytest.approx(2)
    assert found.stderr == pytest.approx(0, abs=1e-15)
    assert found.verdict == 1


def test_the_error_of_a_ratio_to_a_constant_is_that_of_the_mean() -> None:
    values = (0.01, 0.05, 0.02, 0.03)
    found = rows_module.ratio(values, [(1.0, (0.5,) * 4)])
    assert found.value == pytest.approx(rows_module.mean(values) / 0.5)
    assert found.stderr == pytest.approx(rows_module.stderr(values) / 0.5)
    # 0.0275 +- 0.0085, from the definition
    assert rows_module.stderr(values) == pytest.approx(math.sqrt(0.000875 / 3 / 4))


@pytest.mark.parametrize(("value", "stderr", "verdict"), [(0.5, 0.1, -1), (0.95, 0.1, 0), (1.05, 0.1, 0), (2, 0.1, 1)])
def test_a_difference_is_called_one_from_two_standard_errors_on(value: float, stderr: float, verdict: int) -> None:
    assert rows_module.Ratio(value=value, stderr=stderr).verdict == verdict


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(0.025812, 0.00103, "0.0258 ± 0.0010"), (121.23, 2.5, "121.2 ± 2.5"), (1234.0, 130.0, "1234 ± 130")],
)
def test_figures_have_two_digits_of_their_error(value: float, error: float, text: str) -> None:
    assert rows_module.with_error(value, error) == text


def test_a_row_survives_its_file() -> None:
    original = row(4.125, 0.02, plain="W4A16-g128")
    assert rows_module.Row.from_mapping(original.to_mapping()) == original


NF4 = row(4.127, (0.018, 0.020), scheme="nf4-g64-dq", family="fixed table")
INT4 = row(4.125, (0.026, 0.030))
INT8 = row(8.0, (0.00011, 0.00012), scheme="W8A16-channel", code_bits=8.0)


def test_answers_follow_the_rows() -> None:
    assert "8 bits: better in 1 of 1" in page.nf4_against_int4([NF4, INT4])
    swapped = [row(4.127, NF4.kl), row(4.125, INT4.kl, scheme="nf4-g64", family="fixed table")]
    assert "32: better in 0 of 1, worse in 1" in page.nf4_against_int4(swapped)
    nll = (1.0, 1.0)
    assert "**No.** The best of all, nf4-g64-dq rtn" in page.four_against_eight([NF4, INT4, INT8], nll)
    as_good = row(4.127, INT8.kl, scheme="nf4-g64-dq", family="fixed table")
    assert "**Yes.**" in page.four_against_eight([as_good, INT4, INT8], nll)


def test_learned_tables_are_compared_with_integers_of_their_method() -> None:
    learned = row(4.125, (0.02, 0.021), scheme="lut4-g128", method="weighted", family="learned table")
    unfair, fair = row(4.125, (0.01, 0.011)), row(4.125, (0.04, 0.042), method="weighted")
    text = page.learned_against_uniform([learned, unfair, fair])
    assert "lut4, weighted: better in 1 of 1" in text


def test_the_table_ascends_in_bits_and_marks_both_pareto_sets() -> None:
    gptq = row(4.125, (0.01, 0.011), method="gptq")
    lines = page.weight_table([INT8, INT4, gptq, NF4], (1.0, 1.0)).splitlines()
    marks = [(line.split("|")[2].strip(), line.split("|")[1].strip()) for line in lines if re.match(r"\| [●○ ]", line)]
    assert marks == [("W4A16-g128", "●"), ("W4A16-g128", "○"), ("nf4-g64-dq", "○"), ("W8A16-channel", "●○")]


def test_activations_stand_beside_the_same_weights() -> None:
    plain = row(8.0, (0.0001, 0.0002), scheme="W8A16-channel", method="weighted")
    quantized = row(8.0, (0.0004, 0.0008), scheme="W8A8-channel", method="weighted", plain="W8A16-channel")
    table = page.activation_table([quantized, plain])
    assert "| W8A8-channel | 8.000 | 0.00060 ± 0.00020 | W8A16-channel |" in table
    assert "| 4." in table


def test_the_plot_is_a_drawing_with_every_row() -> None:
    drawing = ElementTree.fromstring(plot.scatter([INT8, INT4, NF4], "a < b"))
    titles = [each.text for each in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3
    assert any(title is not None and title.startswith("nf4-g64-dq rtn: 4.127 bits") for title in titles)


def test_every_cell_names_a_scheme_and_a_method() -> None:
    listed = list(bench.listed(bench.WEIGHT_CELLS))
    assert len(listed) == len(set(listed)) > 100
    for name, method in listed:
        assert Scheme.parse(name).activations is None
        assert method in bench.METHODS


def test_every_activation_scheme_has_its_weights_measured_alone() -> None:
    measured = {(str(Scheme.parse(name)), method) for name, method in bench.listed(bench.WEIGHT_CELLS)}
    for name in bench.ACTIVATION_SCHEMES:
        plain = bench.plain_name(Scheme.parse(name))
        assert Scheme.parse(plain).weights == Scheme.parse(name).weights
        assert (plain, "weighted") in measured


@pytest.mark.parametrize(
    ("name", "kind"),
    [("W4A16", "integer"), ("mxint8-a16", "block-scaled"), ("kmeans4", "learned table"), ("nf4", "fixed table"),
     ("fp4-bnb", "fixed table"), ("fp4-e2m1", "float"), ("ternary", "1 to 1.6 bits")],
)  # fmt: skip
def test_the_kind_of_a_scheme(name: str, kind: str) -> None:
    assert bench.family(Scheme.parse(name)) == kind
