"""What the original and the quantized model write after the same words: figures for people who read texts, not nats.

The prompts are cut out of the run's gate text, which no method has seen, evenly spread over it. Both models continue
them greedily with transformers, one model in memory after the other. After the first different token the two have
different texts before them: a difference of one near-tie may look large, so samples illustrate and prove nothing.

Legend: N prompts, P tokens of a prompt, K windows of T tokens.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from bitwright.errors import ResourceError, RunError
from bitwright.exporters.reload import load, logits
from bitwright.model.checkpoint import open_checkpoint
from bitwright.outcome import GATE_TOKENS
from bitwright.preparation import load_tokenizer, open_original
from bitwright.progress import Progress, no_progress
from bitwright.records import append_jsonl
from bitwright.runs import RunDirectory, open_run

PROMPT_TOKENS = 32
NEW_TOKENS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt and its continuations by the original and by the quantized model."""

    prompt: str
    before: str
    after: str


def record_samples(
    path: str | Path,
    original: str | None = None,
    *,
    num: int = 3,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> tuple[Sample, ...]:
    """Let a finished run's model and its original continue the same prompts, and add them to the run's records.

    Args:
        path: the run directory.
        original: the model that was quantized, a directory or hub id; where the run found it unless given.
        num: prompts, N; fewer where the gate text is shorter.
        device: where both models run.
        trust_remote_code: let the model's own code run.
        progress: called with (what, done, total).
    Raises:
        RunError: no finished run, one without gate text, or the original is another model.
        ResourceError: a model does not fit into memory.
        VerificationError: transformers cannot load one.
    """
    run = open_run(Path(path))
    opened = open_original(run, original, device=device, trust_remote_code=trust_remote_code)
    checkpoint = opened.skeleton.checkpoint
    prompts = gate_prompts(run, num)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    written: list[list[str]] = []
    for done, directory in enumerate((checkpoint.path, run.model)):
        progress("samples", done, 2)
        _require_memory(open_checkpoint(directory).num_bytes, directory)
        ids = continue_greedily(directory, prompts, device=device, trust_remote_code=trust_remote_code)
        written.append([tokenizer.decode(row, skip_special_tokens=True) for row in ids])
    progress("samples", 2, 2)
    begun = [tokenizer.decode(row, skip_special_tokens=True) for row in prompts]
    samples = tuple(
        Sample(prompt=prompt, before=before, after=after) for prompt, before, after in zip(begun, *written, strict=True)
    )
    append_jsonl(run.records, *({"kind": "generation", **asdict(sample)} for sample in samples))
    return samples


def gate_prompts(run: RunDirectory, num: int) -> Tensor:
    """Cut up to `num` prompts [N, P] out of the gate text, evenly spread.

    Raises:
        RunError: the run kept no gate text, or one shorter than a prompt.
    """
    with safe_open(run.stats, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
        if GATE_TOKENS not in handle.keys():  # noqa: SIM118  the handle is no mapping
            raise RunError(f"{run.stats}: holds no gate text. Quantize again with this version, --fresh.")
        gate = cast(Tensor, handle.get_tensor(GATE_TOKENS)).long()
    pieces = gate[:, : gate.shape[1] // PROMPT_TOKENS * PROMPT_TOKENS].reshape(-1, PROMPT_TOKENS)
    if not len(pieces):
        raise RunError(f"{run.stats}: its gate text is shorter than {PROMPT_TOKENS} tokens. Use longer windows.")
    count = min(num, len(pieces))
    return pieces[[index * len(pieces) // count for index in range(count)]]


def continue_greedily(directory: Path, prompts: Tensor, *, device: str, trust_remote_code: bool) -> Tensor:
    """Return up to `NEW_TOKENS` likeliest tokens [N, …] after prompts [N, P], past the first end of text padded.

    Raises:
        VerificationError: transformers cannot load the directory.
    """
    model: Any = load(directory, trust_remote_code=trust_remote_code).to(device)
    end = model.config.get_text_config().eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    model.generation_config = settings  # generate() would fill in penalties and limits from the model's own
    ids = prompts.to(device)
    logits(directory, model, ids[:, :1])  # the first forward decompresses packed weights, here without its noise
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return cast(Tensor, found)[:, ids.shape[1] :].cpu()


def _require_memory(num_bytes: int, directory: Path) -> None:
    available = psutil.virtual_memory().available
    if 1.2 * num_bytes > available:
        raise ResourceError(
            f"{directory}: samples hold the whole model in memory, {num_bytes / 1e9:.1f} GB of weights, "
            f"{available / 1e9:.1f} GB available. Leave out --samples, or make them on a larger machine."
        )
