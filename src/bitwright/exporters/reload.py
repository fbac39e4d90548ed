"""Load an export with transformers and compare it with our own, streamed, reading of the same files."""

import io
import logging
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from bitwright.errors import ResourceError, VerificationError
from bitwright.model.skeleton import CONSTRUCTION_ERRORS
from bitwright.model.stream import StreamedModel

PROBE_TOKENS = 64
ROUNDINGS = 4
"""Roundings of the largest logit that one block may add; those of several blocks are independent and add as a root."""


def probe_tokens(model: StreamedModel) -> Tensor:
    """Return random tokens [1, PROBE_TOKENS], always the same for a vocabulary."""
    vocabulary = int(model.skeleton.model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def load(directory: Path, *, trust_remote_code: bool) -> nn.Module:
    """Load a directory as a user would, in the dtype that it says.

    Raises:
        VerificationError: transformers cannot.
    """
    from transformers import AutoModelForCausalLM

    with _silent():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", trust_remote_code=trust_remote_code
            )
        except CONSTRUCTION_ERRORS as error:
            raise VerificationError(f"{directory}: transformers cannot load it ({error}).") from None
        return cast(nn.Module, model).eval()


def logits(directory: Path, model: nn.Module, ids: Tensor) -> Tensor:
    """Run transformers' model: logits [B, T, V] in float32.

    Raises:
        VerificationError: transformers cannot.
    """
    with _silent(), torch.no_grad():
        try:
            return cast(Tensor, model(input_ids=ids).logits).float()
        except CONSTRUCTION_ERRORS as error:
            raise VerificationError(f"{directory}: transformers cannot run it ({error}).") from None


def compare_weights(theirs: nn.Module, ours: StreamedModel) -> int:
    """Compare every stored parameter and buffer, after transformers has decompressed the packed ones; say how many.

    Raises:
        VerificationError: one differs in a single bit.
    """
    found = {**dict(theirs.named_parameters(remove_duplicate=False)), **dict(theirs.named_buffers())}
    compared = 0
    for index, name in enumerate(ours.block_names):
        with ours.block(index) as block:
            compared += _compare(found, {f"{name}.{local}": tensor for local, tensor in block.state_dict().items()})
    with ours.outside():
        rest = {name: tensor for name, tensor in ours.skeleton.model.state_dict().items() if not tensor.is_meta}
        compared += _compare(found, rest)
    return compared


def compare_logits(directory: Path, found: Tensor, expected: Tensor, bound: float) -> dict[str, Any]:
    """Compare logits and return their largest difference and its bound.

    Raises:
        VerificationError: the difference is larger, or NaN.
    """
    difference = float((found - expected).abs().max())
    if not difference <= bound:
        raise VerificationError(
            f"{directory}: transformers' logits differ from ours by {difference:.3g}; rounding explains {bound:.3g}."
        )
    return {"max_logit_difference": difference, "logit_bound": bound}


def rounding_bound(model: StreamedModel, logits: Tensor) -> float:
    """Return how far logits may differ by the rounding of the model's compute dtype."""
    return ROUNDINGS * math.sqrt(model.num_blocks) * torch.finfo(model.dtype).eps * float(logits.abs().max())


def require_memory(model: StreamedModel, dtype: torch.dtype) -> None:
    """Raises ResourceError if the whole model does not fit into memory in a dtype."""
    needed = sum(parameter.numel() for parameter in model.skeleton.model.parameters()) * dtype.itemsize
    available = psutil.virtual_memory().available
    if 1.2 * needed > available:
        raise ResourceError(
            f"verification loads the whole model: {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB available. "
            "Give --no-verify, and verify on a larger machine."
        )


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name], tensor):
            raise VerificationError(f"{name}: transformers reads other values than were written.")
    return len(expected)


@contextmanager
def _silent() -> Generator[None, None, None]:
    """Hide what transformers logs, and compressed-tensors' progress bars, which know no switch."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
