"""Tables of outliers: where they are, what formats would lose, and what follows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from bitwright.calibration.losses import FormatLoss
    from bitwright.outlier_report import InputStatistics, SiteActivity
    from bitwright.testbed import OutlierTestBed

SHOWN_CHANNELS = 4


def outlier_tables(activity: "Sequence[SiteActivity]") -> list[Table]:
    """Statistics, losses and advice per group of sites; nothing without a calibration text."""
    return [_statistics(activity), _losses(activity), _advice(activity)] if activity else []


def testbed_table(planted: "OutlierTestBed") -> Table:
    """What was planted."""
    table = Table(title=planted.path, box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_row("made from", planted.source)
    table.add_row("factor", f"{planted.factor:g}")
    places = {edge.columns for edge in planted.edges}
    table.add_row("channels", "; ".join(", ".join(map(str, columns)) for columns in sorted(places)))
    table.add_row("edges", str(len(planted.edges)))
    table.add_row("largest logit difference", f"{planted.max_logit_difference:.3g} (allowed {planted.logit_bound:.3g})")
    return table


def _statistics(activity: "Sequence[SiteActivity]") -> Table:
    caption = (
        "range: largest input over their root mean square; tokens: loudest token over the median; "
        "W4 ideal: bits that match 4 everywhere if each group of 128 weights had its own"
    )
    table = Table(title="inputs of the sites", box=box.SIMPLE, title_justify="left", caption=caption)
    for column in ("sites", "range dB", "kurtosis", "tokens", "outlier channels (times the median)", "W4 ideal"):
        table.add_column(column, overflow="fold", justify="left" if column == "sites" else "right")
    for entry in activity:
        found = entry.statistics
        ideal = "–" if entry.water_filled_bits is None else f"{entry.water_filled_bits:.2f}"
        if found is None:
            table.add_row(_names(entry), "–", "–", "–", "no token arrived", ideal)
            continue
        kurtosis = "–" if found.kurtosis is None else f"{found.kurtosis:.3g}"
        ratio = "–" if found.outlier_token_ratio is None else f"{found.outlier_token_ratio:.3g}"
        table.add_row(_names(entry), f"{found.dynamic_range_db:.1f}", kurtosis, ratio, _channels(found), ideal)
    return table


def _losses(activity: "Sequence[SiteActivity]") -> Table:
    shown = next((entry for entry in activity if entry.inputs), None)
    caption = "SQNR in dB, measured / predicted from the ranges"
    table = Table(title="what formats keep", box=box.SIMPLE, title_justify="left", caption=caption)
    table.add_column("sites", overflow="fold")
    for kind, losses in (("x", shown.inputs if shown else ()), ("w", shown.weights if shown else ())):
        for loss in losses:
            table.add_column(f"{kind} {loss.format}\n{loss.granularity}", justify="right", no_wrap=True)
    for entry in activity:
        if entry.inputs:
            table.add_row(_names(entry), *(_loss(loss) for loss in (*entry.inputs, *entry.weights)))
    return table


def _advice(activity: "Sequence[SiteActivity]") -> Table:
    table = Table(title="what follows", box=box.SIMPLE, title_justify="left")
    table.add_column("sites", overflow="fold")
    table.add_column("advice", overflow="fold")
    for entry in activity:
        table.add_row(_names(entry), "\n".join(entry.advice))
    return table


def _names(entry: "SiteActivity") -> str:
    """The first site's path and the last words of the others."""
    first, *others = entry.sites
    return ", ".join([first, *(name.rsplit(".", 1)[-1] for name in others)])


def _channels(found: "InputStatistics") -> str:
    channels = found.outlier_channels
    if not channels:
        return "none"
    loudest = sorted(channels, key=lambda channel: -channel.ratio)[:SHOWN_CHANNELS]
    more = f" and {len(channels) - SHOWN_CHANNELS} more" if len(channels) > SHOWN_CHANNELS else ""
    return ", ".join(f"{channel.index} ({channel.ratio:.0f}×)" for channel in loudest) + more


def _loss(loss: "FormatLoss") -> str:
    return f"{_db(loss.sqnr_db)} / {_db(loss.predicted_db)}"


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
