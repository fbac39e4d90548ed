"""Fine-tuning from one domain to another: all weights, LoRA at several ranks, QLoRA; quality, share and memory.

    python benchmarks/lora.py --name demo-model --data TEXT [--model DIR] [--steps 200] [--ranks 1,2,4,8,16,32,64]

Every row is trained on the same windows in the same order and judged on the same held-out windows. Resumes: finished
rows are read from --work. Writes benchmarks/results/lora_<name>_<machine>_<date>.json, .md and .svg (rank against
perplexity).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rank_plot import rank_plot
from result_files import FOLDER, Row, write_results

ROOT = Path(__file__).resolve().parents[1]
FULL_RATE_SHARE = 0.2
"""All weights are trained at a smaller rate than adapters, as is usual."""


def adapters(args: argparse.Namespace, rank: int, scheme: str | None) -> Row:
    """A row of LoRA or QLoRA."""
    from bitwright.adapter_run import AdapterTask, train_adapter
    from bitwright.cli.console import ProgressBars
    from bitwright.schemes import Scheme
    from bitwright.train.lora import LoraConfig

    task = AdapterTask(
        text=text_of(args), training=options_of(args, args.learning_rate),
        lora=LoraConfig(rank=rank, alpha=2.0 * rank), scheme=None if scheme is None else Scheme.parse(scheme),
    )  # fmt: skip
    name = f"{'lora' if scheme is None else 'qlora'}-{rank}"
    with ProgressBars(quiet=not sys.stderr.isatty()) as progress:
        results = train_adapter(args.model, task, args.work / name, progress=progress).results
    return {"row": name, **{key: value for key, value in results.items() if key != "losses"}}


def full(args: argparse.Namespace) -> Row:
    """The row of all weights, trained on the text like the others."""
    import json
    import time
    from dataclasses import asdict

    import torch

    from bitwright.process_memory import PeakMemory
    from bitwright.progress import no_progress
    from bitwright.records import write_json_atomic
    from bitwright.search.model_shape import shape_of_config
    from bitwright.train.engine import fit
    from bitwright.train.heldout import score_in_memory
    from bitwright.train.lora import trainable_ledger
    from bitwright.train.memory_ledger import Batch, predict_memory
    from bitwright.training_run import load_in_memory

    finished = args.work / "all-weights.json"
    if finished.is_file():
        return json.loads(finished.read_text(encoding="utf-8"))
    begun, memory = time.perf_counter(), PeakMemory()
    windows, heldout = text_of(args).draw(args.model, trust_remote_code=False).read(args.work, "cpu", no_progress)
    model = load_in_memory(args.model, "cpu", torch.float32, trust_remote_code=False)
    before = score_in_memory(model, heldout)
    curve = fit(model, windows, options_of(args, FULL_RATE_SHARE * args.learning_rate), args.work / "full")
    shape = shape_of_config(args.model).in_dtype(torch.float32)
    batch = Batch(num_sequences=args.batch, seqlen=args.seqlen)
    after, ledger = score_in_memory(model, heldout), trainable_ledger(model).total
    row = {
        "row": "full", "kind": "full", "rank": None, "perplexity_before": before.perplexity,
        "perplexity": after.perplexity, "perplexity_stderr": after.perplexity_stderr,
        "heldout_tokens": after.num_tokens, "trainable": ledger.num_trainable, "parameters": ledger.num_total,
        "memory": curve.memory,
        "predicted_memory": asdict(predict_memory(shape, {}, None, batch)),
        "peak_memory_bytes": memory.since_bytes,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    write_json_atomic(finished, row)
    return row


def text_of(args: argparse.Namespace) -> Any:
    from bitwright.training_text import TrainingText

    return TrainingText(data=args.data, seqlen=args.seqlen, windows=args.windows)


def options_of(args: argparse.Namespace, rate: float) -> Any:
    from bitwright.train.options import TrainingOptions

    return TrainingOptions(steps=args.steps, batch=args.batch, learning_rate=rate)


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The results file."""
    c = circumstances
    by_name = {row["row"]: row for row in rows}
    lines = [
        f"# Fine-tuning of {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/lora.py --name {c['name']}` on {c['machine']}: {c['steps']} steps of {c['batch']} windows "
        f"of {c['seqlen']} "
        f"tokens of {c['data']}, which the model has never seen. Judged on {rows[0]['heldout_tokens']} tokens of it "
        f"that are held out. Perplexity before: {rows[0]['perplexity_before']:.2f} (the quantized base has its own). "
        f"alpha is twice the rank; all weights are trained at {FULL_RATE_SHARE:g} of the adapters' learning rate "
        f"{c['learning_rate']:g}. Memory after the first step as counted in the live model, by purpose; predicted: "
        "the same in all, from the configuration alone (parts but activations are exact); peak growth: of the "
        f"process, also where it scores. {c['note']}",
        "",
    ]
    for name in by_name:
        if name.startswith("qlora-") and (other := by_name.get(name.removeprefix("q"))) is not None:
            ratio = by_name[name]["perplexity"] / other["perplexity"] - 1
            lines += [f"- {name} against {other['row']}: perplexity {ratio:+.2%}"]
    lines += [
        "",
        "| row | trainable | share | perplexity | weights, scales, adapters MB | gradients MB | optimizer MB "
        "| activations MB | in all | predicted | peak growth MB | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        memory = r["memory"]
        weights = memory["weights"] + memory["scales"] + memory["adapters"]
        predicted = sum(r["predicted_memory"].values())
        lines.append(
            f"| {r['row']} | {r['trainable']:,} | {r['trainable'] / r['parameters']:.2%} | {r['perplexity']:.3f} ± "
            f"{r['perplexity_stderr']:.3f} | {weights / 1e6:.2f} | {memory['gradients'] / 1e6:.2f} "
            f"| {memory['optimizer'] / 1e6:.2f} | {memory['activations'] / 1e6:.0f} "
            f"| {sum(memory.values()) / 1e6:.0f} | {predicted / 1e6:.0f} | {r['peak_memory_bytes'] / 1e6:.0f} "
            f"| {r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    from bitwright.demo import demo_model
    from bitwright.records import write_text_atomic

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the model, in the results' file names")
    parser.add_argument("--data", required=True, help="text of another domain")
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--ranks", default="1,2,4,8,16,32,64")
    parser.add_argument("--qlora-ranks", default="8,64")
    parser.add_argument("--scheme", default="nf4-b64-dq")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--note", default="", help="a sentence for the page: how the machine was shared, say")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    args.work = args.work or ROOT / "build" / f"lora-{args.name}"
    rows = [full(args)]
    rows += [adapters(args, int(rank), None) for rank in args.ranks.split(",")]
    rows += [adapters(args, int(rank), args.scheme) for rank in args.qlora_ranks.split(",")]
    kept = ("name", "steps", "batch", "seqlen", "windows", "learning_rate", "note")
    circumstances = {"data": Path(args.data).name, **{key: getattr(args, key) for key in kept}}
    write_results("lora", circumstances, rows, page)
    lines = {
        kind: [(row["rank"], row["perplexity"]) for row in rows if row["kind"] == kind] for kind in ("lora", "qlora")
    }
    plot = rank_plot(lines, {"all weights": rows[0]["perplexity"]}, f"{args.name}, {circumstances['data']}")
    write_text_atomic(FOLDER / f"lora_{args.name}.svg", plot)


if __name__ == "__main__":
    main()
