"""Charts as data for plotly.js: traces and axis titles here, colours and fonts from the page's style sheet.

A colour is written as the name of a CSS variable (`--c0`); the page's script puts its value in, and does so again when
the reader's system turns dark or the page is printed.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from bitwright.reports import wording
from bitwright.reports.facts import BlockFact, Figure, SiteFact, is_finite

Chart = dict[str, Any]
NUM_COLOURS = 8
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
MEASURES = {"output_sqnr_db": "output", "weight_sqnr_db": "weights"}
# Title of a figure's axis, and whether its scale is always logarithmic.
AXES = {
    "bits_per_weight": ("Bits per weight", False),
    "kl_mean": ("KL divergence (nats/token)", True),
    "perplexity": ("Perplexity", False),
    "seconds": ("Seconds to quantize", True),
    "peak_memory_bytes": ("Peak memory (bytes)", False),
}
ERRORS = {"kl_mean": "kl_stderr", "perplexity": "perplexity_stderr"}
_LAST_INDEX = re.compile(r"\[\d+\]$")


def depth_chart(blocks: Sequence[BlockFact]) -> Chart:
    """Signal to noise of the hidden state after each block."""
    values = [_drawable(block.hidden_sqnr_db) for block in blocks]
    labels = [f"<b>{plain(block.block)}</b><br>{wording.decibel(block.hidden_sqnr_db)}" for block in blocks]
    trace = _trace("scatter", list(range(len(blocks))), values, labels, colour=0)
    return _chart([{**trace, "mode": "lines+markers"}], _block_axis(len(blocks)), "Hidden-state SQNR (dB)")


def time_chart(blocks: Sequence[BlockFact]) -> Chart:
    """Seconds per block."""
    values = [_drawable(block.seconds) for block in blocks]
    labels = [f"<b>{plain(block.block)}</b><br>{wording.duration(block.seconds)}" for block in blocks]
    trace = _trace("bar", list(range(len(blocks))), values, labels, colour=0)
    chart = _chart([trace], _block_axis(len(blocks)), "Seconds")
    chart["layout"]["yaxis"]["rangemode"] = "tozero"
    return chart


def site_chart(sites: Sequence[SiteFact], block_order: Mapping[str, int], measure: str) -> Chart:
    """One mark per block and role (`q_proj`, `down_proj`, …): its worst site, so that experts do not bury the page."""
    worst: dict[str, dict[str, SiteFact]] = {}
    members: dict[tuple[str, str], int] = {}
    for site in sites:
        kind = role(site.site)
        members[kind, site.block] = members.get((kind, site.block), 0) + 1
        value = getattr(site, measure)
        if not is_finite(value):
            continue
        best = worst.setdefault(kind, {}).get(site.block)
        if best is None or value < getattr(best, measure):
            worst[kind][site.block] = site
    traces: list[dict[str, Any]] = []
    for index, (kind, by_block) in enumerate(worst.items()):
        found = sorted(by_block.values(), key=lambda site: block_order[site.block])
        trace = _trace(
            "scatter",
            [block_order[site.block] for site in found],
            [_drawable(getattr(site, measure)) for site in found],
            [_site_label(site, members[kind, site.block]) for site in found],
            colour=index,
        )
        traces.append({**trace, "mode": "markers", "name": plain(kind)})
    chart = _chart(traces, _block_axis(len(block_order)), f"SQNR of the {MEASURES[measure]} (dB)")
    chart["layout"]["showlegend"] = True
    return chart


def role(site: str) -> str:
    """The last part of a site's name without an expert's number: sites of one role do the same job in every block."""
    return _LAST_INDEX.sub("", site).rsplit(".", 1)[-1]


def pareto_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Bits per weight against KL divergence on a log scale, and the line that no row lies below."""
    drawn = [row for row in rows if _is_positive(row.get("kl_mean")) and is_finite(row.get("bits_per_weight"))]
    drawn.sort(key=lambda row: (row["bits_per_weight"], row["kl_mean"]))
    best = _frontier(drawn, "kl_mean")
    frontier = _frontier_trace(best, "bits_per_weight", "kl_mean", colour=1)
    points = _trace(
        "scatter",
        [row["bits_per_weight"] for row in drawn],
        [row["kl_mean"] for row in drawn],
        [_row_label(row) for row in drawn],
        colour=0,
    )
    points.update(
        mode="markers+text",
        text=[plain(str(row.get("name", ""))) for row in drawn],
        textposition=["bottom left" if row in best else "top right" for row in drawn],
        cliponaxis=False,
        error_y=_error_bars(drawn, "kl_mean", "--c0"),
    )
    axis = {"title": {"text": "Bits per weight"}, **_padded([row["bits_per_weight"] for row in drawn])}
    chart = _chart([frontier, points], axis, "KL divergence (nats/token)")
    chart["layout"]["yaxis"].update(
        type="log", dtick=1, exponentformat="none", **_padded([math.log10(row["kl_mean"]) for row in drawn])
    )
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
        trace = _trace(
            "scatter", [row[x] for row in of_method], [row[y] for row in of_method],
            [row["label"] for row in of_method], colour=index,
        )  # fmt: skip
        bars = _error_bars(of_method, y, trace["marker"]["color"])
        trace["marker"]["size"] = 9
        traces.append({**trace, "mode": "markers", "name": plain(method), "error_y": bars})
    across, up = _figure_axis([row[x] for row in drawn], x), _figure_axis([row[y] for row in drawn], y)
    chart = _chart(traces, across, AXES[y][0])
    chart["layout"]["yaxis"].update(up)
    chart["layout"]["showlegend"] = True
    level = reference.get(y)
    if _is_positive(level):
        line = {"color": "--soft", "width": 1, "dash": "dash"}
        span = {"xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        chart["layout"]["shapes"] = [{"type": "line", "line": line, **span}]
    return chart


def _figure_axis(values: Sequence[float], name: str) -> dict[str, Any]:
    """Title and scale: logarithmic always, or where the values span more than a decade."""
    title, always = AXES[name]
    axis: dict[str, Any] = {"title": {"text": title}}
    ratio = max(values) / min(values) if values else 1.0
    if always or ratio > 10:
        axis.update(type="log", exponentformat="SI" if name.endswith("bytes") else "none")
        if ratio > 10:
            axis["dtick"] = 1 if ratio > 100 else "D2"
    return axis


def _frontier(rows: Sequence[Mapping[str, Any]], y: str) -> list[Mapping[str, Any]]:
    """The rows, of some sorted by another figure and then by y, that no other beats in both."""
    best: list[Mapping[str, Any]] = []
    for row in rows:
        if not best or row[y] < best[-1][y]:
            best.append(row)
    return best


def _frontier_trace(best: Sequence[Mapping[str, Any]], x: str, y: str, *, colour: int) -> dict[str, Any]:
    trace = _trace("scatter", [row[x] for row in best], [row[y] for row in best], [], colour=colour)
    line = {"color": f"--c{colour}", "width": 1.5, "dash": "dot"}
    return {**trace, "mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": line}


def _padded(values: Sequence[float]) -> dict[str, Any]:
    """An axis range with room for the labels beside the outermost points."""
    if not values:
        return {}
    room = 0.22 * (max(values) - min(values)) or 1.0
    return {"range": [min(values) - room, max(values) + room]}


def _error_bars(rows: Sequence[Mapping[str, Any]], name: str, colour: str) -> dict[str, Any]:
    """Standard errors; downwards they end above zero, which a log scale does not have."""
    stderr = ERRORS[name]
    errors = [row[stderr] if is_finite(row.get(stderr)) else 0.0 for row in rows]
    down = [min(error, 0.9 * row[name]) for error, row in zip(errors, rows, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": errors, "arrayminus": down}
    return {**bars, "color": colour, "thickness": 1, "width": 3}


def _is_positive(value: Figure) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _row_label(row: Mapping[str, Any]) -> str:
    return (
        f"<b>{plain(str(row.get('name', '')))}</b><br>{wording.fixed(row['bits_per_weight'], 3)} bits per weight"
        f"<br>KL {wording.with_stderr(row['kl_mean'], row.get('kl_stderr'))} nats/token"
        f"<br>{wording.size(row.get('size_bytes'))}"
    )


def _site_label(site: SiteFact, num_members: int) -> str:
    lines = [f"<b>{plain(site.site)}</b>"]
    if num_members > 1:
        lines.append(f"worst of {num_members} in this block")
    lines.append(f"output {wording.decibel(site.output_sqnr_db)}, weights {wording.decibel(site.weight_sqnr_db)}")
    lines.append(f"{plain(site.scheme)} by {plain(site.method)}, {wording.fixed(site.bits_per_weight, 3)} bits/weight")
    return "<br>".join(lines)


def _trace(kind: str, x: Sequence[Any], y: Sequence[Any], labels: Sequence[str], *, colour: int) -> dict[str, Any]:
    name = f"--c{colour % NUM_COLOURS}"
    trace: dict[str, Any] = {"type": kind, "x": x, "y": y, "hovertext": labels, "hoverinfo": "text"}
    if kind == "bar":
        return {**trace, "marker": {"color": name}}
    marker = {"color": name, "symbol": SYMBOLS[(colour + colour // NUM_COLOURS) % NUM_COLOURS], "size": 7}
    return {**trace, "marker": marker, "line": {"color": name, "width": 2}}


def _chart(traces: list[dict[str, Any]], x: dict[str, Any], y: str) -> Chart:
    return {"data": traces, "layout": {"showlegend": False, "xaxis": x, "yaxis": {"title": {"text": y}}}}


def _block_axis(num_blocks: int) -> dict[str, Any]:
    """Whole block numbers, with half a block of air at either end."""
    step = max(1, 10 ** math.ceil(math.log10(max(num_blocks, 1) / 15)))
    return {"title": {"text": "Block"}, "range": [-0.5, max(num_blocks, 1) - 0.5], "tick0": 0, "dtick": step}


def _drawable(value: Figure) -> float | None:
    return round(cast(float, value), 4) if is_finite(value) else None


def plain(value: str) -> str:
    """Keep plotly, which reads a few HTML tags in labels, from reading any in a name."""
    return html.escape(value, quote=False)
