"""The page of `formats.py`: what the measured rows say about three claims, every row, and a plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formats_plot import scatter
from formats_rows import (
    DATA_FREE,
    NUM_STDERRS,
    SAME_SIZE_BITS,
    Comparison,
    Ratio,
    Row,
    bits_for,
    comparisons,
    mean,
    pareto_set,
    ratio,
    stderr,
    tally,
    with_error,
)

from bitwright.records import write_text_atomic

LEARNED = "learned table"
VERDICTS = {-1: "better", 0: "not told apart", 1: "worse"}
WIDE_SCALES = (
    "The model's dtype makes scales, tables and outliers twice as large as a 16-bit model's: formats with many of them "
    "look larger here than they are there, against those whose scales have a width of their own (`-dq`, `mx`, `nvfp4`)."
)
MAX_FOUR_BIT = 5.0
"""Bits per weight of codes of 4 bits with their scales and tables, where the claim about 8 bits is judged."""


def write_page(description: Mapping[str, Any], rows: Sequence[Row], failures: Mapping[str, str], path: Path) -> Path:
    """Write the page and its plot; return the page's path."""
    weights = [row for row in rows if row.plain is None]
    plot = path.with_suffix(".svg")
    title = f"Number formats: {description['model']}"
    write_text_atomic(plot, scatter(weights, f"{title}, weights only"))
    sections = [
        f"# {title}, {description['date']}",
        circumstances(description),
        f"![KL divergence against bits per weight]({plot.name})",
        nf4_against_int4(weights),
        learned_against_uniform(weights),
        four_against_eight(weights, description["reference_nll"]),
        weight_table(weights, description["reference_nll"]),
        activation_table(rows),
    ]
    if failures:
        sections.append("## Not measured\n\n" + "\n".join(f"- {name}: {why}" for name, why in failures.items()))
    write_text_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def circumstances(of: Mapping[str, Any]) -> str:
    environment, evaluation, calibration = of["environment"], of["evaluation"], of["calibration"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    perplexity = math.exp(mean(of["reference_nll"]))
    tokens = evaluation["windows"] * (evaluation["seqlen"] - 1)
    notes = (
        f"Model: {of['model']}, {of['num_quantized_weights']:,} weights quantized, in rows of "
        f"{' and '.join(map(str, of['row_lengths']))}; stored, scales and tables included, in {of['stored_dtype']}. "
        f"Perplexity before: {with_error(perplexity, perplexity * stderr(of['reference_nll']))}.",
        f"Data: {of['data']}. Evaluated on {evaluation['windows']} windows of {evaluation['seqlen']} tokens ({tokens} "
        f"predictions), evenly spread over the text; `weighted` and `gptq` calibrated on {calibration['windows']} "
        f"windows of {calibration['seqlen']}.",
        *([WIDE_SCALES] if of["stored_dtype"] == "float32" else []),
        "KL: mean KL divergence from the original model in nats per token ± standard error over windows. Ratios are of "
        "means over the same windows, with the standard error of the paired windows. They say how sure a difference "
        "is for this model on such text, not for other models.",
        f"A difference is called one from {NUM_STDERRS:g} standard errors on.",
        "Methods: `rtn` rounds to nearest with scales (or learned tables) of least squared error, no data; `absmax` "
        "takes scales from the largest weight instead, no data; `weighted` is `rtn` with squared errors weighted by "
        "the mean square of each input on calibration text; `gptq` also compensates the rounding errors.",
        "Bits: per quantized weight, with scales, zero points, tables and outliers. Ideal bits: the same if the codes "
        "were entropy coded.",
        f"Machine: {environment['cpu']}, {environment['num_cores']} cores, {environment['platform']}. Python "
        f"{environment['python']}; {versions}.",
        f"Made by `{of['command']}`.",
    )
    return "\n".join(f"- {note}" for note in notes)


def nf4_against_int4(rows: Sequence[Row]) -> str:
    """Answer the first question."""
    curve = [row for row in rows if is_uniform(row, 4) and row.method in DATA_FREE]
    named = [row for row in rows if row.scheme.startswith("nf4-") and row.method in DATA_FREE]
    nested = comparisons([row for row in named if row.scheme.endswith("-dq")], curve)
    plain = comparisons([row for row in named if not row.scheme.endswith("-dq")], curve)
    lines = [
        "## Does NF4 beat INT4 at equal size, without calibration?",
        "Each row beside the best data-free 4-bit integers of its size. NF4's scales are float32, or double-quantized "
        "to about 8 bits (`-dq`).",
        *(f"- **Scales in {kind}: {tally(found)}.**" for kind, found in (("8 bits", nested), ("32", plain)) if found),
        *([closest_pair(nested)] if nested else []),
        comparison_table([*nested, *plain]),
    ]
    return "\n".join(_spaced(lines))


def learned_against_uniform(rows: Sequence[Row]) -> str:
    """Answer the second question."""
    lines = [
        "## Does a learned 4-bit table beat 4-bit integers at equal bits per weight?",
        "k-means (`kmeans`) stores a table per row, tile or tensor, `lut` one table per weight matrix and a scale per "
        "group. Each row beside integers of as many code bits, of its size and made by the same method.",
    ]
    tables: list[Comparison] = []
    for bits in (4, 3, 2):
        for method in ("rtn", "weighted", "gptq"):
            curve = [row for row in rows if is_uniform(row, bits) and row.method == method]
            learned = [row for row in rows if row.family == LEARNED and row.code_bits == bits and row.method == method]
            for kind in ("kmeans", "lut"):
                found = comparisons([row for row in learned if row.scheme.startswith(kind)], curve)
                if found:
                    bold = "**" if (bits, method) == (4, "weighted") else ""
                    lines.append(f"- {bold}{kind}{bits}, {method}: {tally(found)}.{bold}")
                tables += found if bits == 4 else []
    lines.append(comparison_table(tables))
    return "\n".join(_spaced(lines))


def four_against_eight(rows: Sequence[Row], reference_nll: Sequence[float]) -> str:
    """Answer the third question."""
    eight = next((r for r in rows if r.scheme == "W8A16-channel" and r.method == "rtn"), None)
    if eight is None:
        return ""
    lines = [
        "## Does a 4-bit non-uniform format reach 8-bit uniform?",
        "",
        "So it has been claimed. Here are the best 4-bit codes that are not evenly spaced, up to "
        f"{MAX_FOUR_BIT:g} bits per weight in all, beside {eight.scheme} rounded to nearest ({eight.bits:.3f} bits). "
        "The last two columns are the sizes at which integers of any width would have the row's KL (interpolated): "
        "rounded to nearest without data, and by the row's own method. Empty: outside what was measured.",
        "",
        "| method | best row | bits | KL | KL, 8-bit | ratio | log-perplexity lost | lost at 8 bit | "
        "as rtn integers of | as its method's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ratios: list[tuple[Ratio, Row]] = []
    for method in ("rtn", "absmax", "weighted", "gptq"):
        near = [r for r in rows if r.family != "integer" and r.code_bits == 4 and r.bits <= MAX_FOUR_BIT]
        near = [row for row in near if row.method == method]
        if not near:
            continue
        best = min(near, key=lambda row: row.kl_mean)
        quotient = ratio(best.kl, [(1.0, eight.kl)])
        ratios.append((quotient, best))
        lines.append(
            f"| {method} | {best.scheme} | {best.bits:.3f} | {kl(best)} | {kl(eight)} | {quotient} | "
            f"{_lost(best, reference_nll)} | {_lost(eight, reference_nll)} | "
            f"{_integer_bits(best, rows, 'rtn')} | {_integer_bits(best, rows, method)} |"
        )
    quotient, best = min(ratios, key=lambda pair: pair[0].value)
    return "\n".join(
        [
            *lines,
            "",
            f"**{'No' if quotient.verdict > 0 else 'Yes'}.** The best of all, {best.scheme} {best.method} "
            f"({best.bits:.3f} bits), has {quotient} times the KL of 8-bit integers.",
        ]
    )


def closest_pair(found: Sequence[Comparison]) -> str:
    """The pair whose sizes differ least, in words."""
    each = min(found, key=lambda pair: (len(pair.rival), abs(pair.rival_bits - pair.row.bits), pair.row.kl_mean))
    row, rival_kl = each.row, with_error(each.rival_kl, each.rival_kl_stderr)
    return (
        f"The closest pair in size: {row.scheme} {row.method} ({row.bits:.3f} bits) has KL {kl(row)}, "
        f"{each.rival_name} ({each.rival_bits:.3f} bits) {rival_kl}; the ratio is {each.ratio}."
    )


def comparison_table(found: Sequence[Comparison]) -> str:
    """Markdown; rivals of the same size or interpolated."""
    lines = [
        "| row | bits | KL | integers | bits | KL | ratio | the row is |",
        "|---|---:|---:|---|---:|---:|---:|---|",
    ]
    for each in found:
        row, interpolated = each.row, len(each.rival) > 1
        rival_kl = with_error(each.rival_kl, each.rival_kl_stderr)
        lines.append(
            f"| {row.scheme} {row.method} | {row.bits:.3f} | {kl(row)} | {each.rival_name} | {each.rival_bits:.3f} | "
            f"{rival_kl}{' (interpolated)' if interpolated else ''} | {each.ratio} | {VERDICTS[each.ratio.verdict]} |"
        )
    note = (
        "Rivals are on the integers' Pareto set: a smaller row that is as good replaces a larger one. Within "
        f"{SAME_SIZE_BITS:g} bits sizes count as equal. Elsewhere the logarithm of KL is interpolated linearly in bits "
        "between the two neighbours on the set. Rows outside the integers' sizes are left out."
    )
    return "\n".join([*lines, "", note])


def weight_table(rows: Sequence[Row], reference_nll: Sequence[float]) -> str:
    """Markdown, ascending in bits; Pareto sets marked."""
    best = {row.key for row in pareto_set(rows)}
    data_free = {row.key for row in pareto_set([row for row in rows if row.method in DATA_FREE])}
    lines = [
        "## Weights",
        "",
        "● no other row has as few bits and less KL (Pareto set); ○ the same among the rows without calibration data.",
        "",
        "| | scheme | method | bits | ideal bits | KL | perplexity | log-perplexity lost |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda each: (each.bits, each.kl_mean)):
        mark = ("●" if row.key in best else "") + ("○" if row.key in data_free else "")
        lines.append(
            f"| {mark} | {row.scheme} | {row.method} | {row.bits:.3f} | {row.ideal_bits:.3f} | {kl(row)} | "
            f"{row.perplexity:.3f} | {_lost(row, reference_nll)} |"
        )
    return "\n".join(lines)


def activation_table(rows: Sequence[Row]) -> str:
    """Markdown: schemes that quantize activations, beside the same weights with activations left alone."""
    plain = {(row.scheme, row.method): row for row in rows if row.plain is None}
    pairs = [(row, plain.get((row.plain, row.method))) for row in rows if row.plain is not None]
    lines = [
        "## Weights and activations",
        "",
        "Weights by `weighted` throughout, so that each scheme and its A16 row have the same weights; the ratio is "
        "what quantized activations cost on top.",
        "",
        "| scheme | weight bits | KL | same weights, A16 | KL, A16 | ratio | perplexity | perplexity, A16 |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row, other in pairs:
        if other is None:
            continue
        lines.append(
            f"| {row.scheme} | {row.bits:.3f} | {kl(row)} | {other.scheme} | {kl(other)} | "
            f"{ratio(row.kl, [(1.0, other.kl)])} | {row.perplexity:.3f} | {other.perplexity:.3f} |"
        )
    return "\n".join(lines)


def kl(row: Row) -> str:
    return with_error(row.kl_mean, row.kl_stderr)


def is_uniform(row: Row, bits: int) -> bool:
    """Integers of `bits` bits with float scales."""
    return row.family == "integer" and row.code_bits == bits


def _integer_bits(row: Row, rows: Sequence[Row], method: str) -> str:
    """Bits of the integers by one method that have the KL of a row."""
    bits = bits_for(row.kl_mean, [each for each in rows if each.family == "integer" and each.method == method])
    return "" if bits is None else f"{bits:.2f} bits"


def _lost(row: Row, reference_nll: Sequence[float]) -> str:
    """Rise of the mean negative log-likelihood, nats per token, paired."""
    differences = [ours - theirs for ours, theirs in zip(row.nll, reference_nll, strict=True)]
    return with_error(mean(differences), stderr(differences))


def _spaced(lines: Sequence[str]) -> list[str]:
    """Blank lines between everything but neighbouring items of a list."""
    spaced: list[str] = []
    for line in lines:
        if spaced and not (line.startswith("- ") and spaced[-1].startswith("- ")):
            spaced.append("")
        spaced.append(line)
    return spaced
