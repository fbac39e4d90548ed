"""What methods make of activation outliers: W8A8, W4A8 and W4A4 on a model and on its outlier test bed.

    python benchmarks/outlier_methods.py [--model DIR] [--factor 64] [--out benchmarks/results]

The test bed computes the model's function with four hidden channels made `factor` times louder (`bitwright testbed`).
Calibration: the training part of the standard library's sources; evaluation: its held-out part, KL divergence from the
model itself, by `bitwright bench`. Resumes where it was stopped; build/outlier-methods holds the grids.
"""

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from bitwright.bench import run_bench
from bitwright.demo import demo_model
from bitwright.records import Environment, write_json_atomic, write_text_atomic
from bitwright.schemes import Scheme
from bitwright.testbed import plant_outliers

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "W8A8": ("rtn", "smoothquant", "llm_int8"),
    "W8A8-static": ("rtn", "smoothquant"),
    "W4A8": ("rtn", "gptq", "gptaq", "smoothquant+gptq", "rotation+gptq", "rotation+gptaq"),
    "W4A4": ("rtn", "gptq", "hadamard", "rotation", "rotation+gptq"),
}
SAMPLES, SEQLEN, WINDOWS = 64, 256, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--factor", type=float, default=64.0, help="a power of two")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    work = ROOT / "build" / f"outlier-methods-{given.model.name}-{given.factor:g}"
    bed = work / "bed"
    if not bed.exists():
        plant_outliers(given.model, bed, factor=given.factor)
    rows: list[dict[str, Any]] = []
    for name, model in (("original", given.model), ("test bed", bed)):
        for scheme, methods in METHODS.items():
            found = run_bench(
                model, work / name.replace(" ", "-"), schemes=[scheme], methods=methods, text="stdlib:heldout",
                calibration="stdlib", num_samples=SAMPLES, seqlen=SEQLEN, max_windows=WINDOWS,
            )  # fmt: skip
            rows += [
                {"model": name, "scheme": scheme, "method": record["method"], **record["figures"]}
                for record in found.records
                if record["kind"] == "cell" and record["scheme"] == str(Scheme.parse(scheme))
            ]
    stem = f"outlier-methods_{given.model.name}_{date.today().isoformat()}"
    environment = Environment.capture()
    write_json_atomic(given.out / f"{stem}.json", {"environment": environment.to_mapping(), "rows": rows})
    write_text_atomic(given.out / f"{stem}.md", page(rows, given.model.name, given.factor, environment))
    print(f"written: {given.out / stem}.md")


def page(rows: list[dict[str, Any]], name: str, factor: float, environment: Environment) -> str:
    """The rows as Markdown, with the share of the outliers' damage that each method undoes."""
    known = {(row["model"], row["scheme"], row["method"]): row["kl_mean"] for row in rows}
    lines = [
        f"# Methods against outliers: {name}, four channels {factor:g} times louder, {date.today().isoformat()}",
        "",
        f"`python benchmarks/outlier_methods.py --factor {factor:g}` on {environment.cpu}, {environment.num_cores} "
        f"cores. {SAMPLES} calibration windows of {SEQLEN} tokens of the standard library's sources, {WINDOWS} windows "
        "of its held-out part. KL divergence from the model in nats per token ± standard error. Recovered: the share "
        "of what outliers cost round-to-nearest, from the original's loss to the test bed's, that a method takes back.",
        "",
        "| scheme | model | method | KL | recovered | of rtn's KL |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        naive, clean = known["test bed", row["scheme"], "rtn"], known["original", row["scheme"], "rtn"]
        recovered = f"{100 * (naive - row['kl_mean']) / (naive - clean):.1f} %" if row["model"] == "test bed" else ""
        share = f"{row['kl_mean'] / naive:.4f}" if row["model"] == "test bed" else ""
        lines.append(
            f"| {row['scheme']} | {row['model']} | {row['method']} | {row['kl_mean']:.5f} ± {row['kl_stderr']:.5f} | "
            f"{recovered} | {share} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
