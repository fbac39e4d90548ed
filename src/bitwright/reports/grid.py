"""What the records of a grid say: one row per cell, ordered per scheme, each beside the best of its scheme."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.reports import wording

Record = Mapping[str, Any]
WINDOWS = "window_kl"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridRow:
    """One cell.

    Attributes:
        figures: those of the record, numbers all finite; what is absent or not finite is left out.
        reason: why there are no figures, or why the result failed its gate.
        best: no other cell of the scheme has less KL divergence.
        behind: how much more KL divergence than the best of the scheme, nats per token, and the standard error of this
            difference over the windows that both were evaluated on; None for the best, and without figures.
    """

    scheme: str
    method: str
    status: str
    reason: str | None
    figures: Mapping[str, Any]
    best: bool
    behind: tuple[float, float | None] | None

    def figure(self, name: str) -> float | None:
        """A figure, or None."""
        value = self.figures.get(name)
        return value if isinstance(value, (int, float)) else None

    @property
    def distance(self) -> str:
        """How far behind the best, in standard errors of the difference."""
        if self.best:
            return "best"
        if self.behind is None:
            return wording.ABSENT
        difference, stderr = self.behind
        return f"+{wording.number(difference)}" if not stderr else f"{wording.fixed(difference / stderr, 1)} SE"


def grid_rows(records: Sequence[Record]) -> list[GridRow]:
    """Rows of all cells: schemes by ascending bits per weight, in each the least KL first and cells without it last."""
    by_scheme: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "cell":
            by_scheme.setdefault(record["scheme"], []).append(record)
    groups = [_scheme_rows(group) for group in by_scheme.values()]
    return [row for group in sorted(groups, key=_bits) for row in group]


def reference_figures(records: Sequence[Record]) -> Mapping[str, Any]:
    """Figures of the unquantized model; empty if no cell was evaluated."""
    return next((finite_figures(record) for record in records if record["kind"] == "reference"), {})


def finite_figures(record: Record) -> dict[str, Any]:
    """The figures without those that are absent or not finite, which JSON writes as text."""
    return {
        key: value
        for key, value in record["figures"].items()
        if (isinstance(value, (int, float)) and math.isfinite(value)) or isinstance(value, list) or key == "result_hash"
    }


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of `ours - theirs` over windows, and its standard error; None for a single window."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(differences) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def _scheme_rows(records: Sequence[Record]) -> list[GridRow]:
    figures = [finite_figures(record) for record in records]
    order = sorted(range(len(records)), key=lambda i: (figures[i].get("kl_mean", math.inf), records[i]["method"]))
    best = figures[order[0]]
    rows: list[GridRow] = []
    for i in order:
        own, is_best = figures[i], i == order[0] and "kl_mean" in best
        behind = None
        if "kl_mean" in own and not is_best:
            behind = paired_difference(own[WINDOWS], best[WINDOWS])
        rows.append(
            GridRow(
                scheme=records[i]["scheme"], method=records[i]["method"], status=records[i]["status"],
                reason=records[i]["reason"], figures=own, best=is_best, behind=behind,
            )
        )  # fmt: skip
    return rows


def _bits(rows: Sequence[GridRow]) -> tuple[float, str]:
    return rows[0].figures.get("bits_per_weight", math.inf), rows[0].scheme
