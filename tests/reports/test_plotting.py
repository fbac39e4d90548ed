"""Axes say whole figures."""

import math

import pytest

from bitwright.reports import wording
from bitwright.reports.plotting import log_axis


@pytest.mark.parametrize(
    "values",
    [
        [0.161, 0.234],
        [0.2],
        [1e-5, 3e-2, 0.5],
        [0.3, 0.31],
        [12.0, 700.0],
        [0.95, 1.05],
        [0.0123, 0.0124],
        [0.2, 0.2000001],
        [0.105, 0.195],
        [0.30, 0.302],
    ],
)
def test_a_logarithmic_axis_has_ticks_inside_it_and_writes_them_out(values: list[float]) -> None:
    axis = log_axis(values)
    low, high = (10**end for end in axis["range"])
    assert low < min(values) <= max(values) < high
    assert 3 <= len(axis["tickvals"]) <= 16
    assert all(low <= tick <= high for tick in axis["tickvals"])
    assert axis["ticktext"] == [wording.number(float(f"{tick:.3g}")) for tick in axis["tickvals"]]
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])


def test_labels_may_have_a_unit_and_no_values_leave_the_axis_to_itself() -> None:
    assert log_axis([1e6, 1e9], label=wording.size)["ticktext"][0] == wording.size(1e6)
    assert log_axis([]) == {"type": "log"}


def test_room_is_a_share_of_what_the_values_span() -> None:
    low, high = log_axis([1.0, 100.0], room=0.25)["range"]
    assert math.isclose(low, -0.5)
    assert math.isclose(high, 2.5)
