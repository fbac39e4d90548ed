"""What quantized gradients cost in convergence, and save in bytes: two processes train one model in every variant.

    python benchmarks/gradients.py --name demo-model [--model DIR] [--start random|trained] [--text stdlib]
        [--heldout TEXT] [--steps 300] [--batch 4] [--seqlen 128] [--optimizer adamw|sgd] [--lr 0.001] [--warm-up 30]
        [--windows 128] [--work FOLDER]

Two parts were measured. From random weights with AdamW, as models are trained:

    python benchmarks/gradients.py --name demo-model --heldout stdlib:heldout

Fine-tuning of trained weights on text of another kind with SGD, which is linear in the gradient, so that what error
feedback promises for the sum of gradients holds for the weights:

    python benchmarks/gradients.py --name demo-model-sgd --start trained --text STORIES --optimizer sgd --lr 0.03
        --steps 100 --batch 2 --seqlen 64 --warm-up 10 --windows 64

The model starts from the same weights in every variant and sees the same windows in the same order. Two gloo processes
of one thread each train it, with a linear warm-up and decay of the learning rate. Finished variants in the work folder
are not repeated. Writes benchmarks/results/gradients_<name>_<machine>_<date>.json and .md.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from result_files import write_results
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from bitwright.data.corpora import load_corpus
from bitwright.data.windows import sample_windows, split_windows, tokenise
from bitwright.demo import demo_model
from bitwright.records import write_json_atomic
from bitwright.train.gradients import GradientOptions, register

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
NUM_LAST_STEPS = 30
LIMITS = {"INT8": 0.27, "INT4": 0.14, "1 bit": 0.05}
VARIANTS: dict[str, GradientOptions | None] = {
    "dense": None,
    "INT8": GradientOptions(bits=8),
    "INT4": GradientOptions(bits=4),
    "1 bit": GradientOptions(bits=1),
    "1 bit without feedback": GradientOptions(bits=1, error_feedback=False),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, weight_decay=0.01),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}

Row = dict[str, Any]


def train(rank: int, variant: str, settings: Row, windows: Tensor, heldout: Tensor, work: Path) -> None:
    """One rank of one variant; the first writes the row."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work / 'store'}", rank=rank, world_size=NUM_RANKS)
    torch.manual_seed(settings["seed"])
    if settings["start"] == "trained":
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    else:
        config = AutoConfig.from_pretrained(settings["model"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parallel = DistributedDataParallel(model)
    options = VARIANTS[variant]
    traffic = None if options is None else register(parallel, options)
    optimizer = OPTIMIZERS[settings["optimizer"]](parallel.parameters(), lr=settings["lr"])
    schedule = get_linear_schedule_with_warmup(optimizer, settings["warm_up"], settings["steps"])
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(settings["steps"]):
        first = (step * NUM_RANKS + rank) * settings["batch"]
        batch = windows[torch.arange(first, first + settings["batch"]) % len(windows)]
        loss = parallel(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    both = torch.tensor(losses)
    dist.all_reduce(both)
    if rank == 0:
        row = {
            "variant": variant, "loss": float(both[-NUM_LAST_STEPS:].mean()) / NUM_RANKS,
            "heldout_loss": heldout_loss(model, heldout), "share": 1.0 if traffic is None else traffic.share,
            "sent_bytes": None if traffic is None else traffic.sent_bytes, "seconds": seconds,
            "losses": (both / NUM_RANKS).tolist(),
        }  # fmt: skip
        write_json_atomic(file_of(work, variant), {"settings": settings, "row": row})
    dist.destroy_process_group()


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, windows: Tensor) -> float:
    """Nats per token."""
    model.eval()
    batches = windows.split(8)
    return sum(float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches) / len(windows)


def file_of(work: Path, variant: str) -> Path:
    return work / f"{variant.replace(' ', '-')}.json"


def run(settings: Row, work: Path) -> list[Row]:
    """All rows; those found in the work folder for the same settings are taken from there."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    seqlen = settings["seqlen"]
    tokens = tokenise(tokenizer, load_corpus(settings["text"]).documents)
    windows = sample_windows(
        tokens, num_samples=len(tokens) // seqlen, seqlen=seqlen, seed=settings["seed"], source=settings["text"]
    )
    if settings["heldout"] is None:
        heldout, windows = windows[: settings["windows"]], windows[settings["windows"] :]
    else:
        heldout = tokenise(tokenizer, load_corpus(settings["heldout"]).documents)
        heldout = split_windows(heldout, seqlen=seqlen, source=settings["heldout"])[: settings["windows"]]
    rows: list[Row] = []
    for variant in VARIANTS:
        file = file_of(work, variant)
        if not file.exists() or json.loads(file.read_text())["settings"] != settings:
            (work / "store").unlink(missing_ok=True)  # of a run that was killed
            multiprocessing.spawn(train, args=(variant, settings, windows, heldout, work), nprocs=NUM_RANKS)
        rows.append(json.loads(file.read_text())["row"])
        print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
    return rows


def answers(rows: Sequence[Row]) -> list[str]:
    """Every variant against the dense one."""
    dense = rows[0]
    losses = {row["variant"]: row["heldout_loss"] for row in rows}
    gained = losses["1 bit without feedback"] - losses["1 bit"]
    found = [
        f"Error feedback takes {gained:.4f} nats off the held-out loss of 1 bit."
        + (" IT DOES HARM." if gained < 0 else "")
    ]
    for row in rows[1:]:
        limit = LIMITS.get(row["variant"])
        asked = "" if limit is None else f" (asked: at most {100 * limit:.0f} %)"
        missed = " NOT REACHED" if limit is not None and row["share"] > limit else ""
        found.append(
            f"{row['variant']}: held-out loss {row['heldout_loss'] - dense['heldout_loss']:+.4f} nats against dense, "
            f"with {100 * row['share']:.1f} % of its bytes{asked}.{missed}"
        )
    return found


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    c = circumstances
    lines = [
        f"# Quantized gradients on {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/gradients.py --name {c['name']} --steps {c['steps']} --batch {c['batch']} --seqlen "
        f"{c['seqlen']} --start {c['start']} --optimizer {c['optimizer']} --lr {c['lr']:g} --warm-up {c['warm_up']}` "
        f"on {c['machine']}. {NUM_RANKS} gloo processes of one thread, from {c['start']} weights, {c['text']}; held "
        f"out: {c['windows']} windows of {c['heldout'] or 'it that are not trained on'}. "
        f"Losses in nats per token: training, the mean of the last {NUM_LAST_STEPS} steps. Bytes: sent per rank, "
        "against a ring all-reduce of float32. Seconds: of the training loop; between processes of one machine bytes "
        "cost next to nothing, so that they show what the rounding costs.",
        "",
        *(f"- {answer}" for answer in answers(rows)),
        "",
        "| gradients | training loss | held-out loss | bytes | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {row['variant']} | {row['loss']:.4f} | {row['heldout_loss']:.4f} | {100 * row['share']:.1f} % | "
            f"{row['seconds']:.0f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--start", choices=("random", "trained"), default="random")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--heldout", help="windows of --text unless given")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="windows per rank and step")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--warm-up", type=int, default=30, help="steps")
    parser.add_argument("--windows", type=int, default=128, help="held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gradients")
    args = parser.parse_args()
    settings: Row = {**vars(args), "model": str(args.model)}
    name, work = settings.pop("name"), settings.pop("work")
    rows = run(settings, work)
    write_results(
        "gradients", {"name": name, **settings, "model": args.model.name, "text": Path(args.text).name}, rows, page
    )


if __name__ == "__main__":
    main()
