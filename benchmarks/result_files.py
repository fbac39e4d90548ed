"""Where a benchmark leaves its rows and its page, and what every page says of the machine."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bitwright.records import Environment, write_json_atomic, write_text_atomic

FOLDER = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


def write_results(
    kind: str, circumstances: Row, rows: Sequence[Row], page: Callable[[Row, Sequence[Row]], str]
) -> None:
    """Write results/<kind>_<name>_<machine>_<date>.json and .md, and print where.

    Args:
        kind: of the benchmark.
        circumstances: `name` of the model, and whatever else the page says; machine and date are added.
        rows: what was measured.
        page: makes Markdown of both.
    """
    environment = Environment.capture()
    known = {
        **circumstances,
        "machine": f"{environment.cpu}, {environment.num_cores} cores",
        "date": date.today().isoformat(),
    }
    machine = "".join(c if c.isalnum() else "-" for c in environment.cpu.lower()).strip("-")
    stem = f"{kind}_{known['name']}_{machine}-{environment.num_cores}-cores_{known['date']}"
    write_json_atomic(FOLDER / f"{stem}.json", {"circumstances": known, "rows": list(rows)})
    write_text_atomic(FOLDER / f"{stem}.md", page(known, rows))
    print(FOLDER / f"{stem}.md")
