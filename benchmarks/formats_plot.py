"""A scatter plot of measured rows as SVG: bits per weight against KL divergence on a log scale, Pareto set drawn."""

import html
import math
from collections.abc import Sequence

from formats_rows import Row, pareto_set

WIDTH, HEIGHT = 960, 620
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 70, 52
CHARACTER = 6.1
"""Width of a character of a label."""
COLOURS = {
    "integer": "#0072b2", "fixed table": "#d55e00", "learned table": "#009e73", "float": "#cc79a7",
    "block-scaled": "#e69f00", "1 to 1.6 bits": "#666666",
}  # fmt: skip
SHAPES = {"rtn": "circle", "absmax": "cross", "weighted": "triangle", "gptq": "square"}


def scatter(rows: Sequence[Row], title: str) -> str:
    """Return the text of an SVG file; every mark has its row as a tooltip, the Pareto set has labels."""
    axes = _Axes(rows)
    best = pareto_set(rows)
    line = " ".join(f"{axes.x(row.bits):.1f},{axes.y(row.kl_mean):.1f}" for row in best)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="16">{html.escape(title)}</text>',
        *_legend(),
        *axes.draw(),
        f'<polyline points="{line}" fill="none" stroke="#222" stroke-dasharray="3 3"/>',
        *(_mark(row, axes) for row in rows),
        *_labels(best, axes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axes:
    """Where a row lies on the page."""

    def __init__(self, rows: Sequence[Row]) -> None:
        bits = [row.bits for row in rows]
        exponents = [math.log10(row.kl_mean) for row in rows]
        self.low_bits, self.high_bits = math.floor(min(bits)), math.ceil(max(bits) + 0.2)
        self.low, self.high = math.floor(min(exponents)), math.ceil(max(exponents))

    def x(self, bits: float) -> float:
        return LEFT + (bits - self.low_bits) / (self.high_bits - self.low_bits) * (WIDTH - LEFT - RIGHT)

    def y(self, kl: float) -> float:
        share = (math.log10(kl) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> list[str]:
        """Grid lines, ticks and titles."""
        bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, list[str]()
        for bits in range(self.low_bits, self.high_bits + 1):
            x = self.x(bits)
            parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{bits}</text>')
        for exponent in range(self.low, self.high + 1):
            y = self.y(10.0**exponent)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>')
        middle = (TOP + bottom) / 2
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">Bits per weight</text>')
        parts.append(
            f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
            "KL divergence (nats per token)</text>"
        )
        return parts


def _mark(row: Row, axes: _Axes) -> str:
    x, y, colour = axes.x(row.bits), axes.y(row.kl_mean), COLOURS[row.family]
    about = f"{row.scheme} {row.method}: {row.bits:.3f} bits, KL {row.kl_mean:.5f} ± {row.kl_stderr:.5f}"
    return f'<g fill="{colour}" stroke="{colour}"><title>{html.escape(about)}</title>{_shape(row.method, x, y)}</g>'


def _shape(method: str, x: float, y: float) -> str:
    shape = SHAPES[method]
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    if shape == "square":
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    if shape == "triangle":
        return f'<path d="M{x:.1f} {y - 4:.1f}l4 7h-8z"/>'
    return f'<path d="M{x - 3.2:.1f} {y - 3.2:.1f}l6.4 6.4m0 -6.4l-6.4 6.4" stroke-width="1.6"/>'


def _legend() -> list[str]:
    parts: list[str] = []
    x = float(LEFT)
    for family, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="36" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="45">{family}</text>')
        x += 32 + 7 * len(family)
    x = float(LEFT)
    for method in SHAPES:
        parts.append(f'<g fill="#222" stroke="#222">{_shape(method, x + 5, 58)}</g>')
        parts.append(f'<text x="{x + 15:.0f}" y="62">{method}</text>')
        x += 32 + 7 * len(method)
    parts.append(f'<text x="{x:.0f}" y="62" fill="#555">dashed: Pareto set; scales and tables included</text>')
    return parts


def _labels(rows: Sequence[Row], axes: _Axes) -> list[str]:
    """Names below left of their marks, where no other of the Pareto set lies; one that would overlap is left out."""
    taken: list[tuple[float, float, float]] = []
    parts: list[str] = []
    for row in rows:
        name = f"{row.scheme} {row.method}"
        x, y, width = axes.x(row.bits) - 7, axes.y(row.kl_mean) + 11, CHARACTER * len(name)
        overlaps = any(x - width < end and begin < x and abs(y - other) < 11 for begin, end, other in taken)
        if overlaps or x - width < LEFT:
            continue
        taken.append((x - width, x, y))
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end" font-size="10">{html.escape(name)}</text>')
    return parts
