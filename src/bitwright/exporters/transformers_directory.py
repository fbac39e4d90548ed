"""Export to compressed-tensors: a run's model directory is one already; copy it, and have transformers prove it."""

import filecmp
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import MissingDependency, VerificationError
from bitwright.exporters.engine_inputs import EngineModel
from bitwright.exporters.reload import (
    compare_logits,
    compare_weights,
    load,
    logits,
    probe_tokens,
    require_memory,
    rounding_bound,
)
from bitwright.model.checkpoint import Checkpoint, open_checkpoint

SHARE_OF_EFFECT = 0.05
"""Of what quantized inputs do to the logits: how far those of another implementation may be (RMS)."""


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

    Weights must be equal to the last bit; logits within the rounding of the stored type. Where inputs are quantized,
    rounding to the stored type would hide whether they are, so logits are then compared in float32.

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
    ours = EngineModel(
        checkpoint, dtype=checkpoint.dense_dtype, trust_remote_code=trust_remote_code, rounds_inputs=False
    )
    require_memory(ours, torch.float32 if checkpoint.quantizes_inputs else ours.dtype)
    ids = probe_tokens(ours)
    theirs = load(directory, trust_remote_code=trust_remote_code)
    found = logits(directory, theirs, ids)  # the first forward also puts dense weights in the place of packed ones
    compared = {"engine": "transformers", "weights_compared": compare_weights(theirs, ours)}
    if checkpoint.quantizes_inputs:
        return compared | _compare_quantized_inputs(checkpoint, theirs, ids, trust_remote_code=trust_remote_code)
    expected = ours.logits(ids)
    return compared | compare_logits(directory, found, expected, rounding_bound(ours, expected))


def _compare_quantized_inputs(
    checkpoint: Checkpoint, theirs: nn.Module, ids: Tensor, *, trust_remote_code: bool
) -> dict[str, Any]:
    """Compare logits in float32 with a model that rounds inputs by the engine's formula.

    What is left is the rounding of float32, and a code here and there that it changed. So the difference must be small
    against what quantized inputs do to the logits: effects of independent sites add as a root, and an engine that
    ignored one of 400 would be found.
    """
    ours = [
        EngineModel(checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code, rounds_inputs=rounds_inputs)
        for rounds_inputs in (True, False)
    ]
    expected, plain = (model.logits(ids) for model in ours)
    # Transformers refuses to cast a quantized model. Its weights are dense by now, and what is cast is exact.
    found = logits(checkpoint.path, nn.Module.float(theirs), ids)
    effect, difference = _rms(expected - plain), _rms(found - expected)
    rounding = rounding_bound(ours[0], expected)
    bound = rounding + SHARE_OF_EFFECT * effect
    if not difference <= bound:
        raise VerificationError(
            f"{checkpoint.path}: transformers' logits differ from ours by {difference:.3g} (RMS), where quantized "
            f"inputs change them by {effect:.3g} and rounding explains {bound:.3g}."
        )
    largest = rounding + float((expected - plain).abs().max())
    return compare_logits(checkpoint.path, found, expected, largest) | {
        "rms_logit_difference": difference,
        "rms_logit_bound": bound,
        "rms_input_effect": effect,
    }


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
