"""Which cheap score foresees what quantizing one site costs, and how long each score takes.

    python benchmarks/sensitivity.py [--model DIR] [--text stdlib] [--samples 64] [--seqlen 256]

Every score is first measured by itself, in a folder of its own, for its seconds; then all cheap ones together. The
scores are correlated with the measured divergence from the original with one site quantized: over all pairs of site and
scheme, and over the sites of each scheme.
"""

import argparse
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from bitwright.demo import demo_model
from bitwright.records import write_json_atomic, write_text_atomic
from bitwright.search.question import CHEAP_SCORES, MEASURED
from bitwright.sensitivity_report import SensitivityReport, report_sensitivity

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = "all cheap"
OTHER_TARGETS = ("inputs", "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:

        def measure(name: str, folder: str, **options: Any) -> SensitivityReport:
            start = time.perf_counter()
            report = report_sensitivity(
                given.model, Path(temporary) / folder, calibration=given.text, num_samples=given.samples,
                seqlen=given.seqlen, **options,
            )  # fmt: skip
            seconds[name] = time.perf_counter() - start
            print(f"{name:16s} {seconds[name]:7.1f} s", flush=True)
            return report

        cheap = CHEAP_SCORES["weights"]
        for score in cheap:
            measure(score, score, scores=[score])
        measure(TOGETHER, "together", scores=cheap)
        measure(MEASURED, "together", scores=[MEASURED])
        reports = {"weights": measure("correlations", "together")}
        del seconds["correlations"]
        for target in OTHER_TARGETS:
            reports[target] = measure(target, target, target=target)
    stem = f"sensitivity_{given.model.name}_{date.today().isoformat()}"
    for report in reports.values():
        report.circumstances["model"] = given.model.name  # a path of this machine says nothing elsewhere
    content = {
        "model": given.model.name,
        "date": date.today().isoformat(),
        "seconds": seconds,
        "reports": {target: report.to_json() for target, report in reports.items()},
    }
    write_json_atomic(given.out / f"{stem}.json", content)
    write_text_atomic(given.out / f"{stem}.md", page(content))
    print(f"written: {given.out / stem}.md")


def page(content: dict[str, Any]) -> str:
    reports, seconds = content["reports"], content["seconds"]
    options = reports["weights"]["circumstances"]
    environment = options["environment"]
    num_sites = len(reports["weights"]["scores"][MEASURED]["values"])
    lines = [
        f"# Sensitivity of single sites: {content['model']}",
        "",
        f"{num_sites} sites, {options['num_samples']} windows of {options['seqlen']} tokens of `{options['text']}`; "
        f"divergences measured on the first {options['num_measured_windows']} of them.",
        f"{environment['cpu']}, {environment['num_cores']} cores, {content['date']}, torch "
        f"{environment['versions']['torch']}; made by `python benchmarks/sensitivity.py`.",
        "",
        "## Rank correlation with the measured divergence",
        "",
        "`all`: every pair of site and scheme. The other columns: the sites in one scheme.",
    ]
    for target, report in reports.items():
        if report["correlations"]:
            lines += ["", f"### {target}", "", *correlations(report["correlations"])]
    lines += [
        "",
        "## Seconds",
        "",
        "A score by itself, from opening the model on; `inputs` and `cache` with all their scores. Wall time, waiting",
        "for other work on the machine included.",
        "",
        "| score | s |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in seconds.items()),
        "",
        "## Measured: nats per token with one site quantized",
    ]
    for target, report in reports.items():
        lines += ["", f"### {target}", "", *table(report["scores"][MEASURED])]
    return "\n".join(lines) + "\n"


def correlations(found: dict[str, dict[str, float | None]]) -> list[str]:
    columns = list(next(iter(found.values())))
    rows = [
        f"| {score} | " + " | ".join("–" if each[c] is None else f"{each[c]:.2f}" for c in columns) + " |"
        for score, each in found.items()
    ]
    return [f"| score | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}", *rows]


def table(measured: dict[str, Any]) -> list[str]:
    schemes = measured["schemes"]
    rows = [
        f"| {site} | " + " | ".join(f"{values[scheme]:.2e}" for scheme in schemes) + " |"
        for site, values in measured["values"].items()
    ]
    return [f"| site | {' | '.join(schemes)} |", f"|---|{'---|' * len(schemes)}", *rows]


if __name__ == "__main__":
    main()
