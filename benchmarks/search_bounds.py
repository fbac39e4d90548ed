"""What no mix can reach, by the scores alone: the optimum of each budget, and what a choice of bits could gain at all.

    python benchmarks/search_bounds.py --name demo-model [--model DIR] [--calibration TEXT] [--samples 64]
        [--seqlen 256] [--work FOLDER]

Nothing is quantized but on paper: minutes on a small model, most of them for scores, which are kept. `search.py` puts
the same section under what it measures. Writes benchmarks/results/search-bounds_<name>_<machine>_<date>.json and .md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from result_files import write_results

from bitwright.budget import Budget
from bitwright.demo import demo_model
from bitwright.mixture import Search
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
EIGHT_BIT = "W8A16-channel"
HALF, SMALLER = 0.5, 0.3
"""What was hoped for: the share of the best uniform scheme's KL, and of the bytes that are saved at equal KL."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The model, the text, and where scores and runs are kept.

    Attributes:
        args: of the command line; see `parser_of`.
    """

    args: argparse.Namespace

    @property
    def work(self) -> Path:
        """Folder of all that is kept."""
        return self.args.work or ROOT / "build" / f"search-{self.args.name}"

    @property
    def base(self) -> Recipe:
        """The recipe but for its schemes."""
        args = self.args
        calibration = Calibration(text=args.calibration, num_samples=args.samples, seqlen=args.seqlen)
        return Recipe(method=args.method, calibration=calibration)

    def search(self, budget: Budget, engine: str, schemes: Sequence[str] = ()) -> Search:
        """A search that finds the scores of others before it."""
        args = self.args
        model = open_model(args.model, device="cpu", dtype="float32", trust_remote_code=False)
        tokens = text_sample(
            model, args.calibration, args.seqlen, num_samples=args.samples, seed=0, trust_remote_code=False
        )
        folder = self.work / "search"
        return Search(model, tokens, self.base, budget, folder, fuse=engine == "vllm", schemes=schemes)


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
        fitting = [name for name in uniform if bits_per_weight(search, name) <= bits]
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


def bits_per_weight(search: Search, name: str) -> float:
    """Of a uniform scheme, as results of runs count it: without the few bytes that say a weight's shape."""
    real = search.assignment(dict.fromkeys((site.name for site in search.sites), name))
    bits = weights = 0
    for site in search.sites:
        scheme, float_bits = real[site.name], 8 * search.shape.site_dtypes[site.name].itemsize
        assert scheme is not None
        bits += scheme.weights.num_bits(site.out_features, site.in_features, float_bits=float_bits)
        weights += site.out_features * site.in_features
    return bits / weights


def choice_of(item: Item, scheme: str) -> Choice:
    return next(choice for choice in item.choices if choice.scheme == str(Scheme.parse(scheme)))


def bound_lines(found: Sequence[Row]) -> list[str]:
    """What is out of reach, and why."""
    lines = [
        "## What is out of reach",
        "",
        "By the scores (losses of sites add up, weights rounded to nearest) the best mix of a budget is known exactly: "
        "HiGHS proves it over the whole menu. Its share of the loss that the best uniform scheme has by the same "
        "scores is the most that a search can promise. A solver such as GPTQ then gains on both, not always alike.",
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


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """The options of both benchmarks."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--work", type=Path)
    return parser


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    c = circumstances
    lines = [
        f"# What no mix can reach on {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/search_bounds.py --name {c['name']} --samples {c['samples']} --seqlen {c['seqlen']}` on "
        f"{c['machine']}; scores on {c['calibration']}.",
        "",
        *bound_lines(rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parser_of(__doc__).parse_args()
    circumstances = {
        "name": args.name, "calibration": Path(args.calibration).name, "samples": args.samples, "seqlen": args.seqlen,
    }  # fmt: skip
    write_results("search-bounds", circumstances, bounds(Bench(args=args)), page)


if __name__ == "__main__":
    main()
