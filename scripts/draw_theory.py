"""Draw the figures of the theory page and compute its tables anew.

    python scripts/draw_theory.py

Writes docs/theory/*.svg and the tables between the markers of docs/theory/quantization.md. Everything is computed by
`bitwright.numerics`; nothing depends on chance, so that a second run changes nothing.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import theory_tables
from theory_tables import GAUSSIAN, LAPLACE, PAGE, best_table, float_levels, group_bits, minmax_db, uniform_db

from bitwright.numerics import bounds, group_theory, theory
from bitwright.numerics.lloyd_max import optimal_levels
from bitwright.numerics.minifloat import E2M1, E4M3, E5M2
from bitwright.numerics.table import NF4

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
# Colours that people with a colour-vision deficiency can tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")
INK, FAINT = "#333333", "#dddddd"

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A linear or logarithmic axis.

    Args:
        label: quantity and unit.
        ticks: where to write a number; the first and the last are the ends of the axis.
        log: whether distances are ratios.
    """

    label: str
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float, start: float, stop: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return start + share * (stop - start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve.

    Args:
        name: in the legend.
        points: in data units; those beyond the axes are cut off.
        dashed: for bounds and limits.
        marked: whether each point gets a dot.
    """

    name: str
    points: Sequence[Point]
    dashed: bool = False
    marked: bool = False


def chart(x: Axis, y: Axis, lines: Sequence[Line], *, legend: Point) -> str:
    """An SVG of curves; `legend` is its upper left corner as shares of the plot's width and height."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [_frame(x, y)]
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x.place(a, LEFT, right), y.place(b, bottom, TOP)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash} clip-path="url(#p)"/>'
        )
        if line.marked:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}" clip-path="url(#p)"/>' for a, b in places
            ]
        left, top = LEFT + legend[0] * (right - LEFT), TOP + legend[1] * (bottom - TOP) + 18 * index
        parts.append(f'<path d="M{left:.0f} {top:.0f}h24" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(_text(left + 30, top + 4, line.name))
    return _svg(parts)


def levels_chart(rows: Sequence[tuple[str, Sequence[float]]], reach: float) -> str:
    """An SVG of tables as rows of ticks under the density of the Gaussian."""
    right, low = WIDTH - RIGHT, 150
    axis = Axis(label="standard deviations", ticks=[float(tick) for tick in range(-int(reach), int(reach) + 1)])

    def place(value: float) -> float:
        return axis.place(value, LEFT + 90, right)

    grid = [-reach + 2 * reach * i / 160 for i in range(161)]
    curve = " ".join(f"{place(v):.1f},{low - 320 * GAUSSIAN.density(abs(v)):.1f}" for v in grid)
    parts = [f'<polyline points="{curve}" fill="none" stroke="{INK}" stroke-width="1.5"/>']
    for index, (name, levels) in enumerate(rows):
        colour, top = COLOURS[index], low + 16 + 34 * index
        parts.append(_text(LEFT + 70, top + 14, name, anchor="end"))
        ticks = "".join(f"M{place(level):.1f} {top}v20" for level in levels)
        parts.append(f'<path d="{ticks}" stroke="{colour}" stroke-width="2"/>')
    bottom = low + 16 + 34 * len(rows)
    parts.append(f'<path d="M{place(-reach):.1f} {bottom}H{right}" stroke="{INK}"/>')
    parts += [_text(place(tick), bottom + 18, f"{tick:g}", anchor="middle") for tick in axis.ticks]
    parts.append(_text((LEFT + 90 + right) / 2, bottom + 38, axis.label, anchor="middle"))
    return _svg(parts)


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<clipPath id="p"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/></clipPath>']
    for tick in x.ticks:
        place = x.place(tick, LEFT, right)
        parts.append(f'<path d="M{place:.1f} {TOP}V{bottom}" stroke="{FAINT}"/>')
        parts.append(_text(place, bottom + 18, f"{tick:g}", anchor="middle"))
    for tick in y.ticks:
        place = y.place(tick, bottom, TOP)
        parts.append(f'<path d="M{LEFT} {place:.1f}H{right}" stroke="{FAINT}"/>')
        parts.append(_text(LEFT - 8, place + 4, f"{tick:g}", anchor="end"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 10, x.label, anchor="middle"))
    middle = (TOP + bottom) / 2
    parts.append(f'<g transform="rotate(-90 16 {middle:.0f})">{_text(16, middle, y.label, anchor="middle")}</g>')
    return "\n".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"',
            f'  font-family="sans-serif" font-size="13" fill="{INK}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def clip_figure() -> str:
    """Rounding against clipping at 4 bits."""
    clips = [0.5 + 0.05 * i for i in range(91)]
    errors = [theory.levels_error(GAUSSIAN, theory.uniform_levels(4, clip)) for clip in clips]
    lines = [
        Line(name="rounding", points=[(c, e.rounding) for c, e in zip(clips, errors, strict=True)]),
        Line(
            name="clipping", points=[(c, e.clipping) for c, e in zip(clips, errors, strict=True) if e.clipping > 1e-6]
        ),
        Line(name="both", points=[(c, e.total) for c, e in zip(clips, errors, strict=True)]),
    ]
    x = Axis(label="outermost level c, standard deviations", ticks=[0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5])
    y = Axis(label="mean squared error, Gaussian, 4 bits", ticks=[1e-4, 1e-3, 1e-2, 1e-1, 1], log=True)
    return chart(x, y, lines, legend=(0.7, 0.06))


def bits_figure() -> str:
    """What a bit is worth."""
    bits = range(1, 9)
    fine = [1 + 0.25 * i for i in range(29)]
    lines = [
        Line(
            name="Shannon's bound, Gaussian",
            points=[(b, theory.sqnr_db(bounds.shannon_mse(GAUSSIAN, bits=b))) for b in fine],
            dashed=True,
        ),
        Line(
            name="uniform, entropy-coded, Gaussian",
            points=[(b, theory.sqnr_db(bounds.entropy_coded(GAUSSIAN, bits=b).mse)) for b in fine],
        ),
        Line(
            name="Lloyd-Max, Gaussian",
            points=[(b, theory.sqnr_db(optimal_levels(GAUSSIAN, b).mse)) for b in range(1, 7)],
            marked=True,
        ),
        Line(name="uniform, best clip, Gaussian", points=[(b, uniform_db(GAUSSIAN, b)) for b in bits], marked=True),
        Line(name="uniform, best clip, Laplace", points=[(b, uniform_db(LAPLACE, b)) for b in bits], marked=True),
    ]
    x = Axis(label="bits per weight", ticks=list(bits))
    return chart(x, Axis(label="SQNR, dB", ticks=[0, 10, 20, 30, 40, 50]), lines, legend=(0.04, 0.06))


def groups_figure() -> str:
    """Min-max groups against bits per weight, scales included."""
    sizes = (("g16", 16), ("g32", 32), ("g64", 64), ("g128", 128), ("one scale per 4096", 4096))
    lines = [
        Line(
            name=name,
            points=[(group_bits(b, size), minmax_db(LAPLACE, b, size, "asymmetric")) for b in (2, 3, 4, 5, 6)],
            marked=True,
        )
        for name, size in sizes
    ]
    x = Axis(label="bits per weight, with scale and zero point", ticks=[2, 3, 4, 5, 6, 7])
    return chart(x, Axis(label="SQNR, dB, Laplace, min-max", ticks=[0, 10, 20, 30, 40]), lines, legend=(0.04, 0.06))


def levels_figure() -> str:
    """Four 4-bit tables, each where it serves groups of 64 or a whole Gaussian."""
    largest = group_theory.expected_absmax(GAUSSIAN, 64)
    rows = [
        ("INT4", [largest * code / 7 for code in range(-7, 8)]),
        ("FP4", [largest * level / 6 for level in float_levels(E2M1)]),
        ("NF4", [largest * level for level in NF4.levels]),
        ("best for g64", [largest * level for level in best_table(GAUSSIAN)]),
        ("Lloyd-Max", optimal_levels(GAUSSIAN, 4).levels),
    ]
    return levels_chart(rows, 3.0)


def magnitude_figure() -> str:
    """SQNR of 8-bit formats when the size of the inputs is off."""
    octaves = [-14 + 0.25 * i for i in range(93)]
    tables = [("INT8", tuple(range(-127, 128))), ("FP8 E4M3", float_levels(E4M3)), ("FP8 E5M2", float_levels(E5M2))]
    best = 127 * theory.optimal_scale(GAUSSIAN, range(-127, 128))
    lines: list[Line] = []
    for name, levels in tables:
        # What the largest level is worth: INT8's best range, and room for the floats.
        reach = best if name == "INT8" else 16.0
        errors = [theory.levels_mse(GAUSSIAN, levels, scale=reach / max(levels) * 2.0**-octave) for octave in octaves]
        points = [(octave, theory.sqnr_db(error)) for octave, error in zip(octaves, errors, strict=True)]
        lines.append(Line(name=name, points=points))
    x = Axis(label="size of Gaussian inputs, octaves", ticks=[-14, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8])
    return chart(x, Axis(label="SQNR, dB", ticks=[0, 10, 20, 30, 40, 50]), lines, legend=(0.04, 0.06))


FIGURES: dict[str, Callable[[], str]] = {
    "clip.svg": clip_figure,
    "bits.svg": bits_figure,
    "groups.svg": groups_figure,
    "levels.svg": levels_figure,
    "magnitude.svg": magnitude_figure,
}


def main() -> None:
    for name, draw in FIGURES.items():
        (PAGE.parent / name).write_text(draw(), encoding="utf-8")
    PAGE.write_text(theory_tables.filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
