"""Several runs side by side: what each costs and what it loses, as charts, as a table and as JSON."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bitwright.errors import RunError
from bitwright.reports import pareto, story, wording
from bitwright.reports.entries import is_finite
from bitwright.reports.facts import EvaluationFact, Facts, read_facts
from bitwright.reports.page import json_text, write_page, write_report
from bitwright.reports.speed import NOTHING

CHARTS = {
    "pareto": "bits_per_weight",
    "size": "size_bytes",
    "time": "seconds",
    "speed": "decode_tokens_per_s",
    "memory": "memory_bytes",
    "energy": "decode_j_per_token",
}
OPTIONAL = {
    "speed": "No result recorded how fast it generates (bitwright speed).",
    "memory": "No result recorded the memory that it takes to run (bitwright speed).",
    "energy": "No result recorded the energy of a token: it takes a machine with counters (bitwright speed).",
}
SHOWN = ("bits_per_weight", "size_bytes", "perplexity", "kl_mean", "same_top1", "seconds", "decode_tokens_per_s",
         "memory_bytes", "decode_j_per_token")  # fmt: skip


def compare_runs(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of each of several finished runs, and a page that sets them side by side.

    The loss is that on one text where all runs were evaluated on it, else that on the gate text of each.

    Args:
        runs: their directories; at least one.
        out: the page.
    Raises:
        RunError: no finished run in one of them, its records are damaged, or one is named twice.
        ResourceError: a page cannot be written.
    """
    facts = [read_facts(run) for run in runs]
    names = _names(runs)
    shared = _shared_evaluation(facts)
    rows: list[dict[str, Any]] = []
    for name, run, known in zip(names, runs, facts, strict=True):
        link = os.path.relpath(write_report(run), out.absolute().parent)
        rows.append({"name": name, **_figures(known, shared), "report": link})
    return write_comparison(rows, out, title=_title(facts), notes=_notes(facts, shared))


def write_comparison(rows: Sequence[Mapping[str, Any]], out: Path, *, title: str, notes: Sequence[str]) -> Path:
    """Write a page that sets several results of one model side by side.

    Args:
        rows: one mapping per result with name, bits_per_weight, size_bytes, perplexity, perplexity_stderr, kl_mean and
            kl_stderr (nats per token), same_top1 (fraction), seconds, and report: the path of its own report relative
            to `out`, or None; perhaps decode_tokens_per_s, decode_slowest and decode_fastest of its repetitions,
            decode_ratio to the original's, memory_bytes, decode_j_per_token, measured_with (the circumstances of these
            in words), failure (text) and whatever else belongs into the JSON. A figure may be None. A KL of 0 marks
            the reference, which the charts leave out.
        out: the file.
        title: the page's heading.
        notes: sentences on how the figures came about.
    Returns:
        the file written.
    Raises:
        ResourceError: the file cannot be written; an earlier page is untouched.
    """
    plain = [
        {**dict.fromkeys((*SHOWN, "failure", "perplexity_stderr", "kl_stderr", "decode_ratio")), **row} for row in rows
    ]
    drawn = {name: pareto.pareto_chart(plain, x) for name, x in CHARTS.items()}
    absent = {name: why for name, why in OPTIONAL.items() if not drawn[name]["data"][1]["x"]}
    return write_page(
        "comparison.html.j2", out, title=title, notes=notes, verdict=verdict(plain), wording=wording, absent=absent,
        rows=[{**row, "report": _link(row.get("report"))} for row in plain],
        json=json_text({"title": title, "notes": list(notes), "results": plain}),
        data={"charts": {name: chart for name, chart in drawn.items() if name not in absent}},
    )  # fmt: skip


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which result loses least, which is smallest, and which are beaten in both."""
    known = [
        row for row in rows
        if is_finite(row["kl_mean"]) and row["kl_mean"] > 0 and is_finite(row["size_bytes"])
    ]  # fmt: skip
    if not known:
        return ["No result has both a size and a divergence, so they cannot be ranked."]
    least, smallest = min(known, key=lambda row: row["kl_mean"]), min(known, key=lambda row: row["size_bytes"])
    sentences = [f"{least['name']} loses least: {_loss(least)}, at {wording.size(least['size_bytes'])}."]
    if smallest is not least:
        sentences.append(
            f"{smallest['name']} is smallest: {wording.size(smallest['size_bytes'])}, at {_loss(smallest)}."
        )
    beaten = [row["name"] for row in known if any(_beats(other, row) for other in known)]
    if beaten:
        sentences.append(f"Beaten by another in both size and loss: {', '.join(map(str, beaten))}.")
    sentences += _running(rows)
    failed = [str(row["name"]) for row in rows if row["failure"] is not None]
    if failed:
        sentences.append(f"Failed the gate: {', '.join(failed)}.")
    return sentences


def _running(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which result is fastest and which takes the least energy, where several were measured alike."""
    timed = [row for row in rows if is_finite(row.get("decode_tokens_per_s"))]
    if len(timed) < 2 or len({row.get("measured_with") for row in timed}) > 1:
        return []
    best = max(timed, key=lambda row: row["decode_tokens_per_s"])
    rivals = [str(row["name"]) for row in timed if row is not best and _overlap(row, best)]
    doubt = f"; the repetitions of {', '.join(rivals)} overlap with its own" if rivals else ""
    sentences = [f"{best['name']} writes fastest: {wording.number(best['decode_tokens_per_s'])} tokens/s{doubt}."]
    metered = [row for row in timed if is_finite(row.get("decode_j_per_token"))]
    if len(metered) > 1:
        best = min(metered, key=lambda row: row["decode_j_per_token"])
        words = f"{wording.number(best['decode_j_per_token'])} J per token"
        sentences.append(f"{best['name']} takes the least energy: {words}.")
    return sentences


def _overlap(slower: Mapping[str, Any], faster: Mapping[str, Any]) -> bool:
    """Whether the fastest repetition of the one is no slower than the slowest of the other."""
    high, low = slower.get("decode_fastest"), faster.get("decode_slowest")
    return high is not None and low is not None and high >= low


def _loss(row: Mapping[str, Any]) -> str:
    return f"{wording.with_stderr(row['kl_mean'], row['kl_stderr'])} nats per token"


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Nowhere worse, somewhere better."""
    pairs = [(one[key], other[key]) for key in ("size_bytes", "kl_mean")]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names; their paths where a name is not unique."""
    paths = [run.absolute() for run in runs]
    twice = next((run for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise RunError(f"{twice}: given twice. Give each run once.")
    short = [path.name for path in paths]
    return [name if short.count(name) == 1 else str(run) for name, run in zip(short, runs, strict=True)]


def _shared_evaluation(facts: Sequence[Facts]) -> tuple[Any, ...] | None:
    """Text, reference, context and windows that every run was evaluated with, the latest; None if there are none."""
    common = [_circumstances(evaluation) for evaluation in facts[0].evaluations if evaluation.kl_mean is not None]
    for known in facts[1:]:
        other = {_circumstances(evaluation) for evaluation in known.evaluations}
        common = [found for found in common if found in other]
    return common[-1] if common else None


def _circumstances(evaluation: EvaluationFact) -> tuple[Any, ...]:
    return evaluation.text, evaluation.reference, evaluation.seqlen, evaluation.num_windows


def _figures(known: Facts, shared: tuple[Any, ...] | None) -> dict[str, Any]:
    """The figures of one run, not finite ones as None."""
    results = known.results
    source: Any = results
    if shared is not None:
        source = next(e for e in reversed(known.evaluations) if _circumstances(e) == shared)
    speeds = known.findings.speeds
    measured = {} if speeds.result is None else speeds.result.figures
    rate = measured.get("decode_tokens_per_s", NOTHING)
    found = {
        "bits_per_weight": results.bits_per_weight,
        "size_bytes": results.size_bytes,
        "perplexity": source.perplexity,
        "perplexity_stderr": None if shared is None else source.perplexity_stderr,
        "kl_mean": source.kl_mean,
        "kl_stderr": source.kl_stderr,
        "same_top1": source.same_top1,
        "seconds": results.seconds,
        "peak_memory_bytes": results.peak_memory_bytes,
        "decode_tokens_per_s": rate.value,
        "decode_slowest": rate.slowest,
        "decode_fastest": rate.fastest,
        "decode_ratio": speeds.ratio("decode_tokens_per_s"),
        "memory_bytes": measured.get("memory_bytes", NOTHING).value,
        "decode_j_per_token": measured.get("decode_j_per_token", NOTHING).value,
    }
    finite = {key: value if is_finite(value) else None for key, value in found.items()}
    return {
        **finite, "measured_with": None if speeds.result is None else speeds.result.circumstances,
        "failure": known.failure, "model": known.asked.get("model"),
        "scheme": known.recipe.get("scheme"), "method": known.recipe.get("method"),
    }  # fmt: skip


def _title(facts: Sequence[Facts]) -> str:
    models = {story.model_name(known) for known in facts}
    return f"{wording.things(len(facts), 'run')} of {models.pop() if len(models) == 1 else 'several models'}"


def _notes(facts: Sequence[Facts], shared: tuple[Any, ...] | None) -> list[str]:
    notes: list[str] = []
    if shared is not None:
        text, reference, seqlen, windows = shared
        notes.append(
            f"Perplexity and divergence: {text}, {wording.things(windows, 'window')} of {wording.count(seqlen)} "
            f"tokens, against {reference}."
        )
    else:
        notes.append(
            "Perplexity and divergence: on the short gate text of each run, for want of a text on which all were "
            "evaluated against one reference (bitwright evaluate)."
        )
        if len({str(known.asked.get("data_hash")) for known in facts}) > 1:
            notes.append("These texts differ, so small differences mean nothing.")
    if len({str(known.asked.get("model_hash")) for known in facts}) > 1:
        notes.append("The runs are of different models: each divergence is from a model's own original.")
    measured = [known.findings.speeds.result for known in facts]
    circumstances = list(dict.fromkeys(speed.circumstances for speed in measured if speed is not None))
    if circumstances:
        notes.append(f"Speed, memory and energy: transformers, {'; or '.join(circumstances)}.")
    if len(circumstances) > 1:
        notes.append("These were measured differently and do not compare.")
    return notes


def _link(report: str | None) -> str | None:
    """A relative path as a URL: whatever could be read as a scheme or a query is quoted."""
    return None if report is None else quote(report, safe="/")
