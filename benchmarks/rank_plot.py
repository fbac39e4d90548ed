"""Rank against perplexity as SVG: a line per kind of adapter, on a logarithmic axis of ranks."""

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 110, 40, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def rank_plot(lines: Mapping[str, Sequence[tuple[int, float]]], levels: Mapping[str, float], title: str) -> str:
    """Return the text of an SVG file.

    Args:
        lines: name -> (rank, perplexity), in order of ranks.
        levels: name -> perplexity, drawn over the whole width.
        title: above the plot.
    """
    points = [point for line in lines.values() for point in line]
    values = [value for _, value in points] + list(levels.values())
    low, high = min(values), max(values)
    margin = 0.08 * (high - low)
    low, high = low - margin, high + margin
    widest = max(1.0, math.log2(max(rank for rank, _ in points)))

    def x(rank: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(rank) / widest

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{title}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">rank</text>',
    ]
    parts += [
        f'<text x="{x(rank):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{rank}</text>'
        for rank in sorted({rank for rank, _ in points})
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>',
        ]
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
        path = " ".join(f"{x(rank):.1f},{y(value):.1f}" for rank, value in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for rank, value in line:
            parts.append(
                f'<circle cx="{x(rank):.1f}" cy="{y(value):.1f}" r="4" fill="{colour}"><title>{name}, rank {rank}: '
                f"{value:.3f}</title></circle>"
            )
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y(line[-1][1]) + 4:.1f}" fill="{colour}">{name}</text>')
    for name, value in levels.items():
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#222" '
            'stroke-dasharray="4 4"/>',
            f'<text x="{WIDTH - RIGHT + 8}" y="{y(value) + 4:.1f}">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
