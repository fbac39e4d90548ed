"""Every method of ours and of every peer that installs, on one model, one set of calibration windows, one evaluator.

    python benchmarks/methods.py --name demo-model [--model DIR] [--calibration TEXT] [--text TEXT] [--samples 128]
        [--seqlen 256] [--windows 64] [--threads 2] [--dtype float32] [--alone] [--budgets W4A16-g128,...] [--ours ...]
        [--peers ...]

Ours run through `bitwright bench`, each cell in its own process; peers through `benchmarks/peers/run.py`, each in its
own environment, on the token ids that ours were calibrated on. Both are judged on the same windows by the same code,
and both are resumed when the same command is given again. Writes benchmarks/results/methods_<name>_<machine>_<date>
.json and .md (see `methods_page`).
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVERY = ("rtn", "gptq", "gptaq", "guided", "awq", "rotation+gptaq", "signround", "block_ap", "auto")
BUDGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "W2A16-g64": {
        "W2A16-g64": EVERY, "W2A16-g64-asym": ("gptq", "gptaq", "block_ap"), "W2A16-g64-floatzero": ("hqq",),
    },
    "W3A16-g128": {"W3A16-g128": EVERY, "W3A16-g128-asym": ("gptq", "block_ap"), "W3A16-g128-floatzero": ("hqq",)},
    "W3A16-g64": {"W3A16-g64": EVERY, "W3A16-g64-asym": ("gptq", "gptaq", "block_ap")},
    "W4A16-g64": {"W4A16-g64": EVERY, "W4A16-g64-asym": ("gptq", "gptaq", "awq")},
    "W4A16-g128": {
        "W4A16-g128": (*EVERY, "awq+gptaq"), "W4A16-g128-asym": ("gptq", "gptaq", "awq"),
        "W4A16-g128-floatzero": ("hqq",),
    },
    "W8A8": {"W8A8": ("rtn", "gptq", "gptaq", "smoothquant", "smoothquant+gptq", "llm_int8", "auto")},
    "W4A16-g32": {"W4A16-g32": EVERY, "W4A16-g32-asym": ("gptq", "gptaq", "awq")},
    "W8A16": {"W8A16-g32": ("rtn", "gptq"), "W8A16": ("rtn", "gptq")},
}  # fmt: skip
"""What peers call a budget -> the schemes of ours that belong to it -> the methods that each is measured with."""
GROUPS_OF_64 = ("W3A16-g64", "W4A16-g64")
"""For models whose rows 128 does not divide, in place of the budgets with groups of 128."""


def run_ours(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Our cells, as rows."""
    if args.known:
        return known_rows(work / "ours" / "records")
    from bitwright.bench import run_bench
    from bitwright.cli.console import ProgressBars

    rows: list[dict[str, Any]] = []
    with ProgressBars(quiet=not sys.stderr.isatty()) as progress:
        for budget in args.budgets:
            for scheme, methods in BUDGETS[budget].items():
                wanted = [m for m in methods if not args.ours or Path(m).stem in args.ours]
                if not wanted:
                    continue
                found = run_bench(
                    args.model, work / "ours", schemes=[scheme], methods=wanted, text=args.text,
                    calibration=args.calibration, num_samples=args.samples, seqlen=args.seqlen, seed=args.seed,
                    max_windows=args.windows, dtype=args.dtype, progress=progress,
                )  # fmt: skip
                print(f"{scheme}: {found.num_measured} cells measured", file=sys.stderr, flush=True)
                cells = [r for r in found.records if r["kind"] == "cell" and r["scheme"] == canonical(scheme)]
                rows += [our_row(budget, record) for record in cells]
    return rows


def known_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of the cells of ours that an interrupted run has finished."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    budgets = {canonical(scheme): budget for budget, schemes in BUDGETS.items() for scheme in schemes}
    finished = [r for r in records if r["kind"] == "cell" and r["status"] == "done"]
    return [our_row(budgets[record["scheme"]], record) for record in finished]


def canonical(scheme: str) -> str:
    """A scheme's name as records have it."""
    from bitwright.schemes import Scheme

    return str(Scheme.parse(scheme))


def our_row(budget: str, record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record of `bitwright bench` that the page needs."""
    row = {"budget": budget, "by": "bitwright", "method": record["method"], "scheme": record["scheme"]}
    if record["status"] != "done":
        return {**row, "error": record["reason"]}
    kept = ("bits_per_weight", "kl_mean", "kl_stderr", "perplexity", "window_kl")
    figures = record["figures"]
    return {
        **row,
        **{name: figures[name] for name in kept},
        "seconds": figures["quantize_seconds"],
        "seconds_total": figures["seconds"],
        "memory_before_bytes": figures["quantize_held_bytes"],
        "peak_memory_bytes": figures["quantize_peak_bytes"],
    }


def run_theirs(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """The peers' cells, as rows, each judged once."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from judge import Judge
    from run import PEERS, all_cells, run_peers

    from bitwright.bench_worker import evaluation_windows
    from bitwright.preparation import GATE_TOKENS, open_model, text_sample
    from bitwright.records import write_json_atomic

    model = open_model(args.model, device="cpu", dtype="float32", trust_remote_code=False)
    # `bitwright quantize` draws the windows of its gate in the same go.
    num_gate = max(2, GATE_TOKENS // args.seqlen)
    tokens = text_sample(
        model, args.calibration, args.seqlen, num_samples=args.samples + num_gate, seed=args.seed,
        trust_remote_code=False,
    )[: args.samples]  # fmt: skip
    shared = {"text": args.text, "context": args.seqlen, "windows": args.windows, "trust_remote_code": False}
    windows = evaluation_windows(model, shared)
    judge: Judge | None = None
    rows: list[dict[str, Any]] = []
    for cell in all_cells(args.peers or PEERS):
        budget = budget_of(cell.scheme)
        if budget not in args.budgets or cell.method in args.skip:
            continue
        if args.known and not any((work / "peers").glob(f"{cell.peer}-{cell.method}-{cell.scheme}-*.json")):
            continue
        [record] = run_peers(args.model, tokens, work / "peers", [cell], args.threads, seed=args.seed)
        row = {"budget": budget, "by": cell.peer, "method": cell.method, "scheme": cell.scheme}
        if "error" in record:
            rows.append({**row, "error": record["error"]})
            continue
        cached = work / "peers" / f"{record['key']}-{args.windows}.score.json"
        if not cached.is_file():
            if judge is None:
                judge = Judge(args.model, windows, work)
            scorer = judge.score(Path(record["directory"]))
            write_json_atomic(cached, {**asdict(scorer.result()), "window_kl": scorer.window_kl})
        score = json.loads(cached.read_text(encoding="utf-8"))
        kept = ("bits_per_weight", "seconds", "peak_memory_bytes", "memory_before_bytes", "seconds_total", "version")
        rows.append({**row, **{name: record[name] for name in kept}, **score})
    return rows


def budget_of(scheme: str) -> str:
    """The budget that a peer's scheme is compared in: the widest that is not above it, of the same activations."""
    if scheme in BUDGETS:
        return scheme
    return {"8": "W8A16", "4": "W4A16-g32", "3": "W3A16-g128", "2": "W2A16-g64"}[scheme[1]]


def parse() -> argparse.Namespace:
    from bitwright.demo import demo_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the model, in the results' file names")
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="float32", help="ours compute in; peers compute in the checkpoint's")
    parser.add_argument("--budgets", default=",".join(budget for budget in BUDGETS if budget not in GROUPS_OF_64))
    parser.add_argument("--ours", default="", help="methods; all unless given")
    parser.add_argument("--peers", default="", help="all unless given")
    parser.add_argument("--skip", default="", help="methods of peers to leave out, such as those that take hours")
    parser.add_argument("--only-peers", action="store_true", help="measure peers, write no page")
    parser.add_argument("--only-ours", action="store_true", help="measure ours, write no page")
    parser.add_argument("--known", action="store_true", help="measure nothing: a page of the cells that are finished")
    parser.add_argument("--alone", action="store_true", help="nothing else runs: OpenMP waits as it does by default")
    parser.add_argument("--note", default="", help="a paragraph for the page: how the machine was shared, say")
    parser.add_argument("--work", type=Path, help="build/methods-NAME unless given")
    args = parser.parse_args()
    for name in ("budgets", "ours", "peers", "skip"):
        setattr(args, name, tuple(part for part in getattr(args, name).split(",") if part))
    return args


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if not args.alone:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to other work
    from methods_page import page
    from result_files import write_results

    work = args.work or ROOT / "build" / f"methods-{args.name}"
    if args.only_peers:
        run_theirs(args, work)
        return
    if args.only_ours:
        run_ours(args, work)
        return
    rows = run_ours(args, work) + run_theirs(args, work)
    circumstances = {
        "name": args.name, "calibration": Path(args.calibration).name, "text": Path(args.text).name,
        "samples": args.samples, "seqlen": args.seqlen, "windows": args.windows, "seed": args.seed,
        "threads": args.threads, "dtype": args.dtype, "alone": args.alone, "known": args.known, "note": args.note,
    }  # fmt: skip
    write_results("methods", circumstances, rows, page)


if __name__ == "__main__":
    main()
