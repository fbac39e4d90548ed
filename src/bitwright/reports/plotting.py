"""Charts as data for plotly.js: what all of them are made of.

A colour is written as the name of a CSS variable (`--c0`); the page's script puts its value in, and does so again when
the reader turns the page dark or prints it.
"""

import html
import math
from collections.abc import Sequence
from typing import Any, cast

from bitwright.reports.entries import Figure, is_finite

Chart = dict[str, Any]
NUM_COLOURS = 8
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


def drawable(value: Figure) -> float | None:
    """What JSON can carry of a figure."""
    return round(cast(float, value), 4) if is_finite(value) else None


def compact(value: Figure) -> float | None:
    """What JSON can carry of a figure that may be small: five digits of it."""
    return float(f"{value:.5g}") if is_finite(value) else None


def plain(value: str) -> str:
    """Keep plotly, which reads a few HTML tags in labels, from reading any in a name."""
    return html.escape(value, quote=False)
