"""What a model keeps without any text: formats and solvers that need none, at 2 to 4 bits.

    python benchmarks/data_free.py [--model DIR] [--name demo-model]

Judged by `bitwright bench` on the held-out part of the standard library's sources, KL divergence from the original.
Resumes where it was stopped; build/data-free-NAME holds the grid. Writes
benchmarks/results/data-free_<name>_<machine>_<date>.json and .md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from result_files import Row, write_results

from bitwright.bench import run_bench
from bitwright.demo import demo_model

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = (
    "W2A16-g64", "W2A16-g32", "W2A16-g64-floatzero", "W3A16-g64", "W3A16-g32", "W3A16-g64-floatzero",
    "lloyd3-gaussian-g64", "W4A16-g64", "W4A16-g32", "W4A16-g32-asym", "W4A16-g64-floatzero", "nf4-g64-dq",
    "lloyd4-gaussian-g64",
)  # fmt: skip
METHODS = ("rtn", "hqq")
SEQLEN, WINDOWS = 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--name", default="demo-model", help="of the model, in the results' file names")
    args = parser.parse_args()
    found = run_bench(
        args.model, ROOT / "build" / f"data-free-{args.name}", schemes=SCHEMES, methods=METHODS, text="stdlib:heldout",
        seqlen=SEQLEN, max_windows=WINDOWS,
    )  # fmt: skip
    rows = [
        {"scheme": record["scheme"], "method": record["method"], **record["figures"]}
        for record in found.records
        if record["kind"] == "cell" and record["status"] == "done"
    ]
    write_results("data-free", {"name": args.name}, sorted(rows, key=lambda row: row["bits_per_weight"]), page)


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The rows as Markdown, the smallest first; marked are those that nothing of their size or smaller beats."""
    c = circumstances
    lines = [
        f"# Without text: {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/data_free.py --name {c['name']}` on {c['machine']}. No calibration; ranges of the least "
        f"squared error. Judged on {WINDOWS} windows of {SEQLEN} tokens of stdlib:heldout: KL divergence from the "
        "original in nats per token ± standard error. Bold: nothing of its size or smaller loses less.",
        "",
        "| bits per weight | scheme | method | KL | perplexity |",
        "|---:|---|---|---|---:|",
    ]
    for row in rows:
        rivals = [r["kl_mean"] for r in rows if r["bits_per_weight"] <= row["bits_per_weight"]]
        mark = "**" if row["kl_mean"] == min(rivals) else ""
        lines.append(
            f"| {row['bits_per_weight']:.3f} | {mark}{row['scheme']}{mark} | {mark}{row['method']}{mark} "
            f"| {row['kl_mean']:.5f} ± {row['kl_stderr']:.5f} | {row['perplexity']:.3f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
