"""The map of sites by blocks: one row per role (`q_proj`, `down_proj`, …), one column per block, one figure at a time.

The page's script draws it as a table of buttons, which a keyboard reaches and a screen reader reads. A cell with
several sites (the experts of one block) shows the worst of them and lists them all. Sites kept in 16 bit have bits and
nothing else.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.reports import wording
from bitwright.reports.channels import OUTLIER_RATIO, ChannelFact
from bitwright.reports.charts import role
from bitwright.reports.entries import Figure, is_finite
from bitwright.reports.facts import Facts, SiteFact
from bitwright.reports.findings import HistogramFact

KEPT_BITS = 16.0
NUM_HISTOGRAMS = 1000
"""At most so many in one page, 0.6 kB each; those of the sites with the largest error."""
NUM_SENSITIVITIES = 20_000
"""Likewise; the map shows them all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Where each site is: (row, column)."""

    roles: list[str]
    blocks: list[str]
    of: Mapping[str, tuple[int, int]]

    def matrix(self, found: Iterable[tuple[str, Figure]], worst: Callable[[Iterable[float]], float]) -> list[list[Any]]:
        """The worst figure of each cell; None where there is none."""
        cells: dict[tuple[int, int], list[float]] = {}
        for site, value in found:
            if value is not None and math.isfinite(value) and site in self.of:
                cells.setdefault(self.of[site], []).append(value)
        return [
            [float(f"{worst(cells[row, column]):.5g}") if (row, column) in cells else None
             for column in range(len(self.blocks))]
            for row in range(len(self.roles))
        ]  # fmt: skip


def site_map(facts: Facts) -> dict[str, Any]:
    """The map as plain data: rows, columns, and for each measure its label, its direction and its figures.

    A measure is `strong` where it is high or low: there a cell has the full colour.
    """
    places = _places(facts)
    bits = [*((site.site, site.bits_per_weight) for site in facts.sites), *((k.site, KEPT_BITS) for k in facts.kept)]
    measures = [_measure("Bits per weight", "high", 2, places.matrix(bits, max))]
    for label, name in (("Output SQNR (dB)", "output_sqnr_db"), ("Weight SQNR (dB)", "weight_sqnr_db")):
        found = [(site.site, getattr(site, name)) for site in facts.sites]
        if any(is_finite(value) for _, value in found):
            measures.insert(len(measures) - 1, _measure(label, "low", 1, places.matrix(found, min)))
    for (score, scheme), values in _by_label(facts).items():
        matrix = places.matrix(values.items(), max)
        measures.append(_measure(f"Sensitivity: {score}, {scheme}", "high", None, matrix))
    members: list[list[list[int]]] = [[[] for _ in places.blocks] for _ in places.roles]
    for index, site in enumerate(facts.sites):
        row, column = places.of[site.site]
        members[row][column].append(index)
    kept: list[list[list[Any]]] = [[[] for _ in places.blocks] for _ in places.roles]
    for entry in facts.kept:
        if entry.site in places.of:
            row, column = places.of[entry.site]
            kept[row][column].append([entry.site, entry.reason])
    return {
        "roles": places.roles, "blocks": places.blocks, "measures": measures, "members": members, "kept": kept,
    }  # fmt: skip


def site_details(facts: Facts, ranked: Sequence[SiteFact]) -> dict[str, Any]:
    """What the detail of a site shows beside its row in the table: histogram, sensitivities, loudest inputs.

    Args:
        facts: of the run.
        ranked: sites by their error, the largest first; the first of them have their histograms in the page.
    """
    order = [site.site for site in ranked]
    known = dict.fromkeys(order) | {site.site: None for site in facts.sites}
    histograms = facts.findings.histograms
    drawn = [site for site in known if site in histograms][:NUM_HISTOGRAMS]
    return {
        "histograms": {site: _histogram(histograms[site]) for site in drawn},
        "sensitivities": _sensitivities(facts),
        "inputs": {site: input_sentence(fact) for fact in facts.channels for site in fact.sites},
    }


def input_sentence(fact: ChannelFact) -> str:
    """What is known of a site's input channels."""
    channel, ratio = fact.loudest[0]
    return (
        f"Of {wording.count(fact.num_channels)} input channels, channel {channel} is the loudest: "
        f"{wording.number(ratio)} times the median. {wording.things(fact.num_outliers, 'channel')} reach "
        f"{OUTLIER_RATIO:g} times."
    )


def _measure(label: str, strong: str, digits: int | None, values: list[list[Any]]) -> dict[str, Any]:
    """`digits` decimals are shown; None for three significant digits, and a colour by the logarithm."""
    return {"label": label, "strong": strong, "digits": digits, "values": values}


def _places(facts: Facts) -> _Places:
    blocks = list(dict.fromkeys([*(block.block for block in facts.blocks), *(site.block for site in facts.sites)]))
    column_of = {block: column for column, block in enumerate(blocks)}
    found = {site.site: (role(site.site), column_of[site.block]) for site in facts.sites}
    for entry in facts.kept:
        inside = [block for block in blocks if entry.site.startswith(f"{block}.")]
        if inside:
            found.setdefault(entry.site, (role(entry.site), column_of[max(inside, key=len)]))
    row_of: dict[str, int] = {}
    for kind, _ in found.values():
        row_of.setdefault(kind, len(row_of))
    of = {site: (row_of[kind], column) for site, (kind, column) in found.items()}
    return _Places(roles=list(row_of), blocks=blocks, of=of)


def _by_label(facts: Facts) -> dict[tuple[str, str], dict[str, Figure]]:
    """(score, scheme) -> site -> value."""
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for fact in facts.findings.sensitivities:
        found.setdefault((fact.score, fact.scheme), {})[fact.site] = fact.value
    return found


def _sensitivities(facts: Facts) -> dict[str, Any]:
    """Labels, and per site a value for each; no sites where they are too many."""
    labels = _by_label(facts)
    sites = dict.fromkeys(fact.site for fact in facts.findings.sensitivities)
    if len(labels) * len(sites) > NUM_SENSITIVITIES:
        sites = {}
    values = {site: [_short(labels[label].get(site)) for label in labels] for site in sites}
    return {"labels": [list(label) for label in labels], "of": values}


def _histogram(fact: HistogramFact) -> list[Any]:
    return [_short(fact.low), _short(fact.high), [round(count) for count in fact.counts], [*map(_short, fact.levels)]]


def _short(value: Figure) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
