"""Quantization-aware training against the best post-training quantization of the same size.

    python benchmarks/qat.py --name demo-model [--model DIR] [--data TEXT] [--heldout TEXT] [--steps 300]
        [--rows W3A16-g64:block_ap:kl+0.1:rest,...] [--known]

Every row is a `bitwright train qat` run: its method quantizes (the baseline), then its codes are trained, towards the
original model (kl), with a share of the text's labels (kl+0.1), or on the text alone (cross_entropy). Both are judged
in memory on the same held-out windows, with the codes that are exported. What training recovers is the share of the
perplexity that the baseline loses. Resumes: finished rows are read from --work. Writes
benchmarks/results/qat_<name>_<machine>_<date>.json and .md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from result_files import Row, write_results

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    "W4A16-channel:gptaq:kl+0.1:rest", "W3A16-g64:block_ap:kl+0.1:rest", "W2A16-g64:block_ap:kl+0.1:rest",
    "W4A16-channel:gptaq:kl:rest", "W3A16-g64:block_ap:kl:rest", "W2A16-g64:block_ap:kl:rest",
    "W4A16-channel:gptaq:cross_entropy:rest", "W3A16-g64:block_ap:cross_entropy:rest",
    "W2A16-g64:block_ap:cross_entropy:rest", "ternary-g64:gptq:kl+0.1:rest", "W4A16-g128:gptaq:kl+0.1:rest",
    "W4A8:gptaq:kl+0.1:rest",
)  # fmt: skip
"""scheme:method:loss, `kl+0.1` with a tenth of the text's labels, and `rest` where what stays in 16 bit is trained."""


def measure(args: argparse.Namespace, row: str) -> Row | None:
    """One row; None where only finished ones are wanted and it is not."""
    from bitwright.cli.console import ProgressBars
    from bitwright.qat_run import QatTask, train_quantized
    from bitwright.recipe import Recipe
    from bitwright.runs import RunDirectory
    from bitwright.schemes import Scheme
    from bitwright.train.options import TrainingOptions
    from bitwright.train.qat import QatOptions
    from bitwright.training_text import TrainingText

    scheme, method, loss, *rest = row.split(":")
    out = args.work / row.replace(":", "-")
    if args.known and not (out.is_dir() and RunDirectory(out).is_complete):
        return None
    loss, _, labels = loss.partition("+")
    task = QatTask(
        recipe=Recipe(scheme=Scheme.parse(scheme), method=method, max_kl=100.0),
        text=TrainingText(data=args.data, heldout=args.heldout, seqlen=args.seqlen, windows=args.windows),
        training=TrainingOptions(steps=args.steps, batch=args.batch, learning_rate=args.learning_rate),
        qat=QatOptions(freeze_after=0.8),
        loss=loss,
        labels=float(labels or 0),
        train_rest=bool(rest),
    )  # fmt: skip
    with ProgressBars(quiet=not sys.stderr.isatty()) as progress:
        found = train_quantized(args.model, task, out, progress=progress)
    results = {key: value for key, value in found.results.items() if key != "losses"}
    print(f"{row}: perplexity {results['perplexity_before']:.3f} -> {results['perplexity']:.3f}", file=sys.stderr)
    return {"row": row, "scheme": scheme, "method": method, "rest": bool(rest), **results}


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The results file."""
    c = circumstances
    lines = [
        f"# Quantization-aware training of {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/qat.py --name {c['name']}` on {c['machine']}: {c['steps']} steps of {c['batch']} windows "
        f"of {c['seqlen']} tokens of {c['data']} ({c['windows']} windows), rate {c['learning_rate']:g} "
        "steps of a grid, grids frozen after 80 % of them. Judged on "
        f"{rows[0]['heldout_tokens']} tokens of {c['heldout']}; the original's perplexity is "
        f"{rows[0]['perplexity_original']:.3f}. Before: the baseline, post-training quantization by the method named; "
        "after: the trained codes, and where the rest is trained also what stays in 16 bit. kl+0.1: a tenth "
        "of the loss is the text's own next tokens. Recovered is the share of "
        "the baseline's loss in perplexity (and of its KL), and of the loss of the best baseline of the scheme in this "
        f"table. Seconds are of the whole run with the baseline. {c['note']}",
        "",
        "| scheme | baseline | loss | rest trained | bits | perplexity before | after | recovered "
        "| of the best baseline | KL before | after | recovered | seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        best = min(each["perplexity_before"] for each in rows if each["scheme"] == r["scheme"])
        lines.append(
            f"| {r['scheme']} | {r['method']} | {r['row'].split(':')[2]} | {'yes' if r['rest'] else 'no'} "
            f"| {r['bits_per_weight']:.3f} | {r['perplexity_before']:.3f} | {r['perplexity']:.3f} "
            f"| {recovered(r, r['perplexity_before']):.0%} | {recovered(r, best):.0%} "
            f"| {r['kl_before']:.5f} | {r['kl_mean']:.5f} | {1 - r['kl_mean'] / r['kl_before']:.0%} "
            f"| {r['seconds']:.0f} | {r['peak_memory_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def recovered(row: Row, before: float) -> float:
    """The share of a baseline's loss in perplexity that training took back."""
    return (before - row["perplexity"]) / (before - row["perplexity_original"])


def main() -> None:
    from bitwright.demo import demo_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the model, in the results' file names")
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--data", default="stdlib:train")
    parser.add_argument("--heldout", default="stdlib:heldout")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--known", action="store_true", help="measure nothing: a page of the rows that are finished")
    parser.add_argument("--note", default="", help="a sentence for the page: how the machine was shared, say")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    args.work = args.work or ROOT / "build" / f"qat-{args.name}"
    rows = [row for name in args.rows.split(",") if (row := measure(args, name)) is not None]
    kept = ("name", "data", "heldout", "steps", "batch", "seqlen", "windows", "learning_rate", "note")
    write_results("qat", {key: getattr(args, key) for key in kept}, rows, page)


if __name__ == "__main__":
    main()
