"""Mixes that `bitwright search` finds against uniform schemes of the same size: quantized by one solver, judged alike.

    python benchmarks/search.py --name demo-model [--model DIR] [--calibration TEXT] [--text TEXT] [--samples 64]
        [--seqlen 256] [--windows 64] [--rounds 20] [--method gptq] [--work FOLDER]

Every uniform scheme and every mix becomes a run of its own, and divergences are measured on text that nothing was
calibrated on. A mix is compared with the best uniform scheme within its budget. Finished runs are not repeated.
Writes benchmarks/results/search_<name>_<machine>_<date>.json and .md.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from result_files import write_results

from bitwright.budget import Budget
from bitwright.demo import demo_model
from bitwright.mixture import Search
from bitwright.pipeline import evaluate, quantize
from bitwright.preparation import open_model, text_sample
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme

ROOT = Path(__file__).resolve().parents[1]
UNIFORM = ("W3A16-g128", "W3A16-g32", "W4A16-g128", "W4A16-g32", "W5A16-g128", "W6A16-g128", "W8A16-channel")
AVERAGE_BITS = (3.25, 4.5, 5.0)
EIGHT_BIT = "W8A16-channel"

Row = dict[str, Any]


def measure(args: argparse.Namespace, name: str, recipe: Recipe, work: Path) -> Row:
    """Quantize one recipe and judge it."""
    result = quantize(args.model, recipe, work / name)
    score, _ = evaluate(
        str(work / name), args.text, reference=str(args.model), seqlen=args.seqlen, max_windows=args.windows
    )
    kept = ("bits_per_weight", "size_bytes")
    return {
        "name": name, **{key: result.results[key] for key in kept}, "kl_mean": score.kl_mean,
        "kl_stderr": score.kl_stderr, "perplexity": score.perplexity,
    }  # fmt: skip


def find(args: argparse.Namespace, budget: Budget, base: Recipe, work: Path) -> tuple[Recipe, Row]:
    """Search a mix; its recipe, and what the search said of it."""
    model = open_model(args.model, device="cpu", dtype="float32", trust_remote_code=False)
    tokens = text_sample(
        model, args.calibration, args.seqlen, num_samples=args.samples, seed=0, trust_remote_code=False
    )
    start = time.perf_counter()
    found = Search(model, tokens, base, budget, work / "search").run(rounds=args.rounds)
    return found.recipe(base), {
        "predicted_loss": found.predicted_loss, "start_loss": found.start_loss, "polished_loss": found.measured_loss,
        "search_seconds": time.perf_counter() - start,
    }  # fmt: skip


def run(args: argparse.Namespace, work: Path) -> list[Row]:
    """All rows, uniform ones first."""
    calibration = Calibration(text=args.calibration, num_samples=args.samples, seqlen=args.seqlen)
    base = Recipe(method=args.method, calibration=calibration)
    rows = [
        measure(args, scheme, Recipe(scheme=Scheme.parse(scheme), method=args.method, calibration=calibration), work)
        for scheme in UNIFORM
    ]
    eight = next(row for row in rows if row["name"] == EIGHT_BIT)
    budgets = {f"mix-{bits:g}-bits": Budget(average_bits=bits) for bits in AVERAGE_BITS}
    budgets["mix-8-bit-kl"] = Budget(max_kl=eight["kl_mean"])
    for name, budget in budgets.items():
        recipe, said = find(args, budget, base, work)
        rows.append({**measure(args, name, recipe, work), **said, "asked_bits": budget.average_bits})
        print(rows[-1], flush=True)
    return rows


def answers(rows: Sequence[Row]) -> list[str]:
    """Each mix against the uniform schemes."""
    uniform = [row for row in rows if not row["name"].startswith("mix")]
    eight = next(row for row in uniform if row["name"] == EIGHT_BIT)
    found: list[str] = []
    for mix in (row for row in rows if row["name"].startswith("mix")):
        if mix["name"] == "mix-8-bit-kl":
            smaller = 1 - mix["size_bytes"] / eight["size_bytes"]
            verdict = "" if smaller >= 0.3 and mix["kl_mean"] <= eight["kl_mean"] else " NOT REACHED"
            found.append(
                f"at the KL of {EIGHT_BIT} ({eight['kl_mean']:.2g}): KL {mix['kl_mean']:.2g}, {100 * smaller:.0f} % "
                f"smaller files (asked: 30 %).{verdict}"
            )
            continue
        best = min(
            (row for row in uniform if row["bits_per_weight"] <= mix["asked_bits"]),
            key=lambda row: row["kl_mean"],
        )
        share = mix["kl_mean"] / best["kl_mean"]
        found.append(
            f"{mix['name']}: {share:.2f} of the KL of {best['name']}, the best uniform scheme within its budget "
            f"(asked: 0.50).{'' if share <= 0.5 else ' NOT REACHED'} The polish took the rounded mix from "
            f"{mix['start_loss']:.4g} to {mix['polished_loss']:.4g} nats."
        )
    return found


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    c = circumstances
    lines = [
        f"# Searched mixes on {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/search.py --name {c['name']} --samples {c['samples']} --seqlen {c['seqlen']} --windows "
        f"{c['windows']} --rounds {c['rounds']} --method {c['method']}` on {c['machine']}. Everything is quantized by "
        f"{c['method']} on {c['calibration']} and judged on {c['text']}; KL in nats per token ± standard error.",
        "",
        *(f"- {answer}" for answer in answers(rows)),
        "",
        "| | bits per weight | size MB | KL | perplexity |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['bits_per_weight']:.3f} | {row['size_bytes'] / 1e6:.3f} | {row['kl_mean']:.6f} ± "
        f"{row['kl_stderr']:.6f} | {row['perplexity']:.3f} |"
        for row in sorted(rows, key=lambda row: row["size_bytes"])
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or ROOT / "build" / f"search-{args.name}"
    rows = run(args, work)
    circumstances = {
        "name": args.name, "calibration": Path(args.calibration).name, "text": Path(args.text).name,
        "samples": args.samples, "seqlen": args.seqlen, "windows": args.windows, "rounds": args.rounds,
        "method": args.method,
    }  # fmt: skip
    write_results("search", circumstances, rows, page)


if __name__ == "__main__":
    main()
