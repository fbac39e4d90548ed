"""The report: one HTML file that works offline, made from a run directory's plain-text records and nothing else.

Neither torch nor a model is needed, so a run made on a server is read on a laptop. The page holds plotly.js and all its
data; a content security policy in its head forbids the browser to fetch anything. The same run gives the same bytes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bitwright.records import write_text_atomic
from bitwright.reports import channels, charts, mixes, outlook, speed, story, training, trials, wording
from bitwright.reports.facts import Facts, SiteFact, read_facts
from bitwright.reports.site_map import site_details, site_map
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
NUM_JSON_SITES = 1000
"""At most so many in the JSON, 0.4 kB each; those with the largest error."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run as one self-contained HTML file.

    Args:
        run: the run directory; of quantization-aware training its own or that of its codes.
        out: the file; `7-report.html` in the run unless given.
    Returns:
        the file written.
    Raises:
        RunError: no finished run there, or its records are damaged.
        ResourceError: the file cannot be written; an earlier report is untouched.
    """
    facts = read_facts(run)
    target = RunDirectory(run).report if out is None else out
    if facts.is_only_trained:
        return _write_trained(facts, target)
    order = {block.block: index for index, block in enumerate(facts.blocks)}
    for site in facts.sites:
        order.setdefault(site.block, len(order))
    data = {
        "charts": _charts(facts, order),
        "sites": site_columns(facts.sites),
        "map": site_map(facts),
        "details": site_details(facts, outlook.ranked_sites(facts)),
    }
    headline = {
        "run": str(run), "failure": facts.failure, "asked": facts.asked, "results": asdict(facts.results),
        "evaluations": [asdict(evaluation) for evaluation in facts.evaluations],
        "speeds": asdict(facts.findings.speeds),
        "search": None if facts.findings.search is None else asdict(facts.findings.search),
        **_trained(facts), **_tables(facts),
    }  # fmt: skip
    return write_page(
        "report.html.j2", target, facts=facts, results=facts.results, story=story, outlook=outlook, wording=wording,
        tried=trials.trials(facts), trials=trials, channels=channels, charts=charts, training=training, speed=speed,
        mixes=mixes, data=data, json=json_text(headline),
    )  # fmt: skip


def _write_trained(facts: Facts, target: Path) -> Path:
    """The page of a run that has no quantized model: of an adapter, of distillation."""
    headline = {"run": str(facts.path), "failure": facts.failure, "asked": facts.asked, **_trained(facts)}
    return write_page(
        "trained.html.j2", target, facts=facts, story=story, wording=wording, charts=charts, training=training,
        data={"charts": _training_charts(facts)}, json=json_text(headline),
    )  # fmt: skip


def _trained(facts: Facts) -> dict[str, Any]:
    """What the JSON says of training; the steps are in the records."""
    trained, found = facts.findings.training, dict[str, Any]()
    if trained is not None:
        found["training"] = {**asdict(trained.figures), "memory": dict(trained.memory)}
    if facts.findings.merges:
        found["merges"] = [asdict(merge) for merge in facts.findings.merges]
    return found


def _tables(facts: Facts) -> dict[str, Any]:
    """What the JSON says of blocks and sites: the figures of their tables."""
    sites = facts.sites
    if len(sites) > NUM_JSON_SITES:
        worst = {site.site for site in outlook.ranked_sites(facts)[:NUM_JSON_SITES]}
        sites = tuple(site for site in sites if site.site in worst)
    return {
        "blocks": [asdict(block) for block in facts.blocks],
        "sites": [asdict(site) for site in sites],
        "num_sites_left_out": len(facts.sites) - len(sites),
    }


def _training_charts(facts: Facts) -> dict[str, Any]:
    trained = facts.findings.training
    return {} if trained is None or not trained.steps else {"training": charts.training_chart(trained)}


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
    of_block = {site.site: site.block for site in facts.sites}
    drawn = {
        "depth": charts.depth_chart(facts.blocks),
        "time": charts.time_chart(facts.blocks),
        "sites": charts.site_chart(facts.sites, order, facts.figure),
    }
    if facts.figure != "weight_sqnr_db":
        drawn["weights"] = charts.site_chart(facts.sites, order, "weight_sqnr_db")
    if facts.findings.trials:
        drawn["trials"] = charts.trial_chart(facts.findings.trials, order)
    if facts.findings.search is not None and mixes.drawn(facts.findings.search):
        drawn["search"] = mixes.mix_chart(facts.findings.search)
    if facts.channels:
        drawn["channels"] = charts.channel_chart(facts.channels, order, of_block)
    return {**drawn, **_training_charts(facts)}


def _rounded(value: float | None, digits: int) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return round(value, digits) if digits else round(value)


def json_text(value: object) -> str:
    """Readable JSON, with null for what is not finite."""
    return json.dumps(_without_specials(value), indent=1, ensure_ascii=False, allow_nan=False, default=str)


def _without_specials(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _without_specials(item) for key, item in cast(Mapping[object, object], value).items()}
    if isinstance(value, (list, tuple)):
        return [_without_specials(item) for item in cast(Sequence[object], value)]
    return value


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
