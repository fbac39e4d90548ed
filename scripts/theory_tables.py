"""The tables of docs/theory/quantization.md, computed: each function returns what stands between its markers.

    <!-- table: name -->
    ...
    <!-- end -->

`scripts/draw_theory.py` puts them in; a test compares. `quoted` holds the numbers that the prose states on its own,
`PRINTED` those that it repeats from others.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from bitwright.numerics import bounds, group_theory, theory
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, UNIFORM, Distribution, student_t
from bitwright.numerics.entropy import allocation_gain_db, reverse_water_filling
from bitwright.numerics.lloyd_max import optimal_levels
from bitwright.numerics.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, MinifloatFormat
from bitwright.numerics.table import NF4

PAGE = Path(__file__).resolve().parent.parent / "docs" / "theory" / "quantization.md"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# A clip of the literature, a constant of TWN, a quantile of the reports, and figures of the founding texts.
PRINTED = {"2.55", "0.7", "99.9", "3.5", "4.8"}

STUDENT_T5 = student_t(5)
SCALE_BITS, ZERO_BITS = 16, 4
ROW, TENSOR = 4096, 2**24
OUTLIERS = (10, 30, 100, 300, 1000)
VARIANCES = (4.0, 1.0, 0.25, 0.01)
# The weights that one founding text shows as quantized to 4 bits, and the codes it shows.
SHOWN_WEIGHTS, SHOWN_CODES = (0.0234, 0.1567, -0.0891, 0.2103), (3, 20, -11, 27)


@cache
def best_table(distribution: Distribution) -> tuple[float, ...]:
    """The 16 levels with the least error in groups of 64 that the largest weight scales."""
    return group_theory.absmax_optimal_levels(distribution, 16, 64)


@cache
def float_levels(format: MinifloatFormat) -> tuple[float, ...]:
    magnitudes = format.decode(torch.arange(format.max_code + 1, dtype=torch.uint8), None).tolist()
    return tuple(sorted({sign * value for sign in (-1, 1) for value in magnitudes}))


@cache
def best_db(distribution: Distribution, levels: tuple[float, ...]) -> float:
    """SQNR of a table with the best scale."""
    scale = theory.optimal_scale(distribution, levels)
    return theory.sqnr_db(theory.levels_mse(distribution, levels, scale=scale))


@cache
def best_clip(distribution: Distribution, bits: int) -> float:
    return theory.optimal_clip(distribution, bits=bits)


@cache
def uniform_db(distribution: Distribution, bits: int) -> float:
    """SQNR of one uniform grid with the best clip."""
    return theory.predicted_sqnr_db(distribution, bits=bits, clip=best_clip(distribution, bits))


@cache
def minmax_db(distribution: Distribution, bits: int, group_size: int, kind: group_theory.MinMax) -> float:
    return theory.sqnr_db(group_theory.minmax_mse(distribution, bits=bits, group_size=group_size, kind=kind))


def group_bits(bits: int, group_size: int) -> float:
    """Bits per weight with a 16-bit scale and a zero point per group."""
    return bits + (SCALE_BITS + ZERO_BITS) / group_size


def rounding() -> str:
    rows: list[list[str]] = []
    cases = [(d, b, best_clip(d, b)) for d in (GAUSSIAN, LAPLACE) for b in (2, 3, 4, 8)]
    for d, bits, clip in [*cases, (GAUSSIAN, 2, 6.0), (GAUSSIAN, 8, 6.0)]:
        step = 2 * clip / (2**bits - 1)
        rule = theory.high_resolution_mse(d, lower=-clip, upper=clip, step=step)
        exact = theory.levels_error(d, theory.uniform_levels(bits, clip))
        numbers = (theory.rounding_mse(step), rule.rounding, exact.rounding, exact.clipping)
        off = 100 * (rule.rounding / exact.rounding - 1)
        rows.append([d.name, str(bits), f"{clip:.2f}", *map(scientific, numbers), f"{round(off, 1) + 0.0:.1f} %"])
    head = ["inputs", "bits", "c", "s²/12", "s²/12 · P(inside)", "rounding, exact", "clipping, exact", "rule is off by"]
    return markdown(head, rows)


def bits() -> str:
    rows: list[list[str]] = []
    for b in range(1, 9):
        row = [str(b), f"{uniform_db(UNIFORM, b):.2f}"]
        for d in (GAUSSIAN, LAPLACE):
            gain = f"{uniform_db(d, b) - uniform_db(d, b - 1):.2f}" if b > 1 else ""
            row += [f"{best_clip(d, b):.3f}", f"{uniform_db(d, b):.2f}", gain]
        levels = theory.uniform_levels(b, best_clip(GAUSSIAN, b))
        rows.append([*row, f"{theory.grid_entropy(GAUSSIAN, levels):.2f}"])
    head = [
        "bits",
        "uniform inputs dB",
        "Gaussian c",
        "dB",
        "gain",
        "Laplace c",
        "dB",
        "gain",
        "entropy of Gaussian codes",
    ]
    return markdown(head, rows)


def granularity() -> str:
    rows: list[list[str]] = []
    for name, size in [(f"g{2**k}", 2**k) for k in range(4, 10)] + [("row of 4096", ROW), ("tensor of 2^24", TENSOR)]:
        cost = theory.DB_PER_BIT * (group_bits(4, size) - 4)
        levels = [minmax_db(d, 4, size, "asymmetric") for d in (GAUSSIAN, LAPLACE)]
        extremes = [group_theory.expected_absmax(d, size) for d in (GAUSSIAN, LAPLACE, STUDENT_T5)]
        numbers = [*extremes, *levels, group_bits(4, size), *(level - cost for level in levels)]
        rows.append([name, *(f"{number:.2f}" for number in numbers)])
    head = ["scale per", "E max Gaussian", "Laplace", "Student t5", "INT4 dB Gaussian", "Laplace", "bits per weight"]
    return markdown([*head, "net dB Gaussian", "Laplace"], rows)


def codes() -> str:
    kinds: list[group_theory.MinMax] = ["restricted", "symmetric", "asymmetric"]
    rows = [
        [str(b), d.name, *(f"{minmax_db(d, b, 128, kind):.2f}" for kind in kinds), f"{uniform_db(d, b):.2f}"]
        for b in (2, 3, 4)
        for d in (GAUSSIAN, LAPLACE)
    ]
    head = ["bits", "inputs", "symmetric, restricted", "symmetric, full", "asymmetric", "one scale, best clip"]
    return markdown(head, rows)


def floats() -> str:
    rows: list[list[str]] = []
    for format in (E2M1, E3M2, E2M3, E5M2, E4M3):
        levels = float_levels(format)
        octaves = math.log2(format.max_value / format.min_normal)
        best = [best_db(d, levels) for d in (GAUSSIAN, LAPLACE, STUDENT_T5)]
        flat = theory.float_sqnr_db(format.mantissa_bits)
        rows.append(
            [format.name, f"{format.max_value:g}", f"{octaves:.1f}", f"{flat:.1f}", *(f"{x:.2f}" for x in best)]
        )
    rows += [
        [f"int{b}", "", "", "", *(f"{uniform_db(d, b):.2f}" for d in (GAUSSIAN, LAPLACE, STUDENT_T5))]
        for b in (4, 6, 8)
    ]
    head = ["format", "largest", "octaves of normals", "flat dB", "best dB Gaussian", "Laplace", "Student t5"]
    return markdown(head, rows)


def microscaling() -> str:
    levels = float_levels(E2M1)
    cases: list[tuple[str, float, int, int, group_theory.Rounding, float | None]] = [
        ("E8M0, OCP rule (largest weight rounded down, clips)", 8, 32, 0, "down", 4.0),
        ("E8M0 rounded up, never clips", 8, 32, 0, "up", None),
        ("E8M0, the better of two neighbours", 8, 32, 0, "best", None),
        ("E4M3 and a float32 per tensor", 8, 16, 3, "nearest", None),
    ]
    rows: list[list[str]] = []
    for size in (32, 16):
        exact = [theory.sqnr_db(group_theory.absmax_mse(d, levels, size)) for d in (GAUSSIAN, LAPLACE)]
        rows.append([f"exact scale, not stored, g{size}", f"{4 + 32 / size:.2f}", *(f"{x:.2f}" for x in exact), ""])
        for name, scale_bits, g, mantissa, rule, divisor in (case for case in cases if case[2] == size):
            found = [
                theory.sqnr_db(
                    group_theory.microscaling_mse(
                        d, levels, group_size=g, mantissa_bits=mantissa, rounding=rule, divisor=divisor
                    )
                )
                for d in (GAUSSIAN, LAPLACE)
            ]
            loss = f"{exact[0] - found[0]:.2f}"
            rows.append([f"{name}, g{g}", f"{4 + scale_bits / g:.2f}", *(f"{x:.2f}" for x in found), loss])
    return markdown(
        ["scale of FP4 blocks", "bits per weight", "Gaussian dB", "Laplace dB", "cost of rounding the scale"], rows
    )


def four_bits() -> str:
    """NF4 and its rivals in groups of 64 that the largest weight scales."""
    rows: list[list[str]] = []
    tables: list[tuple[str, Callable[[Distribution], Sequence[float]]]] = [
        ("INT4 restricted, -7..7", lambda _: range(-7, 8)),
        ("FP4 (E2M1)", lambda _: float_levels(E2M1)),
        ("NF4", lambda _: NF4.levels),
        ("best for these inputs and g64", best_table),
    ]
    for name, table in tables:
        row = [name]
        for d in (GAUSSIAN, LAPLACE):
            levels = table(d)
            probabilities = group_theory.absmax_code_probabilities(d, levels, 64)
            level = theory.sqnr_db(group_theory.absmax_mse(d, levels, 64))
            row += [f"{level:.2f}", f"{theory.entropy_bits(probabilities):.2f}"]
        rows.append(row)
    asymmetric = [f"{minmax_db(d, 4, 64, 'asymmetric'):.2f}" for d in (GAUSSIAN, LAPLACE)]
    rows.insert(1, ["INT4 asymmetric (and its zero point)", asymmetric[0], "", asymmetric[1], ""])
    return markdown(["table, g64", "Gaussian dB", "entropy", "Laplace dB", "entropy"], rows)


def limits() -> str:
    rows: list[list[str]] = []
    for b in range(1, 7):
        levels, thresholds = bounds.equal_occupation(GAUSSIAN, 2**b)
        errors = (
            theory.levels_mse(GAUSSIAN, levels, thresholds),
            theory.total_mse(GAUSSIAN, bits=b, clip=best_clip(GAUSSIAN, b)),
            optimal_levels(GAUSSIAN, b).mse,
            bounds.entropy_coded(GAUSSIAN, bits=b).mse,
            bounds.shannon_mse(GAUSSIAN, bits=b),
        )
        rows.append([str(b), *(f"{theory.sqnr_db(error):.2f}" for error in errors)])
    head = ["bits", "equal occupation", "uniform, best clip", "Lloyd-Max", "uniform, entropy-coded", "Shannon's bound"]
    return markdown(head, rows)


def few_levels() -> str:
    rows: list[list[str]] = []
    for d in (GAUSSIAN, LAPLACE):
        mean = 2 * d.tail(0.0).first
        best, delta = theory.optimal_scale(d, (-1, 0, 1)), 0.7 * mean
        twn = d.tail(delta).first / d.tail(delta).mass
        rules: list[tuple[str, float, float | None]] = [
            ("binary: a = mean magnitude", mean, None),
            ("ternary, absmean: a = mean magnitude", mean, mean / 2),
            ("ternary, TWN: Δ = 0.7 · mean magnitude, a = mean beyond Δ", twn, delta),
            ("ternary, best", best, best / 2),
        ]
        for name, scale, threshold in rules:
            if threshold is None:
                mse, zeros = theory.levels_mse(d, (-1, 1), scale=scale), 0.0
            else:
                borders = (-threshold / scale, threshold / scale)
                mse = theory.levels_mse(d, (-1, 0, 1), borders, scale=scale)
                zeros = 1 - 2 * d.tail_probability(threshold)
            shown = "" if threshold is None else f"{threshold:.3f}"
            rows.append(
                [
                    d.name,
                    name,
                    f"{scale:.3f}",
                    shown,
                    f"{100 * zeros:.0f} %",
                    f"{mse:.4f}",
                    f"{theory.sqnr_db(mse):.2f}",
                ]
            )
    return markdown(["inputs", "rule", "a", "Δ", "zeros", "MSE", "dB"], rows)


def water() -> str:
    variances, counts = torch.tensor(VARIANCES), torch.ones(len(VARIANCES))
    rows: list[list[str]] = []
    for mean_bits in (4.0, 2.0, 1.0):
        shares = reverse_water_filling(variances, counts, mean_bits).tolist()
        gain = allocation_gain_db(variances, counts, mean_bits)
        rows.append([f"{mean_bits:g}", *(f"{share:.2f}" for share in shares), f"{gain:.2f}"])
    return markdown(["mean bits", *(f"bits of σ² = {variance:g}" for variance in VARIANCES), "gain dB"], rows)


def outliers() -> str:
    rows: list[list[str]] = []
    levels = range(-127, 128)
    best = 127 * theory.optimal_scale(GAUSSIAN, levels)
    for reach in (best, *OUTLIERS):
        step = reach / 127
        level = theory.sqnr_db(theory.levels_mse(GAUSSIAN, levels, scale=step))
        rule, zeros = theory.range_loss_db(reach / best), 100 * theory.zeroed_share(GAUSSIAN, step=step)
        name = f"{reach:.2f} σ, the best" if reach == best else f"{reach} σ"
        rows.append([name, f"{level:.1f}", f"{rule:.1f}", f"{rule / theory.DB_PER_BIT:.1f}", f"{zeros:.1f} %"])
    head = ["range of INT8", "dB of the values inside", "20 log10(ratio), dB", "the same in bits", "rounded to 0"]
    return markdown(head, rows)


def shown_example() -> str:
    largest = max(map(abs, SHOWN_WEIGHTS))
    rows = [["shown in the text, as 4 bits", "", *map(str, SHOWN_CODES)]]
    for b in (8, 4):
        scale = largest / (2 ** (b - 1) - 1)
        found = (round(weight / scale) for weight in SHOWN_WEIGHTS)
        rows.append([f"{b} bits, codes -{2 ** (b - 1) - 1}..{2 ** (b - 1) - 1}", f"{scale:.5f}", *map(str, found)])
    return markdown(["", "scale", *map(str, SHOWN_WEIGHTS)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "rounding": rounding,
    "bits": bits,
    "granularity": granularity,
    "codes": codes,
    "floats": floats,
    "microscaling": microscaling,
    "four-bits": four_bits,
    "limits": limits,
    "few-levels": few_levels,
    "water": water,
    "outliers": outliers,
    "shown-example": shown_example,
}


def quoted() -> dict[str, str]:
    """What the prose says in numbers of its own, computed; each value stands in the page word for word."""
    clip = best_clip(GAUSSIAN, 4)
    step = 2 * clip / 15
    nf4 = [theory.sqnr_db(group_theory.absmax_mse(d, NF4.levels, 64)) for d in (GAUSSIAN, LAPLACE)]
    best = [theory.sqnr_db(group_theory.absmax_mse(d, best_table(d), 64)) for d in (GAUSSIAN, LAPLACE)]
    integer = [minmax_db(d, 4, 64, "asymmetric") for d in (GAUSSIAN, LAPLACE)]
    lead = uniform_db(GAUSSIAN, 8) - best_db(GAUSSIAN, float_levels(E4M3))
    equal = theory.sqnr_db(theory.levels_mse(GAUSSIAN, *bounds.equal_occupation(GAUSSIAN, 16)))
    lloyd = theory.sqnr_db(optimal_levels(GAUSSIAN, 4).mse)
    nf4_entropy = theory.entropy_bits(group_theory.absmax_code_probabilities(GAUSSIAN, NF4.levels, 64))
    panter_dite = 10 * math.log10(bounds.panter_dite_mse(GAUSSIAN, bits=0) / bounds.shannon_mse(GAUSSIAN, bits=0))
    stored = group_bits(4, 128)
    return {
        "last level": f"the last level is at {clip:.3f} and the border at {clip + step / 2:.2f}",
        "bit": f"+{theory.DB_PER_BIT:.2f} dB is half",
        "gain": f"gains 10 log10(4) = {theory.DB_PER_BIT:.2f} dB",
        "net": f"subtracts {theory.DB_PER_BIT:.2f} dB",
        "float": f"SQNR ≈ {theory.DB_PER_BIT:.2f} m + {theory.float_sqnr_db(0):.2f} dB",
        "mantissa": f"mantissa bit buys {theory.DB_PER_BIT:.2f} dB",
        "lead": f"is {lead:.1f} dB better than E4M3",
        "lead, range": f"its range is {10 ** (lead / 20):.1f} times too wide",
        "quarter": f"a quarter of a bit more, which is worth {theory.DB_PER_BIT / 4:.1f} dB",
        "equal": f"{equal:.2f} dB at 4 bits, where a uniform grid has {uniform_db(GAUSSIAN, 4):.2f} and Lloyd-Max "
        f"{lloyd:.2f}",
        "nf4 gap": f"{best[0] - nf4[0]:.1f} dB from it for Gaussian weights, {best[1] - nf4[1]:.1f} for Laplace",
        "nf4 entropy": f"({nf4_entropy:.2f} bits, not 4)",
        "nf4 gaussian": f"({integer[0]:.2f} against {nf4[0]:.2f} dB)",
        "nf4 laplace": f"({nf4[1]:.2f} against {integer[1]:.2f})",
        "nf4 scale": f"is {32 / 64:.1f} bits per weight, worth {theory.DB_PER_BIT / 2:.0f} dB",
        "nested scale": f"leaves {8 / 64 + 32 / (64 * 256):.3f}",
        "high rate": f"ends {bounds.HIGH_RATE_GAP_DB:.2f} dB (πe/6",
        "panter-dite": f"ends {panter_dite:.2f} dB from the bound (Panter and Dite)",
        "impossible": f"exceeds {theory.sqnr_db(bounds.shannon_mse(GAUSSIAN, bits=4)):.2f} dB, and 8-bit uniform has "
        f"{uniform_db(GAUSSIAN, 8):.2f}",
        "zeroed": f"an outlier of {2 * 127 * GAUSSIAN.quantile(1 - 0.0005):.0f} σ. At 100 σ, "
        f"{100 * theory.zeroed_share(GAUSSIAN, step=100 / 127):.1f} %",
        "size": f"it is {16 / stored:.2f} times, and {7 * stored / 8:.2f} GB",
        "pruned": f"a tenth to a fifth of them in 4 bits are {13 * 0.1 / 2:.2f} to {13 * 0.2 / 2:.1f} GB",
    }


def scientific(number: float) -> str:
    return f"{number:.4f}" if number >= 0.001 else f"{number:.2e}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """The page with every table computed anew."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], page)
