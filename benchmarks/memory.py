"""Peak memory of quantizing a model block by block, beside the same job done with the whole model in memory.

    python benchmarks/memory.py [--model DIR] [--jobs rtn,gptq,whole-rtn,whole-gptq] [--out benchmarks/results]

Without --model the random Llama of 1.1 billion parameters is written under build/ first. Every job runs in a process of
its own. Its peak is the kernel's high-water mark of resident memory (VmHWM, so Linux only) over the whole job, minus
what was resident when interpreter and imports were ready: file-backed pages count, as they do for whoever watches the
process. The exit code is 1 if a job is above its target.

The rivals keep the whole model: `whole-rtn` in bfloat16, its cheapest form, quantized with this project's own RTN and
saved in the same layout; `whole-gptq` in float32 with one float32 Hessian per Linear of all blocks, collected in one
pass. Hessians take the same memory for any number of tokens, so that pass sees 1 x 512 of them, and it solves nothing:
its peak is a lower bound, and its seconds are not those of the job.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from bitwright.records import Environment, Measurement, write_json_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
SCHEME = "W4A16-g128"
NUM_WINDOWS, SEQLEN = 16, 512
TARGETS_GB = {"rtn": 1.5, "gptq": 3.0}
SHAPE = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
NEVER_FAILS = 1e6
"""Gate on the KL divergence in nats per token: what a random model loses means nothing."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; a random Llama under build/ unless given")
    parser.add_argument("--jobs", default=",".join(JOBS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--run-job", choices=list(JOBS), help=argparse.SUPPRESS)  # how the benchmark calls itself
    given = parser.parse_args()
    if given.run_job:
        print(json.dumps(run_job(given.run_job, given.model)))
        return 0
    model = given.model or random_llama(ROOT / "build" / "random-llama-1.1b")
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    for name in given.jobs.split(","):
        rows.append(measure(name, model))
        page = write_results(rows, model, load, given.out)  # after every job: the last ones take long
        print(table(rows), f"written: {page}", sep="\n", end="\n\n", flush=True)
    return int(any(row["peak_gb"] > TARGETS_GB.get(row["job"], float("inf")) for row in rows))


def random_llama(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        script = ROOT / "scripts" / "make_random_llama.py"
        subprocess.run([sys.executable, str(script), "--out", str(folder)], check=True)
    return folder


def measure(name: str, model: Path) -> dict[str, Any]:
    """Run one job in its own process and return its figures."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run-job", name, "--model", str(model)]
    # Threads that spin while they wait for each other take the cores from whatever else runs, and from each other.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run_job(name: str, model: Path) -> dict[str, Any]:
    what, job = JOBS[name]
    import_everything(model)
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bitwright-", dir=ROOT / "build") as work:
        baseline = resident("VmRSS")
        # Sets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start = time.perf_counter()
        job(model, Path(work))
        seconds = time.perf_counter() - start
    peak = resident("VmHWM") - baseline
    return {"job": name, "what": what, "peak_gb": peak / 1e9, "imports_gb": baseline / 1e9, "seconds": seconds}


def import_everything(model: Path) -> None:
    """Import what any of the jobs uses, the model's own modules included."""
    import transformers

    import bitwright.pipeline

    config = transformers.AutoConfig.from_pretrained(model)
    for architecture in config.architectures or ():
        getattr(transformers, architecture)
    assert bitwright.pipeline


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def streamed_rtn(model: Path, work: Path) -> None:
    _quantize(model, work, "rtn", None)


def streamed_gptq(model: Path, work: Path) -> None:
    _quantize(model, work, "gptq", "stdlib")


def _quantize(model: Path, work: Path, method: str, text: str | None) -> None:
    from bitwright.pipeline import quantize
    from bitwright.recipe import Calibration, Recipe
    from bitwright.schemes import Scheme

    calibration = Calibration(text=text, num_samples=NUM_WINDOWS, seqlen=SEQLEN)
    recipe = Recipe(scheme=Scheme.parse(SCHEME), method=method, calibration=calibration, max_kl=NEVER_FAILS)
    quantize(model, recipe, work / "run")


def whole_rtn(model: Path, work: Path) -> None:
    """Load everything, quantize each Linear of the blocks, save: the model shrinks as it goes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from bitwright.methods.rtn import rtn
    from bitwright.model.layouts import compressed_tensors
    from bitwright.model.layouts.stored import module_of
    from bitwright.numerics.fitting import fit
    from bitwright.numerics.inputs import QuantizedSite
    from bitwright.numerics.scales import FloatScale
    from bitwright.schemes import Scheme

    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tensors: dict[str, torch.Tensor] = {}
    linears = {f"{name}.weight" for name, each in whole.named_modules() if isinstance(each, torch.nn.Linear)}
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name not in linears or name == "lm_head.weight":
                tensors[name] = parameter
                continue
            weight = parameter.float()
            scheme = Scheme.parse(SCHEME).weights
            scale = FloatScale(parameter.dtype)
            grid = fit(weight, scheme.format, scheme.granularity, method="mse", importance=None, scale=scale)
            parts = compressed_tensors.encode(compressed_tensors.PACKED, QuantizedSite(weight=rtn(weight, grid)))
            tensors.update({f"{module_of(name)}.{part}": tensor for part, tensor in parts.items()})
            parameter.data = torch.empty(0)
    save_file(tensors, work / "model.safetensors")


def whole_gptq(model: Path, _: Path) -> None:
    """Load everything in float32 and collect the Hessians of all blocks in one pass."""
    import torch
    from transformers import AutoModelForCausalLM

    from bitwright.numerics.linalg import accumulate_gram

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hessians: dict[str, torch.Tensor] = {}

    def collect_into(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            if name not in hessians:
                hessians[name] = torch.zeros(x.shape[1], x.shape[1])
            accumulate_gram(hessians[name], x)

        return hook

    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(collect_into(name))
    tokens = torch.randint(256, (1, SEQLEN), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole(input_ids=tokens, use_cache=False, logits_to_keep=1)


JOBS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "rtn": (f"bitwright, RTN {SCHEME}, data-free", streamed_rtn),
    "gptq": (f"bitwright, GPTQ {SCHEME}, {NUM_WINDOWS} x {SEQLEN} tokens", streamed_gptq),
    "whole-rtn": (f"whole model in bfloat16, RTN {SCHEME}", whole_rtn),
    "whole-gptq": (f"whole model in float32, all Hessians of 1 x {SEQLEN} tokens, nothing solved", whole_gptq),
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| job | peak above imports, GB | target, GB | seconds |", "|---|---:|---:|---:|"]
    for row in rows:
        target = TARGETS_GB.get(row["job"])
        lines.append(f"| {row['what']} | {row['peak_gb']:.2f} | {target or ''} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def write_results(rows: list[dict[str, Any]], model: Path, load: float, out: Path) -> Path:
    """Write the rows as JSON and as a page; return the page's path."""
    environment = Environment.capture()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shape = {key: config.get(key) for key in SHAPE}
    today = date.today().isoformat()
    machine = re.sub(r"[^a-z0-9]+", "-", environment.cpu.lower()).strip("-")
    stem = f"memory_{machine}-{environment.num_cores}-cores_{today}"
    record = {
        "date": today,
        "model": shape,
        "load_at_start": load,
        "environment": environment.to_mapping(),
        "measurements": [each.to_mapping() for row in rows for each in measurements(row)],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / f"{stem}.json", record)
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    notes = (
        f"Model: random Llama, {', '.join(f'{key} {value}' for key, value in shape.items())}; stored in bfloat16.",
        f"Machine: {environment.cpu}, {environment.num_cores} cores, {environment.platform}. Load average {load:.1f} "
        "at the start: where it is above 0, other work shared the cores and the seconds are too many.",
        f"Python {environment.python}; {versions}.",
        "Peak: high-water mark of resident memory (VmHWM) minus what was resident after all imports.",
        "The job that only collects all Hessians is a lower bound: one window is run and no weight is solved. Hessians "
        "take the same memory for any number of tokens.",
        "Made by `python benchmarks/memory.py`.",
    )
    page = f"# Peak memory, {today}\n\n{table(rows)}\n\n" + "".join(f"- {note}\n" for note in notes)
    write_text_atomic(out / f"{stem}.md", page)
    return out / f"{stem}.md"


def measurements(row: dict[str, Any]) -> tuple[Measurement, Measurement]:
    details = {"job": row["job"], "what": row["what"]}
    peak = Measurement(name="peak_memory", value=row["peak_gb"] * 1e9, unit="bytes", n=1, device="cpu", details=details)
    return peak, Measurement(name="wall_time", value=row["seconds"], unit="s", n=1, device="cpu", details=details)


if __name__ == "__main__":
    sys.exit(main())
