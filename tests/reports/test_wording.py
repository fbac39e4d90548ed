import math

import pytest

from bitwright.reports import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (1234567.8, "1 234 568"), (6.0330, "6.03"), (-0.0521, "−0.0521"), (1.5e-7, "1.50 · 10⁻⁷"),
     (math.nan, "not a number"), (math.inf, "∞"), (-math.inf, "−∞")],
)  # fmt: skip
def test_numbers_keep_three_digits_and_say_when_there_are_none(value: float | None, text: str) -> None:
    assert wording.number(value).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [(0.10829, 0.00959, "0.1083 ± 0.0096"), (10.8759, 0.4489, "10.88 ± 0.45"), (2040.4, 31.4, "2 040 ± 31"),
     (0.0, 0.0, "0"), (3.5, None, "3.50"), (None, 0.1, "–"), (3.0, math.inf, "3.00"),
     (2e-9, 1e-10, "2.00 · 10⁻⁹ ± 1.0 · 10⁻¹⁰")],
)  # fmt: skip
def test_a_value_has_the_digits_its_error_leaves_it(value: float | None, stderr: float | None, text: str) -> None:
    assert wording.with_stderr(value, stderr).replace("\u202f", " ").replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(999, "999 B"), (1000, "1.00 kB"), (274928, "275 kB"), (61.2e9, "61.2 GB"), (None, "–")]
)
def test_sizes_are_decimal(num_bytes: float | None, text: str) -> None:
    assert wording.size(num_bytes).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.12, "2.1 s"), (95, "95.0 s"), (125.4, "2 min 05 s"), (9000, "2 h 30 min"), (None, "–")]
)
def test_durations_use_the_unit_people_use(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("sqnr_db", "text"), [(0, "100 %"), (10, "10 %"), (20, "1.0 %"), (30, "0.10 %")])
def test_ten_decibels_are_a_tenth_of_the_energy(sqnr_db: float, text: str) -> None:
    assert wording.noise_share(sqnr_db).replace("\u00a0", " ") == text


def test_an_absurd_ratio_does_not_overflow() -> None:
    assert wording.noise_share(-1e9).endswith("%")
