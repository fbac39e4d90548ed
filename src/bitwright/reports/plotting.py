"""Charts as data for plotly.js: what all of them are made of.

A colour is written as the name of a CSS variable (`--c0`); the page's script puts its value in, and does so again when
the reader turns the page dark or prints it.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from bitwright.reports import wording
from bitwright.reports.entries import Figure, is_finite

Chart = dict[str, Any]
NUM_COLOURS = 8
_FEWEST_TICKS = 3
_LEAST_ROOM, _ROOM_ALONE = 0.05, 0.3  # decades at either end
_LOG_STEPS = (
    (1.0,), (1.0, 2.0, 5.0), tuple(map(float, range(1, 10))), tuple(step / 2 for step in range(2, 20)),
    tuple(step / 5 for step in range(5, 50)), tuple(step / 10 for step in range(10, 100)),
    tuple(step / 20 for step in range(20, 200)),
)  # fmt: skip
"""Where the ticks of a decade may stand, from far apart to close."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")


def series(kind: str, x: Sequence[Any], y: Sequence[Any], labels: Sequence[str], *, colour: int) -> dict[str, Any]:
    """One trace with a text per mark; from the colour's number also follows its symbol."""
    name = f"--c{colour % NUM_COLOURS}"
    trace: dict[str, Any] = {"type": kind, "x": x, "y": y, "hovertext": labels, "hoverinfo": "text"}
    if kind == "bar":
        return {**trace, "marker": {"color": name}}
    marker = {"color": name, "symbol": SYMBOLS[(colour + colour // NUM_COLOURS) % NUM_COLOURS], "size": 7}
    return {**trace, "marker": marker, "line": {"color": name, "width": 2}}


def framed(traces: list[dict[str, Any]], x: dict[str, Any], y: str) -> Chart:
    """Traces in axes: all of the one across, the title of the one upwards."""
    return {"data": traces, "layout": {"showlegend": False, "xaxis": x, "yaxis": {"title": {"text": y}}}}


def block_axis(num_blocks: int) -> dict[str, Any]:
    """Whole block numbers, with half a block of air at either end."""
    step = max(1, 10 ** math.ceil(math.log10(max(num_blocks, 1) / 15)))
    return {"title": {"text": "Block"}, "range": [-0.5, max(num_blocks, 1) - 0.5], "tick0": 0, "dtick": step}


def log_axis(
    values: Sequence[float], *, room: float = 0.05, label: Callable[[float], str] = wording.number
) -> dict[str, Any]:
    """A logarithmic axis over positive values, with whole figures at its ticks: plotly would write 2 for 0.2.

    Args:
        values: that are drawn.
        room: at either end, as a share of what they span.
        label: of a tick.
    """
    axis: dict[str, Any] = {"type": "log"}
    if not values:
        return axis
    ends = [math.log10(min(values)), math.log10(max(values))]
    span = ends[1] - ends[0]
    margin = max(room * span, _LEAST_ROOM) if span else _ROOM_ALONE
    low, high = ends[0] - margin, ends[1] + margin
    decades, ticks = range(math.floor(low), math.ceil(high)), list[float]()
    for steps in _LOG_STEPS:
        ticks = [x for decade in decades for step in steps if low <= math.log10(x := step * 10.0**decade) <= high]
        if len(ticks) >= _FEWEST_TICKS:
            break
    return {**axis, "range": [low, high], "tickvals": ticks, "ticktext": [label(float(f"{x:.3g}")) for x in ticks]}


def padded(values: Sequence[float], *, alone: float) -> dict[str, Any]:
    """An axis range with room for the labels beside the outermost points; `alone`: as a share of a single value."""
    if not values:
        return {}
    room = 0.22 * (max(values) - min(values)) or alone * abs(values[0]) or 1.0
    return {"range": [min(values) - room, max(values) + room]}


def drawable(value: Figure) -> float | None:
    """What JSON can carry of a figure."""
    return round(cast(float, value), 4) if is_finite(value) else None


def compact(value: Figure) -> float | None:
    """What JSON can carry of a figure that may be small: five digits of it."""
    return float(f"{value:.5g}") if is_finite(value) else None


def plain(value: str) -> str:
    """Keep plotly, which reads a few HTML tags in labels, from reading any in a name."""
    return html.escape(value, quote=False)
