"""Charts of several results: what each costs against what it loses, and the line that none lies below."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.reports import wording
from bitwright.reports.entries import Figure, is_finite
from bitwright.reports.plotting import Chart, framed, log_axis, padded, plain, series

# Title of a figure's axis, and whether its scale is always logarithmic.
AXES = {
    "bits_per_weight": ("Bits per weight", False),
    "kl_mean": ("KL divergence (nats/token)", True),
    "perplexity": ("Perplexity", False),
    "seconds": ("Seconds to quantize", True),
    "peak_memory_bytes": ("Peak memory (bytes)", False),
    "size_bytes": ("Size (bytes)", False),
    "memory_bytes": ("Peak memory to run (bytes)", False),
    "decode_tokens_per_s": ("Tokens written per second", False),
    "decode_j_per_token": ("Energy per token (J)", False),
}
ERRORS = {"kl_mean": "kl_stderr", "perplexity": "perplexity_stderr"}
SPREADS = {"decode_tokens_per_s": ("decode_slowest", "decode_fastest")}
"""Rows may have the ends of a figure's repetitions under these names."""
MORE_IS_BETTER = ("decode_tokens_per_s",)


def pareto_chart(rows: Sequence[Mapping[str, Any]], x: str = "bits_per_weight") -> Chart:
    """A cost or a gain of several results against their KL divergence on a log scale, and the line no row lies below.

    Args:
        rows: figures with `name`; those without one of the two figures are left out.
        x: name of a figure of AXES.
    """
    drawn = [row for row in rows if _is_positive(row.get("kl_mean")) and is_finite(row.get(x))]
    drawn.sort(key=lambda row: (-row[x] if x in MORE_IS_BETTER else row[x], row["kl_mean"]))
    best = _frontier(drawn, "kl_mean")
    frontier = _frontier_trace(best, x, "kl_mean", colour=1)
    labels = [_row_label(row) for row in drawn]
    points = series("scatter", [row[x] for row in drawn], [row["kl_mean"] for row in drawn], labels, colour=0)
    points.update(
        mode="markers+text",
        text=[plain(str(row.get("name", ""))) for row in drawn],
        textposition=["bottom left" if row in best else "top right" for row in drawn],
        cliponaxis=False,
        error_x=_spread_bars(drawn, x, "--c0"),
        error_y=_error_bars(drawn, "kl_mean", "--c0"),
    )
    axis: dict[str, Any] = {"title": {"text": AXES[x][0]}, **padded([row[x] for row in drawn], alone=0.3)}
    if x.endswith("bytes"):
        axis["exponentformat"] = "SI"
    chart = framed([frontier, points], axis, "KL divergence (nats/token)")
    chart["layout"]["yaxis"].update(log_axis(_ends(drawn, "kl_mean"), room=0.22))
    return chart


def grid_chart(rows: Sequence[Mapping[str, Any]], x: str, y: str, reference: Mapping[str, Any]) -> Chart:
    """One mark per cell and one colour per method, two figures against each other, and the line no cell lies below.

    Args:
        rows: figures with `method` and `label`, the text of the mark.
        x: name of a figure of AXES.
        y: likewise.
        reference: figures of the original; its `y`, where it is above 0, becomes a line across the chart.
    """
    drawn = [row for row in rows if _is_positive(row.get(x)) and _is_positive(row.get(y))]
    drawn.sort(key=lambda row: (row[x], row[y]))
    traces = [_frontier_trace(_frontier(drawn, y), x, y, colour=7)]
    for index, method in enumerate(sorted({str(row["method"]) for row in rows})):
        of_method = [row for row in drawn if row["method"] == method]
        trace = series(
            "scatter", [row[x] for row in of_method], [row[y] for row in of_method],
            [row["label"] for row in of_method], colour=index,
        )  # fmt: skip
        bars = _error_bars(of_method, y, trace["marker"]["color"])
        trace["marker"]["size"] = 9
        traces.append({**trace, "mode": "markers", "name": plain(method), "error_y": bars})
    level = reference.get(y)
    reach = _ends(drawn, y)
    chart = framed(traces, _figure_axis([row[x] for row in drawn], x), AXES[y][0])
    chart["layout"]["showlegend"] = True
    if level is not None and _is_positive(level):
        reach.append(level)
        line = {"color": "--soft", "width": 1, "dash": "dash"}
        span = {"xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        chart["layout"]["shapes"] = [{"type": "line", "line": line, **span}]
    chart["layout"]["yaxis"].update(_figure_axis(reach, y))
    return chart


def _figure_axis(values: Sequence[float], name: str) -> dict[str, Any]:
    """Title and scale: logarithmic always, or where the values span more than a decade."""
    title, always = AXES[name]
    axis: dict[str, Any] = {"title": {"text": title}}
    ratio = max(values) / min(values) if values else 1.0
    if always or ratio > 10:
        axis.update(log_axis(values, label=wording.size if name.endswith("bytes") else wording.number))
    return axis


def _frontier(rows: Sequence[Mapping[str, Any]], y: str) -> list[Mapping[str, Any]]:
    """The rows, of some sorted by another figure and then by y, that no other beats in both."""
    best: list[Mapping[str, Any]] = []
    for row in rows:
        if not best or row[y] < best[-1][y]:
            best.append(row)
    return best


def _frontier_trace(best: Sequence[Mapping[str, Any]], x: str, y: str, *, colour: int) -> dict[str, Any]:
    trace = series("scatter", [row[x] for row in best], [row[y] for row in best], [], colour=colour)
    line = {"color": f"--c{colour}", "width": 1.5, "dash": "dot"}
    return {**trace, "mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": line}


def _error_bars(rows: Sequence[Mapping[str, Any]], name: str, colour: str) -> dict[str, Any]:
    """Standard errors; downwards they end above zero, which a log scale does not have."""
    errors, down = _errors(rows, name)
    bars = {"type": "data", "symmetric": False, "array": errors, "arrayminus": down}
    return {**bars, "color": colour, "thickness": 1, "width": 3}


def _errors(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Standard errors upwards and downwards."""
    stderr = ERRORS[name]
    errors = [row[stderr] if is_finite(row.get(stderr)) else 0.0 for row in rows]
    return errors, [min(error, 0.9 * row[name]) for error, row in zip(errors, rows, strict=True)]


def _ends(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """How far figures and their bars reach, up and down."""
    up, down = _errors(rows, name) if name in ERRORS else ([0.0] * len(rows), [0.0] * len(rows))
    return [end for row, more, less in zip(rows, up, down, strict=True) for end in (row[name] + more, row[name] - less)]


def _spread_bars(rows: Sequence[Mapping[str, Any]], name: str, colour: str) -> dict[str, Any]:
    """From the slowest repetition to the fastest, where they are known."""
    low, high = SPREADS.get(name, ("", ""))
    down = [row[name] - row[low] if is_finite(row.get(low)) else 0.0 for row in rows]
    up = [row[high] - row[name] if is_finite(row.get(high)) else 0.0 for row in rows]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return {**bars, "color": colour, "thickness": 1, "width": 3}


def _is_positive(value: Figure) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _row_label(row: Mapping[str, Any]) -> str:
    return (
        f"<b>{plain(str(row.get('name', '')))}</b><br>{wording.fixed(row['bits_per_weight'], 3)} bits per weight"
        f"<br>KL {wording.with_stderr(row['kl_mean'], row.get('kl_stderr'))} nats/token"
        f"<br>{wording.size(row.get('size_bytes'))}"
    )
