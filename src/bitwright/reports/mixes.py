"""What a search for a mix of schemes found: the record `search` of a run that `search --apply` made.

It has the fields of `mixture.Found`: those of the mix that was chosen, and the frontier of the best of every size.
"""

from dataclasses import dataclass
from typing import Any

from bitwright.reports import wording
from bitwright.reports.entries import Figure, Records, figure, is_finite, mappings, read_entry
from bitwright.reports.plotting import Chart, compact, framed, log_axis, padded, series


@dataclass(frozen=True, kw_only=True, slots=True)
class MixFact:
    """One mix: bytes of its files, stored bits per weight, and the sum of its scores in nats per token."""

    size_bytes: Figure
    average_bits: Figure
    predicted_loss: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchFact:
    """What a search found.

    Attributes:
        chosen: the mix that it chose, before any repair.
        measured_loss: divergence with its weights rounded to nearest, nats per token.
        frontier: the best mixes by the sum of their scores, the smallest first.
    """

    chosen: MixFact
    measured_loss: Figure
    frontier: tuple[MixFact, ...]


def read_search(records: Records) -> SearchFact | None:
    """Read the last search of a run; None where there was none.

    Raises:
        RunError: an entry is not what bitwright writes.
    """
    found = None
    for record, where in records.of("search"):
        found = SearchFact(
            chosen=read_entry(MixFact, record, where),
            measured_loss=figure(record, "measured_loss", where),
            frontier=tuple(read_entry(MixFact, each, where) for each in mappings(record, "frontier", where)),
        )
    return found


def summary(found: SearchFact) -> str:
    """The mix that was chosen, and among what."""
    sizes = [mix.size_bytes for mix in found.frontier if mix.size_bytes is not None]
    ends = f"{wording.size(min(sizes))}, the largest {wording.size(max(sizes))}" if sizes else ""
    among = f" Of the best mixes the smallest has {ends}." if ends else ""
    return (
        f"The search chose a mix of {wording.size(found.chosen.size_bytes)} with "
        f"{wording.fixed(found.chosen.average_bits, 3)} bits per weight. Its scores add up to "
        f"{wording.number(found.chosen.predicted_loss)} nats per token; rounded to nearest it was measured to lose "
        f"{wording.number(found.measured_loss)}.{among}"
    )


def drawn(found: SearchFact) -> list[MixFact]:
    """Mixes of the frontier that a logarithmic axis can show: 16 bit everywhere loses nothing."""
    return [mix for mix in found.frontier if _is_drawable(mix)]


def mix_chart(found: SearchFact) -> Chart:
    """Size against predicted loss of the best mixes, and the one that was chosen."""
    traces: list[dict[str, Any]] = []
    best, chosen = drawn(found), [found.chosen] if _is_drawable(found.chosen) else []
    for name, mixes, colour in (("best of its size", best, 0), ("chosen", chosen, 1)):
        trace = series(
            "scatter", [mix.size_bytes for mix in mixes], [compact(mix.predicted_loss) for mix in mixes],
            [_label(name, mix) for mix in mixes], colour=colour,
        )  # fmt: skip
        traces.append({**trace, "mode": "lines+markers" if name != "chosen" else "markers", "name": name})
    traces[-1]["marker"] = {**traces[-1]["marker"], "size": 14}
    shown = [*best, *chosen]
    sizes = [mix.size_bytes for mix in shown if mix.size_bytes is not None]
    axis = {"title": {"text": "Size (bytes)"}, "exponentformat": "SI", **padded(sizes, alone=0.3)}
    chart = framed(traces, axis, "Predicted loss (nats/token)")
    chart["layout"]["yaxis"].update(log_axis([mix.predicted_loss for mix in shown if mix.predicted_loss is not None]))
    chart["layout"]["showlegend"] = True
    return chart


def _is_drawable(mix: MixFact) -> bool:
    return is_finite(mix.size_bytes) and mix.predicted_loss is not None and 0 < mix.predicted_loss < float("inf")


def _label(name: str, mix: MixFact) -> str:
    return (
        f"<b>{name}</b><br>{wording.size(mix.size_bytes)}, {wording.fixed(mix.average_bits, 3)} bits per weight"
        f"<br>predicted loss {wording.number(mix.predicted_loss)} nats/token"
    )
