"""Predicted against written sizes of the demo model, and seconds of a frontier of 40 allocations.

    python benchmarks/allocation.py [--schemes W4A16-g128,…] [--work FOLDER] [--out benchmarks/results]

Sizes: every scheme is quantized by rounding to nearest in a run of its own, and the bytes of its safetensors files are
compared with what `exported_bytes` says from the shapes. The exit code is 1 if one differs by more than 1 %.
Frontier: items of random sizes and losses, eight choices each; wall time, with the load of the machine beside it.
"""

import argparse
import os
import random
import time
from datetime import date
from pathlib import Path

from bitwright.demo import demo_model
from bitwright.pipeline import quantize
from bitwright.preparation import open_model
from bitwright.recipe import Recipe
from bitwright.records import Environment, write_json_atomic, write_text_atomic
from bitwright.schemes import Scheme
from bitwright.search.allocate import Choice, Item
from bitwright.search.frontier import frontier
from bitwright.search.model_shape import shape_of_model
from bitwright.search.stored_size import exported_bytes

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = (
    "W4A16-g128,W3A16-g128,W2A16-g64,W8A8,W4A8,W4A16-g128-asym,W8A8-block128,fp8,nvfp4-a16,mxfp4-a16,nf4-b64-dq,"
    "ternary,lut4,kmeans3-g64,kmeans4-channel-o0.45"
)
ALLOWED = 0.01
NUM_ITEMS, NUM_POINTS = (28, 300), 40
BITS = (2, 3, 4, 4.25, 5, 6, 8, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=SCHEMES, help="comma-separated")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "allocation", help="where runs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    sizes = measure_sizes(given.schemes.split(","), given.work)
    seconds = [measure_frontier(count) for count in NUM_ITEMS]
    page = write_results(sizes, seconds, given.out)
    print(page.read_text(encoding="utf-8"), f"written: {page}", sep="\n")
    return int(any(abs(row["predicted"] / row["written"] - 1) > ALLOWED for row in sizes))


def measure_sizes(schemes: list[str], work: Path) -> list[dict]:
    shape = shape_of_model(open_model(demo_model(), device="cpu", dtype="float32", trust_remote_code=False))
    rows: list[dict] = []
    for name in schemes:
        scheme = Scheme.parse(name)
        quantize(demo_model(), Recipe(scheme=scheme, method="rtn", max_kl=1e6), work / name)
        written = sum(file.stat().st_size for file in (work / name / "4-model").glob("*.safetensors"))
        predicted = exported_bytes(shape, shape.uniform(scheme))
        rows.append({"scheme": name, "written": written, "predicted": predicted})
    return rows


def measure_frontier(num_items: int) -> dict:
    items = random_items(num_items)
    start = time.perf_counter()
    found = frontier(items, NUM_POINTS)
    seconds = time.perf_counter() - start
    return {"items": num_items, "allocations": len(found), "seconds": seconds, "load": os.getloadavg()[0]}


def random_items(count: int) -> list[Item]:
    generator = random.Random(0)
    items: list[Item] = []
    for index in range(count):
        weights, loss = generator.choice([16_384, 65_536, 131_072, 700_000]), generator.lognormvariate(-6, 1.5)
        choices = tuple(
            Choice(
                scheme=None if bits == 16 else f"W{bits}",
                loss=0.0 if bits == 16 else loss * 4.0**-bits * generator.lognormvariate(0, 0.2),
                size_bytes=int(weights * bits / 8),
            )
            for bits in BITS
        )
        items.append(Item(name=f"i{index}", sites=(f"i{index}",), choices=choices))
    return items


def write_results(sizes: list[dict], seconds: list[dict], out: Path) -> Path:
    environment = Environment.capture()
    stem = f"allocation_demo-model_{date.today().isoformat()}"
    value = {"sizes": sizes, "frontier": seconds, "environment": environment.to_mapping()}
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / f"{stem}.json", value)
    lines = [
        f"# Costs and allocation, {date.today().isoformat()}", "",
        f"Made by benchmarks/allocation.py on {environment.cpu}, {environment.num_cores} cores.", "",
        "| scheme | bytes written | bytes predicted | difference |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for row in sizes:
        written, predicted = row["written"], row["predicted"]
        lines.append(f"| {row['scheme']} | {written:,} | {predicted:,} | {predicted / written - 1:+.3%} |")
    lines += ["", "| items | allocations of 40 sizes | s | load of the machine |", "|---:|---:|---:|---:|"]
    lines += [f"| {r['items']} | {r['allocations']} | {r['seconds']:.1f} | {r['load']:.1f} |" for r in seconds]
    write_text_atomic(out / f"{stem}.md", "\n".join(lines) + "\n")
    return out / f"{stem}.md"


if __name__ == "__main__":
    raise SystemExit(main())
