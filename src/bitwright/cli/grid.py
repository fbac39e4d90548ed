"""The table of a grid of schemes and methods."""

from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from bitwright.reports.bench_page import row_words, status_word
from bitwright.reports.grid import grid_rows

if TYPE_CHECKING:
    from bitwright.bench import BenchResult

COLUMNS = ("bits", "size", "KL", "behind the best", "KL 99 %", "same top-1", "perplexity", "time", "peak memory")


def grid_table(result: "BenchResult") -> Table:
    """Every cell, per scheme by ascending KL divergence."""
    counts = f"{result.num_measured} cells measured now, {result.num_known} before"
    caption = f"{counts}; KL in nats per token; SE: standard errors of the paired difference"
    table = Table(title=str(result.folder), box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for column in ("scheme", "method"):
        table.add_column(column, overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", overflow="fold")
    for _, rows in groupby(grid_rows(result.records), key=lambda row: row.scheme):
        for row in rows:
            table.add_row(row.scheme, row.method, *row_words(row), style="bold" if row.best else None)
        table.add_section()
    return table


def grid_notes(result: "BenchResult") -> list[str]:
    """One line per cell that was refused, failed, or failed its gate."""
    rows = [row for row in grid_rows(result.records) if row.reason is not None]
    return [f"{row.scheme} {row.method}, {status_word(row)}: {row.reason}" for row in rows]
