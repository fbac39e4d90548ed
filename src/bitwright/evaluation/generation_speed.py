"""How fast a model writes, measured with transformers on the checkpoint as it is: prefill, decoding, memory, energy.

Prefill runs the whole prompt at once and gives the first new token; decoding gives the others one by one, greedily and
with the key-value cache, past any end of text. Batch size 1. A first repetition that nobody counts fills caches and
compiles what is compiled late. Times are those of this machine under the load that it had.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bitwright.errors import DataError, ResourceError, VerificationError
from bitwright.evaluation.energy import Energy, EnergyMeter
from bitwright.exporters.reload import load
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.layouts.stored import COMPRESSED_TENSORS
from bitwright.model.skeleton import CONSTRUCTION_ERRORS
from bitwright.process_memory import PeakMemory
from bitwright.progress import Progress, no_progress

USABLE_MEMORY = 0.8
"""Share of the memory available that weights may take; the rest is for activations and the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Tokens per second over the repetitions.

    Attributes:
        median: of the repetitions.
        slowest: of them.
        fastest: of them.
    """

    median: float
    slowest: float
    fastest: float

    @staticmethod
    def of(num_tokens: int, seconds: Sequence[float]) -> "Rate":
        """The rate of repetitions that took these seconds."""
        rates = [num_tokens / each for each in seconds]
        return Rate(median=statistics.median(rates), slowest=min(rates), fastest=max(rates))


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How fast a model writes.

    Attributes:
        prompt_tokens: in the prompt.
        new_tokens: written after it.
        repeats: that were counted.
        prefill_tokens_per_s: of the prompt.
        decode_tokens_per_s: of the new tokens but the first.
        load_seconds: to load the model.
        memory_bytes: by which the process's resident size grew at its peak, loading included; on a GPU, the peak that
            was allocated there.
        process_bytes: the process's resident size at its peak, Python and its libraries included.
        weight_bytes: of all parameters and buffers while it runs. Transformers unpacks some layouts at the first use,
            and then this is the dense model's.
        decode_j_per_token: energy of a new token, by counters that include what else runs; None where there are none.
        energy_note: the counters, or why there are none.
        device: where.
        dtype: of the model's activations.
        num_threads: of torch on the processor.
    """

    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate
    load_seconds: float
    memory_bytes: int
    process_bytes: int
    weight_bytes: int
    decode_j_per_token: float | None
    energy_note: str
    device: str
    dtype: str
    num_threads: int


def measure_speed(
    model_dir: Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 5,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Speed:
    """Measure how fast a checkpoint writes, in the dtype that it says.

    Args:
        model_dir: a model directory, of an original or of any layout that transformers loads.
        prompt_tokens: random tokens of the prompt, the same at every call.
        new_tokens: to write, at least 2.
        repeats: to count.
        device: where.
        progress: called with ("generate", done, total).
    Raises:
        DataError: a length that cannot be measured.
        ResourceError: the whole model does not fit into memory.
        VerificationError: transformers cannot load or run it.
    """
    check_lengths(prompt_tokens, new_tokens, repeats)
    checkpoint = open_checkpoint(model_dir)
    require_memory(checkpoint)
    memory = PeakMemory()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    model = load(checkpoint.path, trust_remote_code=trust_remote_code).to(device)
    load_seconds = time.perf_counter() - begun
    config: Any = model.config
    check_positions(config, model_dir, prompt_tokens + new_tokens)
    vocabulary = int(config.get_text_config().vocab_size)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    prefills, decodes, energies = _repeat(model, model_dir, prompt, new_tokens, repeats, device, progress)
    joules, note = _energy_per_token(energies, new_tokens - 1)
    return Speed(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        prefill_tokens_per_s=Rate.of(prompt_tokens, prefills),
        decode_tokens_per_s=Rate.of(new_tokens - 1, decodes),
        load_seconds=load_seconds,
        memory_bytes=_peak_bytes(memory, device),
        process_bytes=memory.whole_bytes,
        weight_bytes=_held_bytes(model),
        decode_j_per_token=joules,
        energy_note=note,
        device=device,
        dtype=str(config.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )


def check_lengths(prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    """Raises DataError for what cannot be measured."""
    if prompt_tokens < 1 or new_tokens < 2 or repeats < 1:
        raise DataError(
            f"a prompt of {prompt_tokens} tokens, {new_tokens} new ones, {repeats} times: cannot be measured. "
            "Use at least 1, 2 and 1."
        )


def check_positions(config: Any, model_dir: Path, wanted: int) -> None:
    """Raises DataError for more tokens than a model, by its configuration, has positions."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and wanted > longest:
        raise DataError(f"{model_dir}: has {longest} positions, prompt and new tokens are {wanted}. Use fewer.")


def require_memory(checkpoint: Checkpoint) -> None:
    """Raises ResourceError if the whole model, as transformers runs it, does not fit into memory."""
    needed = checkpoint.num_bytes
    quantization: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
    if quantization.get("quant_method") == COMPRESSED_TENSORS:  # which transformers unpacks at the first use
        needed = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names) * checkpoint.dense_dtype.itemsize
    available = psutil.virtual_memory().available
    if needed > USABLE_MEMORY * available:
        raise ResourceError(
            f"{checkpoint.path}: generation holds the whole model in memory: {needed / 1e9:.1f} GB of weights, "
            f"{available / 1e9:.1f} GB available. Use a larger machine."
        )


def _repeat(
    model: nn.Module, where: Path, prompt: Tensor, new_tokens: int, repeats: int, device: str, progress: Progress
) -> tuple[list[float], list[float], list[Energy]]:
    """Seconds of prefill and of decoding, and the energy of decoding, of every repetition but the first."""
    prefills, decodes, energies = list[float](), list[float](), list[Energy]()
    with torch.inference_mode():
        try:
            for repetition in range(repeats + 1):
                start = _now(device)
                out: Any = model(input_ids=prompt, use_cache=True)
                token = out.logits[:, -1:].argmax(dim=-1)
                prefill_seconds = _now(device) - start
                with EnergyMeter(device) as meter:
                    start = _now(device)
                    for _ in range(new_tokens - 1):
                        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                        token = out.logits[:, -1:].argmax(dim=-1)
                    decode_seconds = _now(device) - start
                if repetition > 0:
                    prefills.append(prefill_seconds)
                    decodes.append(decode_seconds)
                    energies.append(meter.result)
                progress("generate", repetition + 1, repeats + 1)
        except CONSTRUCTION_ERRORS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise VerificationError(f"{where}: transformers cannot generate with it ({reason}).") from None
    return prefills, decodes, energies


def _now(device: str) -> float:
    """The time when everything that was asked of the device is done."""
    waiting: dict[str, Callable[[], None]] = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    wait = waiting.get(device.partition(":")[0])
    if wait is not None:
        wait()
    return time.perf_counter()


def _energy_per_token(energies: Sequence[Energy], num_tokens: int) -> tuple[float | None, str]:
    """The median energy of a token and what measured it, or None and why."""
    values = [each.energy_j for each in energies if each.energy_j is not None]
    if len(values) < len(energies):
        return None, next(each.reason for each in energies if each.reason is not None)
    return statistics.median(values) / num_tokens, ", ".join(energies[0].counters)


def _peak_bytes(memory: PeakMemory, device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return memory.since_bytes - memory.held_bytes


def _held_bytes(model: nn.Module) -> int:
    """Bytes behind all parameters and buffers; what several share counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
