"""Run peers on a model, each in its own environment, and judge what they made with this project's evaluator.

    python benchmarks/peers/run.py [--model DIR] [--text SOURCE] [--peers hqq,...] [--schemes W4A16-g128,...]
        [--methods gptq,...] [--windows 128] [--seqlen 512] [--threads 2] [--work DIR] [--list]

Every cell (a peer, a method, a scheme) is one process of the peer's Python that reads the same model directory and the
same token ids and writes a model directory of decoded weights; `run_peers` runs cells and `judge` scores one. A cell
that has finished is not repeated: its key is a hash of the model, the tokens, the peer's requirements and adapter, and
the cell.
Environments are built under build/peers, from benchmarks/peers/requirements/<peer>.txt, when they are missing or the
file has changed; torch comes first, by itself, so that pip never considers another release of it.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bitwright.data.windows import hash_tokens
from bitwright.demo import demo_model
from bitwright.preparation import open_model, text_sample, text_windows
from bitwright.records import write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / "build" / "peers"
PEERS = ("llmcompressor", "gptqmodel", "autoround", "hqq", "quanto", "torchao", "bitsandbytes", "llamacpp")
TIMEOUT_S = 4 * 3600
STAMP = ".requirements"


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One thing to ask of one peer."""

    peer: str
    method: str
    scheme: str

    def __str__(self) -> str:
        return f"{self.peer} {self.method} {self.scheme}"


def supported(peer: str) -> dict[str, tuple[str, ...]]:
    """What a peer can do here: method -> schemes, as its adapter says."""
    sys.path.insert(0, str(HERE))
    try:
        return dict(importlib.import_module(f"{peer}_adapter").SUPPORTED)
    finally:
        sys.path.remove(str(HERE))


def all_cells(peers: Iterable[str] = PEERS, *, schemes: Sequence[str] = (), methods: Sequence[str] = ()) -> list[Cell]:
    """Every cell of these peers, or those of some schemes and methods."""
    return [
        Cell(peer=peer, method=method, scheme=scheme)
        for peer in peers
        for method, offered in supported(peer).items()
        for scheme in offered
        if (not schemes or scheme in schemes) and (not methods or method in methods)
    ]


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 of files' contents, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def hash_model(model: Path) -> str:
    """SHA-256 of a model directory's configuration and weights."""
    return hash_files(sorted([model / "config.json", *model.glob("*.safetensors")]))


def cell_key(cell: Cell, *, model: str, tokens: str, adapter: str, options: str) -> str:
    """What a cell's result depends on, as the name of its folder.

    Args:
        model: hash of the model.
        tokens: hash of the calibration windows.
        adapter: hash of the peer's requirements and adapter.
        options: whatever else the adapter is told.
    """
    facts = json.dumps([model, tokens, adapter, options, cell.peer, cell.method, cell.scheme])
    return f"{cell.peer}-{cell.method}-{cell.scheme}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def requirements(peer: str) -> Path:
    """The pinned requirements of a peer."""
    return HERE / "requirements" / f"{peer}.txt"


def environment(peer: str) -> Path:
    """The Python of a peer's environment, which is built if it is missing or its requirements have changed."""
    folder, wanted = ENVIRONMENTS / peer, requirements(peer)
    python, stamp = folder / "bin" / "python", folder / STAMP
    text = wanted.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == text:
        return python
    if folder.exists():
        shutil.rmtree(folder)
    print(f"{peer}: building {folder}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch = next(line for line in text.splitlines() if line.startswith("torch=="))
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, "-r", str(wanted)], check=True)
    stamp.write_text(text, encoding="utf-8")
    return python


def run_peers(
    model: Path,
    tokens: Tensor,
    work: Path,
    cells: Iterable[Cell],
    threads: int,
    *,
    seed: int = 0,
    dtype: str = "auto",
    retry: bool = False,
) -> list[dict[str, Any]]:
    """Run cells one after another and return a record of each, in their order.

    A record is what the adapter writes into peer.json, plus `key` and `directory` (the decoded model); of a cell that
    failed it is `peer`, `method`, `scheme`, `key` and `error`, its last line.

    Args:
        model: the model directory that every peer reads.
        tokens: calibration windows [N, T] int64, the same for every peer.
        work: records lie here as <key>.json, models in models/<key>.
        threads: of every peer's process.
        dtype: of the model that peers are given; "auto" is the checkpoint's own.
        retry: run cells again that have failed before.
    """
    work = work.resolve()
    (work / "models").mkdir(parents=True, exist_ok=True)
    hashes = {"model": hash_model(model), "tokens": hash_tokens(tokens)}
    windows = work / f"tokens-{hashes['tokens'][:12]}.safetensors"
    if not windows.is_file():
        save_file({"input_ids": tokens.contiguous().clone()}, windows)
    records: list[dict[str, Any]] = []
    for cell in cells:
        adapter = hash_files([requirements(cell.peer), HERE / f"{cell.peer}_adapter.py"])
        key = cell_key(cell, **hashes, adapter=adapter, options=f"seed {seed} dtype {dtype} threads {threads}")
        path = work / f"{key}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if known is None or (retry and "error" in known):
            options = ["--seed", str(seed), "--dtype", dtype]
            known = {"key": key, **run_cell(cell, model.resolve(), windows, work / "models" / key, threads, options)}
            write_json_atomic(path, known)
            state = known.get("error") or f"{known['seconds']:.1f} s, {known['bits_per_weight']:.3f} bits per weight"
            print(f"{cell}: {state}", file=sys.stderr, flush=True)
        records.append(known)
    return records


def run_cell(cell: Cell, model: Path, windows: Path, out: Path, threads: int, options: Sequence[str]) -> dict[str, Any]:
    """Run one adapter in its own process and return its record, or its error; the log lies beside the model."""
    if out.exists():
        shutil.rmtree(out)
    failed = {"peer": cell.peer, "method": cell.method, "scheme": cell.scheme}
    try:
        python = environment(cell.peer)
    except subprocess.CalledProcessError as error:
        return {**failed, "error": f"its environment cannot be built: {error}"}
    out.mkdir(parents=True)
    command = [
        str(python), str(HERE / f"{cell.peer}_adapter.py"), "--model", str(model), "--tokens", str(windows),
        "--method", cell.method, "--scheme", cell.scheme, "--out", str(out), *options,
    ]  # fmt: skip
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=log, env=process_environment(threads), timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return {**failed, "error": f"not finished after {TIMEOUT_S} s"}
    if done.returncode:
        lines = (out / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return {**failed, "error": f"exit {done.returncode}: {last}"}
    record = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    return {**record, "directory": str(out)}


def process_environment(threads: int) -> dict[str, str]:
    """The variables of a peer's process: so many threads, no GPU, no hub."""
    mine = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    count = str(threads)
    return {
        **mine, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--text", default="stdlib:heldout", help="what the results are judged on")
    parser.add_argument("--calibration", default="stdlib", help="what peers calibrate on")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated")
    parser.add_argument("--schemes", default="", help="comma-separated; all unless given")
    parser.add_argument("--methods", default="", help="comma-separated; all unless given")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--judged", type=int, default=16, help="windows that results are judged on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the model that peers are given")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers-work")
    parser.add_argument("--retry", action="store_true", help="run cells again that have failed before")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    return parser.parse_args()


def main() -> int:
    given = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # other work may share the cores
    split = lambda text: tuple(text.split(",")) if text else ()
    cells = all_cells(split(given.peers), schemes=split(given.schemes), methods=split(given.methods))
    if given.list:
        print(*cells, sep="\n")
        return 0
    from judge import Judge

    model = open_model(given.model, device="cpu", dtype="float32", trust_remote_code=False)
    tokens = text_sample(
        model, given.calibration, given.seqlen, num_samples=given.windows, seed=given.seed, trust_remote_code=False
    )
    windows = text_windows(model, given.text, given.seqlen, trust_remote_code=False)[: given.judged]
    failures = 0
    given.work.mkdir(parents=True, exist_ok=True)
    judge = Judge(given.model, windows, given.work)
    for cell in cells:
        [record] = run_peers(
            given.model,
            tokens,
            given.work,
            [cell],
            given.threads,
            seed=given.seed,
            dtype=given.dtype,
            retry=given.retry,
        )
        failures += "error" in record
        if "error" in record:
            print(f"{cell!s:46s} {record['error']}", flush=True)
            continue
        score = judge.score(Path(record["directory"])).result()
        print(
            f"{cell!s:46s} {record['bits_per_weight']:7.3f} bits  {record['seconds']:8.1f} s  "
            f"{(record['peak_memory_bytes'] - record['memory_before_bytes']) / 2**20:6.0f} MiB  KL {score.kl_mean:.5f}",
            flush=True,
        )
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
