"""What every adapter shares: its command line, its clock, and the model directory it leaves behind.

An adapter runs in the peer's own environment, so this file may import nothing but the standard library, torch,
safetensors and transformers, and it must not import bitwright. An adapter is a table of what its peer can do and a
function that does it:

    SUPPORTED = {"gptq": ("W4A16-g128",)}

    def quantize(job: Job) -> Quantized: ...

    if __name__ == "__main__":
        raise SystemExit(main("peer", "package", SUPPORTED, quantize))

The weights that the peer's codes decode to come back in float32 under the model's own names. Whatever a peer left as it
was, or changed and did not report, is an error and not a result.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Supported = Mapping[str, tuple[str, ...]]
SCHEME = re.compile(r"W(?P<weight_bits>\d)A(?P<input_bits>8|16)(-g(?P<group>\d+))?")
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUDGETS = ("W4A16-g128", "W4A16-g64", "W4A16-g32", "W3A16-g128", "W3A16-g64", "W2A16-g64")
"""Weights in groups, what every peer with groups is asked for; 64 suits rows that 128 does not divide."""
PER_TOKEN_INT8 = "int8-per-token"
"""How a W8A8 model's inputs are quantized: each token by its own largest magnitude, symmetric, in 8 bits."""


class PeerError(Exception):
    """One line that says why a cell has no result."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits of weights and inputs, and how many weights of a row share a scale (None: all of them)."""

    weight_bits: int
    input_bits: int
    group: int | None

    @staticmethod
    def parse(text: str) -> "Scheme":
        found = SCHEME.fullmatch(text)
        if found is None:
            raise PeerError(f"scheme {text}: expected such as W4A16-g128 or W8A8.")
        group = found["group"]
        return Scheme(
            weight_bits=int(found["weight_bits"]),
            input_bits=int(found["input_bits"]),
            group=None if group is None else int(group),
        )


class Clock:
    """Times the quantization proper and its memory; what came before (imports, loading the model) is apart."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = 0.0
        self.memory_before_bytes = 0
        self.peak_memory_bytes = 0

    def __enter__(self) -> "Clock":
        self.memory_before_bytes = resident("VmRSS")
        # The kernel's high-water mark starts again from what is resident now. ru_maxrss would not do: a process
        # inherits its parent's through exec.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.peak_memory_bytes = max(self.peak_memory_bytes, resident("VmHWM"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an adapter is asked for. `tokens` [N, T] are the calibration windows; `clock` goes around the work."""

    model: Path
    tokens: Tensor
    scheme: Scheme
    method: str
    seed: int
    dtype: Any
    clock: Clock
    scratch: Path

    def samples(self) -> list[dict[str, Tensor]]:
        """The calibration windows one by one, as peers like them."""
        ones = torch.ones(1, self.tokens.shape[1], dtype=torch.int64)
        return [{"input_ids": window[None], "attention_mask": ones} for window in self.tokens]

    def load(self) -> nn.Module:
        """The model in the dtype of the job."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a peer made.

    Attributes:
        weights: decoded weights by parameter name; all Linears of all decoder blocks.
        bits: everything the peer stores for them, in bits: codes, scales, zero points, tables.
        others: further parameters that the peer changed (norms into which it folded scales).
        inputs: how inputs are quantized when the model runs; None for not at all.
        settings: what is worth knowing about how the peer was called.
    """

    weights: dict[str, Tensor]
    bits: int
    others: dict[str, Tensor] = field(default_factory=dict)
    inputs: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of the decoder blocks by name; neither the head nor anything else outside the blocks."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = max(lists, key=lambda name: sum(isinstance(each, nn.Linear) for each in lists[name].modules()))
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and isinstance(module, nn.Linear)
    }


def tensor_bits(*tensors: Tensor | None) -> int:
    """How many bits these tensors take as they are stored; None takes none."""
    return sum(8 * each.numel() * each.element_size() for each in tensors if each is not None)


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of all safetensors files of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def decoded(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """A pair for `Quantized.weights` from a module's name."""
    return f"{name}.weight", weight.detach().to("cpu", torch.float32).contiguous()


def changed_others(before: nn.Module, after: nn.Module, quantized: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters outside `quantized` that differ between two models, in float32, by their names."""
    mine, theirs = dict(before.named_parameters()), dict(after.named_parameters())
    return {
        name: theirs[name].detach().float().clone()
        for name in mine
        if name not in quantized and name in theirs and not torch.equal(mine[name].float(), theirs[name].float())
    }


def write_result(made: Quantized, model: nn.Module, folder: Path) -> int:
    """Save `model` (float32, the original) with the decoded weights in their places; return how many weights they are.

    Raises:
        PeerError: a Linear is missing, has another shape, is not finite, is exactly what it was, or is further from
            it than a matrix of zeros although no norm has changed: then its codes were not read as they are meant.
    """
    parameters = dict(model.named_parameters())
    expected = {f"{name}.weight" for name in decoder_linears(model)}
    if missing := sorted(expected ^ set(made.weights)):
        raise PeerError(f"{len(missing)} of {len(expected)} Linears were not quantized, or were unasked: {missing[0]}")
    moved = any(not torch.equal(parameters[name], value) for name, value in made.others.items())
    with torch.no_grad():
        for name, value in {**made.weights, **made.others}.items():
            original = parameters[name]
            if value.shape != original.shape:
                raise PeerError(f"{name}: decodes to {list(value.shape)} instead of {list(original.shape)}.")
            if not value.isfinite().all():
                raise PeerError(f"{name}: decodes to NaN or Inf.")
            if name in made.weights and torch.equal(original, value):
                raise PeerError(f"{name}: is exactly what it was: not quantized.")
            if not moved and (value - original).norm() >= original.norm():
                raise PeerError(f"{name}: decodes to something else: further from the original than zeros.")
            original.copy_(value)
    model.save_pretrained(folder)
    return sum(parameters[name].numel() for name in expected)


def resident(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (now) or VmHWM (the high-water mark)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise PeerError(f"/proc/self/status has no {name}.")


def main(peer: str, package: str, supported: Supported, quantize: Callable[[Job], Quantized]) -> int:
    """Run an adapter from the command line; the exit code."""
    parser = argparse.ArgumentParser(description=f"Quantize a model with {peer}.")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with input_ids [N, T], int64")
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--method", required=True, choices=list(supported))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help="of the model that the peer is given")
    given = parser.parse_args()
    try:
        record = _run(peer, package, supported, quantize, given)
    except PeerError as error:
        print(f"{peer}: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # whatever a peer raises is its result; the last line must say so
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        print(f"{peer}: {type(error).__name__}: {lines[0]}", file=sys.stderr)
        return 1
    print(json.dumps(record))
    return 0


def _run(
    peer: str,
    package: str,
    supported: Supported,
    quantize: Callable[[Job], Quantized],
    given: argparse.Namespace,
) -> dict[str, Any]:
    if given.scheme not in supported[given.method]:
        raise PeerError(f"{given.method} does {', '.join(supported[given.method])}, not {given.scheme}.")
    clock = Clock()
    torch.manual_seed(given.seed)
    with safe_open(given.tokens, framework="pt") as file:
        tokens = file.get_tensor("input_ids")
    given.out, given.model = given.out.resolve(), given.model.resolve()
    scratch = given.out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    os.chdir(scratch)  # some peers leave folders and logs wherever they are called
    job = Job(
        model=given.model, tokens=tokens, scheme=Scheme.parse(given.scheme), method=given.method, seed=given.seed,
        dtype=DTYPES[given.dtype], clock=clock, scratch=scratch,
    )  # fmt: skip
    made = quantize(job)
    if clock.seconds == 0.0:
        raise PeerError("nothing was timed.")
    from transformers import AutoModelForCausalLM

    os.chdir(given.out)
    shutil.rmtree(scratch)
    original = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    num_weights = write_result(made, original, given.out)
    record = {
        "peer": peer, "version": metadata.version(package), "method": given.method, "scheme": given.scheme,
        "bits_per_weight": made.bits / num_weights, "seconds": clock.seconds,
        "seconds_total": time.perf_counter() - clock.began, "memory_before_bytes": clock.memory_before_bytes,
        "peak_memory_bytes": clock.peak_memory_bytes, "num_tokens": tokens.numel(), "num_weights": num_weights,
        "seed": given.seed, "dtype": given.dtype, "threads": torch.get_num_threads(), "inputs": made.inputs,
        "settings": made.settings,
    }  # fmt: skip
    (given.out / "peer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record
