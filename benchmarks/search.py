"""Mixes that `bitwright search` finds against uniform schemes of the same size: quantized by one solver, judged alike.

    python benchmarks/search.py --name demo-model [--model DIR] [--calibration TEXT] [--text TEXT] [--samples 64]
        [--seqlen 256] [--windows 64] [--rounds 20] [--method gptq] [--work FOLDER]

Every uniform scheme and every mix becomes a run of its own, and divergences are measured on text that nothing was
calibrated on. A mix is compared with the best uniform scheme within its budget, and with the optimum that the scores
promise. Mixes for vllm have schemes that it may load, and fused products share one; for transformers every site chooses
alone, and tables are in the menu. Finished runs are not repeated.
Writes benchmarks/results/search_<name>_<machine>_<date>.json and .md.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from bitwright.search.allocate import Choice, Item, Limits, allocate, total
from bitwright.search.bound import water_filling
from bitwright.search.menus import fits

ROOT = Path(__file__).resolve().parents[1]
UNIFORM = (
    "W2A16-g32", "W3A16-channel", "W3A16-g128", "W3A16-g32", "nf4-g64-dq", "W4A16-channel", "W4A16-g128", "W4A16-g32",
    "W5A16-channel", "W6A16-channel", "W8A16-channel",
)  # fmt: skip
AVERAGE_BITS = (3.25, 4.5, 5.0)
ENGINES = ("vllm", "transformers")
EIGHT_BIT, EIGHT_BIT_MIX = "W8A16-channel", "mix-8-bit-kl"
HALF, SMALLER = 0.5, 0.3
"""What was hoped for: the share of the best uniform scheme's KL, and of the bytes that are saved at equal KL."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What every row has in common."""

    args: argparse.Namespace
    work: Path

    @property
    def base(self) -> Recipe:
        """The recipe but for its schemes."""
        args = self.args
        calibration = Calibration(text=args.calibration, num_samples=args.samples, seqlen=args.seqlen)
        return Recipe(method=args.method, calibration=calibration)

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

    def search(self, budget: Budget, engine: str, schemes: Sequence[str] = ()) -> Search:
        """A search that finds the scores of others before it."""
        args = self.args
        model = open_model(args.model, device="cpu", dtype="float32", trust_remote_code=False)
        tokens = text_sample(
            model, args.calibration, args.seqlen, num_samples=args.samples, seed=0, trust_remote_code=False
        )
        folder = self.work / "search"
        return Search(model, tokens, self.base, budget, folder, fuse=engine == "vllm", schemes=schemes)

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


def run(bench: Bench) -> list[Row]:
    """All rows, uniform ones first."""
    schemes = uniform_schemes(bench)
    rows = [bench.measure(each, replace(bench.base, scheme=Scheme.parse(each))) for each in schemes]
    eight = next(row for row in rows if row["name"] == EIGHT_BIT)
    asked = [
        (f"mix-{bits:g}-bits-{engine}", Budget(average_bits=bits), engine)
        for engine in ENGINES for bits in AVERAGE_BITS
    ]  # fmt: skip
    for name, budget, engine in (*asked, (EIGHT_BIT_MIX, Budget(max_kl=eight["kl_mean"]), "vllm")):
        rows.append(bench.mix(name, budget, engine))
        print(rows[-1], flush=True)
    return rows


def uniform_schemes(bench: Bench) -> list[str]:
    """Those that fit the model."""
    search = bench.search(Budget(average_bits=8), "vllm")
    return [name for name in UNIFORM if fits(name, search.sites, search.recipe.ragged)]


def bounds(bench: Bench) -> list[Row]:
    """What the scores say of the best mix of every budget, and what any mix could reach."""
    return [row for engine in ENGINES for row in bounds_of(bench, engine)]


def bounds_of(bench: Bench, engine: str) -> list[Row]:
    """Optima of one engine's menu by the scores, each beside the best uniform scheme by the same scores."""
    uniform = uniform_schemes(bench)
    menu = bench.search(Budget(average_bits=8), engine).menu
    search = bench.search(Budget(average_bits=8), engine, tuple(dict.fromkeys((*menu, *uniform))))
    every = search.items(search.scores())
    items = [replace(item, choices=tuple(c for c in item.choices if c.scheme in (*menu, None))) for item in every]
    counts = [sum(site.out_features * site.in_features for site in members) for members in search.sets]
    weights = sum(counts)
    alike = {name: [choice_of(item, name) for item in every] for name in uniform}
    found: list[Row] = []
    for bits in AVERAGE_BITS:
        fitting = [name for name in uniform if 8 * total(alike[name], "size_bytes") / weights <= bits]
        best = min(fitting, key=lambda name: total(alike[name], "loss"))
        least = allocate(items, limits=Limits(max_size_bytes=bits * weights / 8)).loss
        found.append({"engine": engine, "bits": bits, "uniform": best, "share": least / total(alike[best], "loss")})
    eight = alike[EIGHT_BIT]
    smallest = allocate(items, objective="size", limits=Limits(max_loss=total(eight, "loss")))
    filled = water_filling([choice.loss for choice in eight], counts)
    found.append({
        "engine": engine, "bits": 8 * total(eight, "size_bytes") / weights, "uniform": EIGHT_BIT,
        "equal_loss_bits": 8 * smallest.size_bytes / weights, "filled_share": filled.share,
        "saved_bits": filled.saved_bits,
    })  # fmt: skip
    return found


def choice_of(item: Item, scheme: str) -> Choice:
    return next(choice for choice in item.choices if choice.scheme == str(Scheme.parse(scheme)))


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


def bound_lines(found: Sequence[Row]) -> list[str]:
    """What is out of reach, and why."""
    lines = [
        "## What is out of reach",
        "",
        "By the scores (losses of sites add up, weights rounded to nearest) the best mix of a budget is known exactly: "
        "HiGHS proves it over the whole menu. Its share of the loss that the best uniform scheme has by the same "
        "scores is the most that a search can promise; what the solver then makes of both is measured above.",
        "",
        "| engine | bits | best uniform scheme within | the optimum's share of its loss |",
        "|---|---:|---|---:|",
    ]
    shares = (row for row in found if "share" in row)
    lines += [f"| {row['engine']} | {row['bits']:g} | {row['uniform']} | {row['share']:.2f} |" for row in shares]
    return [*lines, *(line for row in found if "saved_bits" in row for line in ("", filled_line(row)))]


def filled_line(row: Row) -> str:
    """What a choice of bits alone could gain."""
    wanted = (1 - SMALLER) * row["bits"]
    missing = row["equal_loss_bits"] - wanted
    return (
        f"{row['engine']}: with any number of bits for every set of sites, and one bit more dividing a loss by four, "
        f"the least loss at equal size is {row['filled_share']:.2f} of the uniform one (the geometric over the "
        "arithmetic mean of the losses per weight), so half is "
        f"{'within' if row['filled_share'] <= HALF else 'out of'} reach of a choice of bits alone, and "
        f"{row['saved_bits']:.2f} bits per weight may go at equal loss. What is below that share comes from better "
        "formats and from room that uniform schemes leave in a budget. At the loss "
        f"of {row['uniform']} ({row['bits']:.2f} bits) the smallest mix of the menu has {row['equal_loss_bits']:.2f} "
        f"bits; {100 * SMALLER:.0f} % fewer would be {wanted:.2f}, where losses are {4**missing:.0f} times as large."
    )


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
    bench = Bench(args=args, work=work)
    rows = [*run(bench), *bounds(bench)]
    circumstances = {
        "name": args.name, "calibration": Path(args.calibration).name, "text": Path(args.text).name,
        "samples": args.samples, "seqlen": args.seqlen, "windows": args.windows, "rounds": args.rounds,
        "method": args.method,
    }  # fmt: skip
    write_results("search", circumstances, rows, page)


if __name__ == "__main__":
    main()
