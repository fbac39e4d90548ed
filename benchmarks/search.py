"""Mixes that `bitwright search` finds against uniform schemes of the same size: quantized by one solver, judged alike.

    python benchmarks/search.py --name demo-model [--model DIR] [--calibration TEXT] [--text TEXT] [--samples 64]
        [--seqlen 256] [--windows 64] [--rounds 20] [--method gptq] [--work FOLDER]

Every uniform scheme and every mix becomes a run of its own, and divergences are measured on text that nothing was
calibrated on. A mix is compared with the best uniform scheme within its budget, and with the optimum that the scores
promise. One mix more may lose what 8 bits for all lose, both rounded to nearest, and is to be smaller. Mixes for vllm
have schemes that it may load, and fused products share one; for transformers every site chooses alone, and tables are
in the menu. Finished runs are not repeated.
Writes benchmarks/results/search_<name>_<machine>_<date>.json and .md.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from result_files import write_results
from search_bounds import (
    AVERAGE_BITS,
    EIGHT_BIT,
    ENGINES,
    HALF,
    SMALLER,
    Bench,
    Row,
    bound_lines,
    bounds,
    parser_of,
    uniform_schemes,
)

from bitwright.budget import Budget
from bitwright.pipeline import evaluate, quantize
from bitwright.recipe import Recipe
from bitwright.schemes import Scheme

EIGHT_BIT_MIX = "mix-8-bit-kl"


class MeasuringBench(Bench):
    """Quantizes and judges besides."""

    def measure(self, name: str, recipe: Recipe) -> Row:
        """Quantize by one recipe and judge the result."""
        args = self.args
        result = quantize(args.model, recipe, self.work / name)
        score, _ = evaluate(
            str(self.work / name), args.text, reference=str(args.model), seqlen=args.seqlen, max_windows=args.windows
        )
        kept = ("bits_per_weight", "size_bytes")
        return {
            "name": name, **{key: result.results[key] for key in kept}, "kl_mean": score.kl_mean,
            "kl_stderr": score.kl_stderr, "perplexity": score.perplexity,
        }  # fmt: skip

    def rounded_loss(self, scheme: str) -> float:
        """What a search would measure of one scheme for all: rounded to nearest, on its own windows."""
        search = self.search(Budget(average_bits=8), "vllm")
        with search.measuring(extra=[scheme]) as measure:
            return measure([dict.fromkeys((site.name for site in search.sites), str(Scheme.parse(scheme)))])[0]

    def mix(self, name: str, budget: Budget, engine: str) -> Row:
        """Search a mix, quantize and judge it."""
        start = time.perf_counter()
        found = self.search(budget, engine).run(rounds=self.args.rounds)
        said = {
            "engine": engine, "asked_bits": budget.average_bits, "predicted_loss": found.predicted_loss,
            "start_loss": found.start_loss, "polished_loss": found.measured_loss,
            "search_seconds": time.perf_counter() - start, "schemes": dict(Counter(found.schemes.values())),
        }  # fmt: skip
        return {**self.measure(name, found.recipe(self.base)), **said}


def run(bench: MeasuringBench) -> list[Row]:
    """All rows, uniform ones first."""
    schemes = uniform_schemes(bench)
    rows = [bench.measure(each, replace(bench.base, scheme=Scheme.parse(each))) for each in schemes]
    asked = [
        (f"mix-{bits:g}-bits-{engine}", Budget(average_bits=bits), engine)
        for engine in ENGINES for bits in AVERAGE_BITS
    ]  # fmt: skip
    for name, budget, engine in (*asked, (EIGHT_BIT_MIX, Budget(max_kl=bench.rounded_loss(EIGHT_BIT)), "vllm")):
        rows.append(bench.mix(name, budget, engine))
        print(rows[-1], flush=True)
    return rows


def answers(rows: Sequence[Row]) -> list[str]:
    """Each mix against the uniform schemes."""
    uniform = [row for row in rows if not row["name"].startswith("mix")]
    eight = next(row for row in uniform if row["name"] == EIGHT_BIT)
    found: list[str] = []
    for mix in (row for row in rows if row["name"].startswith("mix")):
        if mix["name"] == EIGHT_BIT_MIX:
            smaller = 1 - mix["size_bytes"] / eight["size_bytes"]
            verdict = "" if smaller >= SMALLER and mix["kl_mean"] <= eight["kl_mean"] else " NOT REACHED"
            found.append(
                f"at the KL of {EIGHT_BIT} ({eight['kl_mean']:.2g}): KL {mix['kl_mean']:.2g}, {100 * smaller:.0f} % "
                f"smaller files (asked: {100 * SMALLER:.0f} %).{verdict}"
            )
            continue
        best = min(
            (row for row in uniform if row["bits_per_weight"] <= mix["asked_bits"]),
            key=lambda row: row["kl_mean"],
        )
        share = mix["kl_mean"] / best["kl_mean"]
        found.append(
            f"{mix['name']}: {share:.2f} of the KL of {best['name']}, the best uniform scheme within its budget "
            f"(asked: {HALF:.2f}).{'' if share <= HALF else ' NOT REACHED'} The polish took the rounded mix from "
            f"{mix['start_loss']:.4g} to {mix['polished_loss']:.4g} nats."
        )
    return found


def page(circumstances: Row, everything: Sequence[Row]) -> str:
    """The page as Markdown."""
    c, rows = circumstances, [row for row in everything if "name" in row]
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
    lines += ["", *bound_lines([row for row in everything if "name" not in row])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    bench = MeasuringBench(args=args)
    circumstances = {
        "name": args.name, "calibration": Path(args.calibration).name, "text": Path(args.text).name,
        "samples": args.samples, "seqlen": args.seqlen, "windows": args.windows, "rounds": args.rounds,
        "method": args.method,
    }  # fmt: skip
    write_results("search", circumstances, [*run(bench), *bounds(bench)], page)


if __name__ == "__main__":
    main()
