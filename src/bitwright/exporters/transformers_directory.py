"""Export to compressed-tensors: a run's model directory is one already; copy it, and have transformers prove it."""

import filecmp
import importlib.util
import io
import logging
import math
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from bitwright.errors import MissingDependency, ResourceError, VerificationError
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.skeleton import CONSTRUCTION_ERRORS
from bitwright.model.stream import StreamedModel

PROBE_TOKENS = 64
ROUNDINGS = 4
"""Roundings of the largest logit that one block may add; those of several blocks are independent and add as a root."""


def copy_directory(source: Path, target: Path) -> None:
    """Copy a complete model directory, and read the copy back.

    Raises:
        VerificationError: a file of the copy is not what it was copied from.
    """
    shutil.copytree(source, target)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        if not filecmp.cmp(file, copy, shallow=False):
            raise VerificationError(f"{copy}: differs from {file}, which it was copied from. Check the disk.")


def verify_with_transformers(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Load a directory with transformers; compare its weights and logits with our own reading of the same files.

    Weights must be equal to the last bit; logits within the rounding of the stored type.

    Raises:
        MissingDependency: the compressed-tensors package is not installed.
        ResourceError: the whole model does not fit into memory.
        VerificationError: they differ, or transformers cannot load it.
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
    theirs, found = _run_transformers(directory, ids, trust_remote_code=trust_remote_code)
    compared = _compare_weights(theirs, ours)
    expected = ours.logits(ids)
    difference = float((found - expected).abs().max())
    bound = ROUNDINGS * math.sqrt(ours.num_blocks) * torch.finfo(ours.dtype).eps * float(expected.abs().max())
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


def _run_transformers(directory: Path, ids: Tensor, *, trust_remote_code: bool) -> tuple[nn.Module, Tensor]:
    """Load a directory and run it: the model, whose weights the forward has decompressed, and its logits [B, T, V]."""
    from transformers import AutoModelForCausalLM

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), torch.no_grad():  # compressed-tensors' progress bars know no switch
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", trust_remote_code=trust_remote_code
            ).eval()
            return cast(nn.Module, model), cast(Tensor, model(input_ids=ids).logits).float()
    except CONSTRUCTION_ERRORS as error:
        raise VerificationError(f"{directory}: transformers cannot load it ({error}).") from None
    finally:
        logger.setLevel(level)


def _compare_weights(theirs: nn.Module, ours: StreamedModel) -> int:
    """Compare every stored parameter and buffer, after transformers has decompressed the packed ones."""
    found = {**dict(theirs.named_parameters(remove_duplicate=False)), **dict(theirs.named_buffers())}
    compared = 0
    for index, name in enumerate(ours.block_names):
        with ours.block(index) as block:
            compared += _compare(found, {f"{name}.{local}": tensor for local, tensor in block.state_dict().items()})
    with ours.outside():
        rest = {name: tensor for name, tensor in ours.skeleton.model.state_dict().items() if not tensor.is_meta}
        compared += _compare(found, rest)
    return compared


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name], tensor):
            raise VerificationError(f"{name}: transformers reads other values than were written.")
    return len(expected)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for info in checkpoint.stored.values():
        if info.dtype.is_floating_point:
            counts[info.dtype] = counts.get(info.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])


def _require_memory(model: StreamedModel) -> None:
    needed = sum(parameter.numel() for parameter in model.skeleton.model.parameters()) * model.dtype.itemsize
    available = psutil.virtual_memory().available
    if 1.2 * needed > available:
        raise ResourceError(
            f"verification loads the whole model: {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB available. "
            "Give --no-verify, and verify on a larger machine."
        )
