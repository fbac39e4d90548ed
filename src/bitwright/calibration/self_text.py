"""Calibration without data: windows of tokens that the model itself writes.

Each window starts with the model's begin-of-text token, if it has one, and a random token, and is sampled at
temperature 1 from there.

Reference: arXiv:2305.17888 (LLM-QAT), data-free generation; ours samples from the second token on.
"""

from typing import Any, cast

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bitwright.errors import ResourceError
from bitwright.model.checkpoint import Checkpoint
from bitwright.progress import Progress

WINDOWS_PER_BATCH = 32


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
    available = psutil.virtual_memory().available
    if checkpoint.num_bytes > 0.8 * available:
        raise ResourceError(
            f"--calibration self holds the whole model in memory: {checkpoint.num_bytes / 1e9:.1f} GB of weights, "
            f"{available / 1e9:.1f} GB available. Give a calibration text instead."
        )
    model = cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto", trust_remote_code=trust_remote_code),
    )
    model = cast(Any, model).to(device).eval()
    config = model.config.get_text_config()
    first = [] if config.bos_token_id is None else [int(config.bos_token_id)]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(int(config.vocab_size), (num_windows, 1), generator=generator)
    prompts = torch.cat([torch.tensor(first, dtype=torch.int64).expand(num_windows, -1), starts], dim=1)
    if prompts.shape[1] >= seqlen:
        return prompts[:, :seqlen]
    settings = _settings(config, seqlen)
    model.generation_config = settings  # generate() would fill in penalties and limits from the model's own
    parts: list[Tensor] = []
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        for start in range(0, num_windows, WINDOWS_PER_BATCH):
            prompt = prompts[start : start + WINDOWS_PER_BATCH].to(device)
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
            parts.append(cast(Tensor, out).cpu())
            progress("sample", min(start + WINDOWS_PER_BATCH, num_windows), num_windows)
    return torch.cat(parts)


def _settings(config: Any, seqlen: int) -> GenerationConfig:
    end = config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=seqlen,
        min_length=seqlen,
        suppress_tokens=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
