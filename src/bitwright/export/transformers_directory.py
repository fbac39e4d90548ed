"""Export to compressed-tensors: a run's model directory is one already; copy it, and have transformers prove it."""

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from bitwright.errors import MissingDependency, ResourceError, VerificationError
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.stream import StreamedModel

PROBE_TOKENS = 64
ROUNDINGS_PER_BLOCK = 16
"""How many roundings of the compute type a block may add to the largest logit before two results count as different."""


def copy_directory(source: Path, target: Path) -> None:
    """Copy a complete model directory."""
    shutil.copytree(source, target)


def verify_with_transformers(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Load a directory with transformers; compare its weights and logits with our own reading of the same files.

    Weights must be equal to the last bit; logits within the rounding of the stored type.

    Raises:
        MissingDependency: the compressed-tensors package is not installed.
        ResourceError: the whole model does not fit into memory.
        VerificationError: they differ.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependency(
            "verification loads the export with transformers, which needs compressed-tensors. "
            "pip install 'bitwright[compressed-tensors]', or give --no-verify."
        )
    checkpoint = open_checkpoint(directory)
    ours = StreamedModel(checkpoint, dtype=_stored_dtype(checkpoint), trust_remote_code=trust_remote_code)
    _require_memory(ours)
    ids = torch.randint(
        int(ours.skeleton.model.config.get_text_config().vocab_size),
        (1, PROBE_TOKENS),
        generator=torch.Generator().manual_seed(0),
    )
    theirs = _load(directory, has_experts=_has_experts(ours), trust_remote_code=trust_remote_code)
    with torch.no_grad():
        found = cast(Tensor, theirs(input_ids=ids).logits).float()
    compared = _compare_weights(theirs, ours)
    expected = _stream_logits(ours, ids)
    difference = float((found - expected).abs().max())
    bound = ROUNDINGS_PER_BLOCK * ours.num_blocks * torch.finfo(ours.dtype).eps * float(expected.abs().max())
    if not difference <= bound:
        raise VerificationError(
            f"{directory}: transformers' logits differ from ours by {difference:.3g}; rounding explains {bound:.3g}."
        )
    return {
        "engine": "transformers",
        "weights_compared": compared,
        "max_logit_difference": difference,
        "logit_bound": bound,
    }


def _load(directory: Path, *, has_experts: bool, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # Experts are 3-D parameters, which compressed-tensors can only load dequantized.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if has_experts else {}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", trust_remote_code=trust_remote_code, **options
    )
    return cast(nn.Module, model).eval()


def _compare_weights(theirs: nn.Module, ours: StreamedModel) -> int:
    """Compare every parameter of every block after transformers has decompressed it."""
    compared = 0
    parameters = dict(theirs.named_parameters())
    for index, name in enumerate(ours.block_names):
        with ours.block(index) as block:
            for local, parameter in block.named_parameters():
                found = parameters.get(f"{name}.{local}")
                if found is None or not torch.equal(found, parameter):
                    raise VerificationError(f"{name}.{local}: transformers reads other values than were written.")
                compared += 1
    return compared


def _stream_logits(model: StreamedModel, ids: Tensor) -> Tensor:
    with model.outside():
        hidden = model.enter(ids)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            hidden = model.run_block(block, index, hidden)
    with model.outside():
        return model.leave(ids, hidden)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for info in checkpoint.stored.values():
        if info.dtype.is_floating_point:
            counts[info.dtype] = counts.get(info.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])


def _has_experts(model: StreamedModel) -> bool:
    return any(parameter.ndim == 3 for _, parameter in model.skeleton.model.named_parameters())


def _require_memory(model: StreamedModel) -> None:
    needed = sum(parameter.numel() for parameter in model.skeleton.model.parameters()) * model.dtype.itemsize
    available = psutil.virtual_memory().available
    if 1.2 * needed > available:
        raise ResourceError(
            f"verification loads the whole model: {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB available. "
            "Give --no-verify, and verify on a larger machine."
        )
