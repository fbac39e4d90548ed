"""The report: one HTML file that works offline, made from a run directory's plain-text records and nothing else.

Neither torch nor a model is needed, so a run made on a server is read on a laptop. The page holds plotly.js and all its
data; a content security policy in its head forbids the browser to fetch anything. The same run gives the same bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bitwright.records import write_text_atomic
from bitwright.reports import charts, story, wording
from bitwright.reports.facts import Facts, SiteFact, read_facts
from bitwright.runs import RunDirectory

FILTERS: Mapping[str, Callable[..., str]] = {
    "number": wording.number,
    "fixed": wording.fixed,
    "count": wording.count,
    "percent": wording.percent,
    "decibel": wording.decibel,
    "size": wording.size,
    "duration": wording.duration,
}
SITE_DIGITS = {
    "bits_per_weight": 3,
    "ideal_bits_per_weight": 3,
    "weight_sqnr_db": 2,
    "output_sqnr_db": 2,
    "saturated": 4,
    "num_tokens": 0,
    "num_weights": 0,
}
SITE_WORDS = ("scheme", "method", "reason")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run as one self-contained HTML file.

    Args:
        run: the run directory.
        out: the file; `7-report.html` in the run unless given.
    Returns:
        the file written.
    Raises:
        RunError: no finished run there, or its records are damaged.
        ResourceError: the file cannot be written; an earlier report is untouched.
    """
    facts = read_facts(run)
    target = RunDirectory(run).report if out is None else out
    order = {block.block: index for index, block in enumerate(facts.blocks)}
    for site in facts.sites:
        order.setdefault(site.block, len(order))
    data = {"charts": _charts(facts, order), "sites": site_columns(facts.sites)}
    return write_page(
        "report.html.j2", target, facts=facts, results=facts.results, story=story, wording=wording, data=data
    )


def write_comparison(rows: Sequence[Mapping[str, Any]], out: Path, *, title: str, notes: Sequence[str]) -> Path:
    """Write a page that sets several results of one model side by side.

    Args:
        rows: one mapping per result with name, bits_per_weight, size_bytes, perplexity, perplexity_stderr, kl_mean and
            kl_stderr (nats per token), same_top1 (fraction), seconds, and report: the path of its own report relative
            to `out`, or None. A figure may be None. A KL of 0 marks the reference, which the chart leaves out.
        out: the file.
        title: the page's heading.
        notes: sentences on how the figures came about.
    Returns:
        the file written.
    Raises:
        ResourceError: the file cannot be written; an earlier page is untouched.
    """
    shown = [{**row, "report": _link(row.get("report"))} for row in rows]
    data = {"charts": {"pareto": charts.pareto_chart(rows)}}
    return write_page("comparison.html.j2", out, title=title, notes=notes, rows=shown, wording=wording, data=data)


def site_columns(sites: Sequence[SiteFact]) -> dict[str, Any]:
    """The site table as columns, with each repeated word written once: about 100 bytes per site."""
    columns: dict[str, Any] = {"site": [site.site for site in sites]}
    for name, digits in SITE_DIGITS.items():
        columns[name] = [_rounded(getattr(site, name), digits) for site in sites]
    for name in SITE_WORDS:
        words = {word: index for index, word in enumerate(dict.fromkeys(getattr(site, name) for site in sites))}
        columns[name] = {"words": list(words), "of": [words[getattr(site, name)] for site in sites]}
    return columns


def _charts(facts: Facts, order: Mapping[str, int]) -> dict[str, Any]:
    drawn = {
        "depth": charts.depth_chart(facts.blocks),
        "time": charts.time_chart(facts.blocks),
        "sites": charts.site_chart(facts.sites, order, facts.figure),
    }
    if facts.figure != "weight_sqnr_db":
        drawn["weights"] = charts.site_chart(facts.sites, order, "weight_sqnr_db")
    return drawn


def _rounded(value: float | None, digits: int) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return round(value, digits) if digits else round(value)


def _link(report: str | None) -> str | None:
    """A relative path as a URL: whatever could be read as a scheme or a query is quoted."""
    return None if report is None else quote(report, safe="/")


def write_page(template: str, out: Path, **values: Any) -> Path:
    """Write a page from one of the templates beside this file; `data` is what its script reads.

    Raises:
        ResourceError: the file cannot be written; an earlier page is untouched.
    """
    environment = Environment(
        loader=PackageLoader("bitwright", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cast(dict[str, Any], environment.filters).update(FILTERS)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    text = environment.get_template(template).render(plotly_js=Markup(get_plotlyjs()), **values)
    # Half a surrogate pair, which JSON can carry and UTF-8 cannot, becomes a question mark.
    write_text_atomic(out, text.encode("utf-8", "replace").decode("utf-8"))
    return out
