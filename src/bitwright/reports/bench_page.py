"""The outputs of `bitwright bench` for people: a table in Markdown and an interactive page, from records alone."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bitwright.reports import pareto, wording
from bitwright.reports.grid import GridRow, Record, grid_rows, reference_figures
from bitwright.reports.page import write_page
from bitwright.reports.plotting import plain

CHARTS = {
    "kl": ("bits_per_weight", "kl_mean"),
    "perplexity": ("bits_per_weight", "perplexity"),
    "time": ("seconds", "kl_mean"),
    "memory": ("peak_memory_bytes", "kl_mean"),
}
SORTED_BY = (
    "bits_per_weight", "size_bytes", "kl_mean", "", "kl_p99", "same_top1", "perplexity", "seconds",
    "peak_memory_bytes",
)  # fmt: skip


def bench_markdown(records: Sequence[Record]) -> str:
    """The table, per scheme by ascending KL divergence with the best in bold."""
    lines = ["# Grid", "", *(f"- {note}" for note in circumstances(records)), ""]
    for scheme, rows in groupby(grid_rows(records), key=lambda row: row.scheme):
        lines += [
            f"## {scheme}",
            "",
            "| method | bits/weight | size | KL (nats/token) | behind the best | KL 99 % | same top-1 | perplexity | "
            "time | peak memory |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        notes: list[str] = []
        for row in rows:
            cells = [row.method, *row_words(row)]
            lines.append(f"| {' | '.join(f'**{cell}**' if row.best else cell for cell in cells)} |")
            if row.reason is not None:
                notes.append(f"- {row.method}, {status_word(row)}: {row.reason}")
        lines += ["", *notes, *([""] if notes else [])]
    return "\n".join(lines).rstrip() + "\n"


def write_bench_page(records: Sequence[Record], out: Path) -> Path:
    """Write the interactive page: Pareto plots with one colour per method, and a table that sorts.

    Args:
        records: of a grid, as in its bench.jsonl.
        out: the file.
    Raises:
        ResourceError: the file cannot be written; an earlier page is untouched.
    """
    rows = grid_rows(records)
    reference = reference_figures(records)
    measured = [row for row in rows if row.figure("kl_mean") is not None]
    drawn = [{**row.figures, "method": row.method, "label": row_label(row)} for row in measured]
    data = {"charts": {name: pareto.grid_chart(drawn, x, y, reference) for name, (x, y) in CHARTS.items()}}
    return write_page(
        "bench.html.j2", out, title=f"Grid of {_model_name(records)}", notes=circumstances(records), rows=rows,
        words=row_words, values=row_values, status=status_word, data=data,
    )  # fmt: skip


def circumstances(records: Sequence[Record]) -> list[str]:
    """Sentences on how the figures came about."""
    found = next((record for record in records if record["machine"] is not None), None)
    if found is None:
        return []
    asked, machine = found["asked"], found["machine"]
    environment, reference = machine["environment"], reference_figures(records)
    return [
        f"Model: {asked['model']} (SHA-256 {asked['model_hash'][:12]}).",
        f"Evaluation: {asked['text']}, {wording.things(reference.get('num_windows'), 'window')} of {asked['context']} "
        f"tokens (SHA-256 {asked['text_hash'][:12]}); perplexity of the original "
        f"{wording.with_stderr(reference.get('perplexity'), reference.get('perplexity_stderr'))}.",
        *_calibrations(records),
        f"Machine: {environment['cpu']}, {wording.things(machine['threads'], 'thread')}, {asked['device']}, "
        f"{asked['dtype']}; torch {environment['versions'].get('torch', wording.ABSENT)}; {machine['date'][:10]}.",
        "± is one standard error over windows. SE: standard errors of the paired difference to the best of the scheme.",
    ]


def row_words(row: GridRow) -> list[str]:
    """The figures of a row as people read them, in the order of the table's columns."""
    get = row.figure
    return [
        wording.fixed(get("bits_per_weight"), 3),
        wording.size(get("size_bytes")),
        wording.with_stderr(get("kl_mean"), get("kl_stderr")) if get("kl_mean") is not None else status_word(row),
        row.distance,
        wording.number(get("kl_p99")),
        wording.percent(get("same_top1")),
        wording.with_stderr(get("perplexity"), get("perplexity_stderr")),
        wording.duration(get("seconds")),
        wording.size(get("peak_memory_bytes")),
    ]


def row_values(row: GridRow) -> list[float | None]:
    """The numbers by which the table's columns are sorted."""
    behind = 0.0 if row.best else None if row.behind is None else row.behind[0] / (row.behind[1] or 1.0)
    return [row.figure(name) if name else behind for name in SORTED_BY]


def status_word(row: GridRow) -> str:
    """What became of a cell, in a word or two."""
    if row.status == "done":
        return "measured" if row.reason is None else "failed its gate"
    return row.status


def row_label(row: GridRow) -> str:
    """Every figure of a row, in the HTML that plotly reads."""
    names = ("bits per weight", "stored", "nats/token KL", "behind the best", "KL 99 %", "same top-1", "perplexity",
             "to quantize", "peak memory")  # fmt: skip
    lines = [f"{words} {name}" for name, words in zip(names, row_words(row), strict=True)]
    lines[3] = "best of its scheme" if row.best else f"{row.distance} behind the best of its scheme"
    if row.reason is not None:
        lines.append(status_word(row))
    return "<br>".join([f"<b>{plain(row.scheme)} {plain(row.method)}</b>", *lines])


def _calibrations(records: Sequence[Record]) -> list[str]:
    """One sentence per way of calibrating."""
    found: dict[str, None] = {}
    for record in records:
        recipe: Mapping[str, Any] | None = record["asked"]["recipe"]
        if recipe is None:
            continue
        wanted = recipe["calibration"]
        if wanted["text"] is None:
            found["Calibration: none."] = None
        else:
            digest = record["asked"]["calibration_hash"]
            found[
                f"Calibration: {wanted['text']}, {wording.things(wanted['num_samples'], 'window')} of "
                f"{wanted['seqlen']} tokens, seed {wanted['seed']} (SHA-256 {str(digest)[:12]})."
            ] = None
    return list(found)


def _model_name(records: Sequence[Record]) -> str:
    return next((Path(record["asked"]["model"]).name for record in records), "nothing")
