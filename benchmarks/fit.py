"""What `bitwright search --fit` says of files and memory, beside what they are when a checkpoint is written and run.

    python benchmarks/fit.py [--model DIR] [--name random-1.1b] [--fit 900MB] [--context 2048] [--prompt 64]
        [--work DIR]

Without --model the random Llama of 1.1 billion parameters is written under build/ first. A mix is searched for the
budget and quantized by rounding to nearest with ranges by the extremes; what it loses on random weights means nothing.
Then a process of its own loads the files as they run, packed, puts keys and values of all but the last `prompt` tokens
of the context into the cache, and runs these as one chunk. Its memory is what is resident beyond interpreter, imports
and a step of a tiny model, which brings the libraries in (VmRSS and VmHWM, so Linux only). Files are mapped, and a page
becomes resident when it is read: all are read once, as they are in time.

The exit code is 1 if the files differ from the prediction by more than 1 %, or the peak of the chunk by more than 10 %.
Writes benchmarks/results/fit_<name>_<machine>_<date>.json and .md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory import import_everything, random_llama
from result_files import Row, write_results

from bitwright.budget import Budget, parse_size
from bitwright.mixture import Found, Search
from bitwright.pipeline import quantize
from bitwright.preparation import open_model, text_sample
from bitwright.process_memory import PeakMemory, resident_bytes
from bitwright.recipe import Calibration, Recipe
from bitwright.search.cost import Workload, memory

ROOT = Path(__file__).resolve().parents[1]
MENU = ("W3A16-g128", "W4A16-g128", "W8A16-channel")
NUM_WINDOWS, SEQLEN = 1, 16
NEVER_FAILS = 1e6
"""Gate on the KL divergence in nats per token: what a random model loses means nothing."""
ALLOWED_FILES, ALLOWED_MEMORY = 0.01, 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; a random Llama under build/ unless given")
    parser.add_argument("--name", default="random-1.1b", help="of the model, for the page")
    parser.add_argument("--fit", default="900MB")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are computed at once")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fit")
    parser.add_argument("--run-loaded", action="store_true", help=argparse.SUPPRESS)  # how it calls itself
    given = parser.parse_args()
    if given.run_loaded:
        print(json.dumps(run_loaded(given.model, given.context, given.prompt)))
        return 0
    model = given.model or random_llama(ROOT / "build" / "random-llama-1.1b")
    work = Workload(context=given.context, prompt=given.prompt)
    budget = Budget(fit_bytes=parse_size(given.fit, "--fit"), work=work)
    row = compare(model, budget, given.work)
    circumstances = {key: getattr(given, key) for key in ("name", "fit", "context", "prompt")}
    write_results("fit", circumstances, [row], page)
    return int(abs(off(row, "files")) > ALLOWED_FILES or abs(off(row, "peak")) > ALLOWED_MEMORY)


def compare(model: Path, budget: Budget, folder: Path) -> Row:
    """Search, quantize, load and run; finished parts are not repeated."""
    calibration = Calibration(seqlen=SEQLEN)
    base = Recipe(method="rtn", range_method="minmax", layout="bitwright", calibration=calibration, max_kl=NEVER_FAILS)
    search, found = find(model, base, budget, folder)
    run = quantize(model, found.recipe(base), folder / "run", dtype="bfloat16").run
    said = memory(search.shape, search.assignment(found.schemes), budget.work, budget.hardware)
    return {
        "schemes": dict(found.schemes),
        "average_bits": found.average_bits,
        "files_predicted": found.size_bytes,
        "files_measured": sum(file.stat().st_size for file in (run / "4-model").glob("*.safetensors")),
        "memory_predicted": found.memory_bytes,
        "weights_predicted": said.weight_bytes,
        "cache_predicted": said.cache_bytes,
        "workspace_predicted": said.workspace_bytes,
        **measured_memory(run / "4-model", budget.work),
    }


def find(model: Path, base: Recipe, budget: Budget, folder: Path) -> tuple[Search, Found]:
    """The mix for the budget."""
    opened = open_model(model, device="cpu", dtype="float32", trust_remote_code=False)
    tokens = text_sample(opened, "stdlib", SEQLEN, num_samples=NUM_WINDOWS, seed=0, trust_remote_code=False)
    search = Search(opened, tokens, base, budget, folder / "search", schemes=MENU, fuse=False, num_windows=NUM_WINDOWS)
    return search, search.run(rounds=0)


def measured_memory(model: Path, work: Workload) -> Row:
    """Load and run in another process; bytes beyond its imports."""
    options = ["--context", str(work.context), "--prompt", str(work.prompt_tokens)]
    command = [sys.executable, str(Path(__file__).resolve()), "--run-loaded", "--model", str(model), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_loaded(model: Path, context: int, prompt: int) -> Row:
    """What this process holds for a model, its cache and a chunk of tokens."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import_everything(model)
    tiny = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    fill_and_run(LlamaForCausalLM(tiny).to(torch.bfloat16).eval(), context=128, prompt=64)
    baseline = resident_bytes()
    loading = PeakMemory()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    loading_peak = loading.since_bytes
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).max()
    weights = resident_bytes()
    running = PeakMemory()
    fill_and_run(loaded, context, prompt)
    return {
        "memory_imports": baseline,
        "memory_loading_peak": loading_peak - baseline,
        "memory_weights": weights - baseline,
        "memory_end": resident_bytes() - baseline,
        "memory_peak": running.since_bytes - baseline,
    }


def fill_and_run(model: Any, context: int, prompt: int) -> None:
    """Put all but the last tokens of a context into a cache, and run these."""
    import torch
    from transformers.cache_utils import DynamicCache

    config = model.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(1, heads, context - prompt, width, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    tokens = torch.randint(config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)


def off(row: Row, what: str) -> float:
    """How much more was measured than predicted, as a share of the measured."""
    predicted, measured = {
        "files": ("files_predicted", "files_measured"),
        "peak": ("memory_predicted", "memory_peak"),
    }[what]
    return row[predicted] / row[measured] - 1


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    c, (row,) = circumstances, rows
    lines = [
        f"# What search --fit says and what is there: {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/fit.py --name {c['name']} --fit {c['fit']} --context {c['context']} --prompt "
        f"{c['prompt']}` on {c['machine']}. Budget {c['fit']} with a context of {c['context']} tokens, of which "
        f"{c['prompt']} are computed at once; {row['average_bits']:.3f} bits per weight. Weights stay packed and are "
        "decoded one layer at a time. MB are 10^6 bytes; memory is beyond interpreter, imports and a step of a tiny "
        f"model ({row['memory_imports'] / 1e6:.0f} MB).",
        "",
        "| | predicted MB | measured MB | prediction is off by |",
        "|---|---:|---:|---:|",
        _line("files", row["files_predicted"], row["files_measured"]),
        _line("memory: weights", row["weights_predicted"], row["memory_weights"]),
        _line("memory: peak of the last chunk", row["memory_predicted"], row["memory_peak"]),
        "",
        f"Predicted memory: weights {row['weights_predicted'] / 1e6:.1f}, cache {row['cache_predicted'] / 1e6:.1f}, "
        f"workspace {row['workspace_predicted'] / 1e6:.1f} MB. Resident after the chunk: {row['memory_end'] / 1e6:.1f} "
        f"MB; peak while loading: {row['memory_loading_peak'] / 1e6:.1f} MB.",
    ]
    return "\n".join(lines) + "\n"


def _line(what: str, predicted: int, measured: int) -> str:
    return f"| {what} | {predicted / 1e6:.1f} | {measured / 1e6:.1f} | {predicted / measured - 1:+.2%} |"


if __name__ == "__main__":
    sys.exit(main())
