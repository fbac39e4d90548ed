"""Calibration and training without data: windows of tokens that the model itself writes.

Each window starts with the model's begin-of-text token, if it has one, and a random token. The next `num_greedy` tokens
are the most probable ones, so that a text begins as the model is surest of it; from there it is sampled at temperature
1. Calibration samples from the first token on.

Reference: arXiv:2305.17888 (LLM-QAT), data-free generation, with 3 to 5 greedy tokens.
"""

import random
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from bitwright.errors import ResourceError
from bitwright.model.checkpoint import Checkpoint
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.model.whole import load_whole
from bitwright.progress import Progress, no_progress

WINDOWS_PER_BATCH = 32
WINDOWS_PER_SHARD = 32
"""Windows per file: what a killed run has to write again, at most."""
_WINDOWS = "windows"


def generate_windows(
    checkpoint: Checkpoint,
    num_windows: int,
    seqlen: int,
    *,
    seed: int,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> Tensor:
    """Return windows [N, T] of token ids sampled from the model; the same for the same seed and machine.

    Raises:
        ResourceError: the whole model does not fit into memory, which sampling needs.
    """
    model = _load(checkpoint, device, trust_remote_code)
    return _write(model, num_windows, seqlen, seed=seed, progress=progress)


def kept_windows(
    folder: Path,
    checkpoint: Checkpoint,
    num_windows: int,
    seqlen: int,
    *,
    seed: int,
    num_greedy: int,
    device: str,
    trust_remote_code: bool,
    progress: Progress = no_progress,
) -> Tensor:
    """Return windows [N, T] from a folder, where the model first writes those that are missing.

    Args:
        folder: of this model, seed, length and number alone; shards in it are not written again.
        num_greedy: tokens at the start that are the most probable ones.
    Raises:
        ResourceError: the whole model does not fit into memory, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, shards = None, list[Tensor]()
    for number, start in enumerate(range(0, num_windows, WINDOWS_PER_SHARD)):
        path, count = folder / f"shard-{number:05d}.safetensors", min(WINDOWS_PER_SHARD, num_windows - start)
        if not path.exists():
            model = _load(checkpoint, device, trust_remote_code) if model is None else model
            # A seed for every shard, so that the next ones do not depend on where a run was killed.
            own = random.Random(f"{seed} {number}").getrandbits(63)
            save_tensors_atomic(path, {_WINDOWS: _write(model, count, seqlen, seed=own, num_greedy=num_greedy)})
        shards.append(load_file(path)[_WINDOWS])
        progress("sample", start + count, num_windows)
    return torch.cat(shards)


def _load(checkpoint: Checkpoint, device: str, trust_remote_code: bool) -> Any:
    available = psutil.virtual_memory().available
    if checkpoint.num_bytes > 0.8 * available:
        raise ResourceError(
            f"text that the model writes itself needs the whole model in memory: {checkpoint.num_bytes / 1e9:.1f} GB "
            f"of weights, {available / 1e9:.1f} GB available. Give a text instead of self."
        )
    return load_whole(checkpoint.path, dtype="auto", trust_remote_code=trust_remote_code).to(device).eval()


def _write(
    model: Any, num_windows: int, seqlen: int, *, seed: int, num_greedy: int = 0, progress: Progress = no_progress
) -> Tensor:
    """Return windows [N, T]; nobody else's random numbers are disturbed."""
    config = model.config.get_text_config()
    first = [] if config.bos_token_id is None else [int(config.bos_token_id)]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(int(config.vocab_size), (num_windows, 1), generator=generator)
    prompts = torch.cat([torch.tensor(first, dtype=torch.int64).expand(num_windows, -1), starts], dim=1)
    lengths = [(min(prompts.shape[1] + num_greedy, seqlen), False), (seqlen, True)]
    parts: list[Tensor] = []
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else None):
        torch.manual_seed(seed)
        for start in range(0, num_windows, WINDOWS_PER_BATCH):
            tokens = prompts[start : start + WINDOWS_PER_BATCH].to(model.device)
            for length, sampled in lengths:
                tokens = _continue(model, tokens, length, sampled=sampled)
            parts.append(tokens[:, :seqlen].cpu())
            progress("sample", min(start + WINDOWS_PER_BATCH, num_windows), num_windows)
    return torch.cat(parts)


def _continue(model: Any, tokens: Tensor, length: int, *, sampled: bool) -> Tensor:
    """Return tokens [N, T] with what the model writes after them, up to a length."""
    if tokens.shape[1] >= length:
        return tokens
    settings = _settings(model.config.get_text_config(), length, sampled=sampled)
    model.generation_config = settings  # generate() would fill in penalties and limits from the model's own
    return cast(Tensor, model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings))


def _settings(config: Any, length: int, *, sampled: bool) -> GenerationConfig:
    end = config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return GenerationConfig(
        do_sample=sampled,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        min_length=length,
        suppress_tokens=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
