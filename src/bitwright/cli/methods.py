"""The table of everything that a composition may name."""

from rich import box
from rich.table import Table

from bitwright.methods.repairs import REPAIRS
from bitwright.methods.solvers import SOLVERS
from bitwright.methods.transforms import TRANSFORMS


def methods_rows() -> list[dict[str, str]]:
    """Every transform, solver and repair: kind, name, what it does, whether it needs text."""
    tables = (("transform", TRANSFORMS), ("solver", SOLVERS), ("repair", REPAIRS))
    return [
        {"kind": kind, "name": name, "about": table[name].about, "text": "yes" if _needs_text(kind, name) else "no"}
        for kind, table in tables
        for name in table
    ]


def _needs_text(kind: str, name: str) -> bool:
    if kind == "transform":
        return TRANSFORMS[name].needs_text
    return kind == "repair" or bool(SOLVERS[name].needs)


def methods_table() -> Table:
    """The same for a terminal."""
    caption = (
        "--method joins them: transforms, one solver, repairs, as in awq+gptq+bias. docs/methods.md explains them."
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for column in ("kind", "--method", "what it does", "needs text"):
        table.add_column(column, overflow="fold")
    for row in methods_rows():
        table.add_row(*row.values())
    return table
