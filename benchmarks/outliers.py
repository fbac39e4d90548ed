"""What activation outliers do to 8-bit activations: the same schemes on a model and on its outlier test bed.

    python benchmarks/outliers.py [--model DIR] [--factors 16,64,256] [--channels 4] [--out benchmarks/results]

The test bed computes the model's function with some hidden channels made `factor` times louder in front of every group
of sites behind a norm, and the sites' columns as much smaller (`bitwright testbed`). Calibration: the training part of
the standard library's sources; evaluation: its held-out part, KL divergence from the model itself.
"""

import argparse
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import bitwright
from bitwright.demo import demo_model
from bitwright.recipe import Calibration, Recipe
from bitwright.records import Environment, write_json_atomic, write_text_atomic
from bitwright.schemes import Scheme
from bitwright.testbed import plant_outliers

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = (
    "W8A16", "W8A8-static-minmax", "W8A8-static-average", "W8A8-static-percentile", "W8A8-static-entropy",
    "W8A8-static-mse", "W8A8-acttensor", "W8A8", "W8A8-actg64", "fp8-static-minmax", "fp8",
)  # fmt: skip
NUM_WINDOWS, SEQLEN, CALIBRATION_WINDOWS = 16, 256, 32
NEVER_FAILS = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--factors", default="16,64,256", help="comma-separated powers of two")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    factors = [float(factor) for factor in given.factors.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        beds = {1.0: given.model}
        for factor in factors:
            beds[factor] = Path(folder) / f"bed-{factor:g}"
            plant_outliers(given.model, beds[factor], channels=given.channels, factor=factor)
        for name in SCHEMES:
            for factor, bed in beds.items():
                rows.append({"scheme": name, "factor": factor, **measure(name, bed, given.model, Path(folder) / "run")})
                print(f"{name:26s} factor {factor:5g}   KL {rows[-1]['kl_mean']:.5f}", flush=True)
    stem = f"outliers_{given.model.name}_{date.today().isoformat()}"
    environment = Environment.capture()
    write_json_atomic(given.out / f"{stem}.json", {"environment": environment.to_mapping(), "rows": rows})
    write_text_atomic(given.out / f"{stem}.md", page(rows, given.model.name, given.channels, environment))
    print(f"written: {given.out / stem}.md")


def measure(name: str, bed: Path, reference: Path, run: Path) -> dict[str, Any]:
    """Quantize a model in a scheme, by rounding to nearest; return its divergence from the reference."""
    scheme = Scheme.parse(name)
    calibrates = scheme.activations is not None and scheme.activations.observer is not None
    text = "stdlib" if calibrates else None
    calibration = Calibration(text=text, num_samples=CALIBRATION_WINDOWS, seqlen=SEQLEN)
    recipe = Recipe(scheme=scheme, method="rtn", calibration=calibration, max_kl=NEVER_FAILS)
    bitwright.quantize(bed, recipe, run, fresh=True)
    score, _ = bitwright.evaluate(run, "stdlib:heldout", reference=reference, seqlen=SEQLEN, max_windows=NUM_WINDOWS)
    return {
        "kl_mean": score.kl_mean, "kl_stderr": score.kl_stderr, "perplexity": score.perplexity,
        "same_top1": score.same_top1, "num_tokens": score.num_tokens,
    }  # fmt: skip


def page(rows: list[dict[str, Any]], model: str, channels: int, environment: Environment) -> str:
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    cells = {(row["scheme"], row["factor"]): row for row in rows}
    heads = ["plain" if factor == 1 else f"×{factor:g}" for factor in factors]
    lines = [
        f"# Activation outliers: {model}",
        "",
        f"{channels} hidden channels planted; round to nearest; KL divergence in nats per token ± standard error, over "
        f"{rows[0]['num_tokens']} tokens of held-out text (the standard library's sources), in windows of "
        f"{SEQLEN}; calibrated on {CALIBRATION_WINDOWS} windows of its training part.",
        f"{environment.cpu}, {environment.num_cores} cores, {date.today().isoformat()}, torch "
        f"{environment.versions['torch']}; made by `python benchmarks/outliers.py`.",
        "",
        f"| scheme | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for name in dict.fromkeys(row["scheme"] for row in rows):
        values = (cells[name, factor] for factor in factors)
        lines.append(f"| {name} | " + " | ".join(f"{v['kl_mean']:.4f} ± {v['kl_stderr']:.4f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
