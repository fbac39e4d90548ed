"""Export to compressed-tensors: a run's model directory is one already; copy it, and have transformers prove it."""

import filecmp
import importlib.util
import io
import logging
import math
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from bitwright.errors import MissingDependency, ResourceError, VerificationError
from bitwright.exporters.engine_inputs import EngineModel
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.skeleton import CONSTRUCTION_ERRORS
from bitwright.model.stream import StreamedModel

PROBE_TOKENS = 64
ROUNDINGS = 4
"""Roundings of the largest logit that one block may add; those of several blocks are independent and add as a root."""
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
    _require_memory(ours, torch.float32 if checkpoint.quantizes_inputs else ours.dtype)
    ids = torch.randint(
        int(ours.skeleton.model.config.get_text_config().vocab_size),
        (1, PROBE_TOKENS),
        generator=torch.Generator().manual_seed(0),
    )
    theirs = _load(directory, trust_remote_code=trust_remote_code)
    found = _logits(directory, theirs, ids)  # the first forward also puts dense weights in the place of packed ones
    compared = {"engine": "transformers", "weights_compared": _compare_weights(theirs, ours)}
    if checkpoint.quantizes_inputs:
        return compared | _compare_quantized_inputs(checkpoint, theirs, ids, trust_remote_code=trust_remote_code)
    expected = ours.logits(ids)
    return compared | _compare_logits(directory, found, expected, _rounding(ours, expected))


def _compare_logits(directory: Path, found: Tensor, expected: Tensor, bound: float) -> dict[str, Any]:
    difference = float((found - expected).abs().max())
    if not difference <= bound:
        raise VerificationError(
            f"{directory}: transformers' logits differ from ours by {difference:.3g}; rounding explains {bound:.3g}."
        )
    return {"max_logit_difference": difference, "logit_bound": bound}


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
    found = _logits(checkpoint.path, nn.Module.float(theirs), ids)
    effect, difference = _rms(expected - plain), _rms(found - expected)
    rounding = _rounding(ours[0], expected)
    bound = rounding + SHARE_OF_EFFECT * effect
    if not difference <= bound:
        raise VerificationError(
            f"{checkpoint.path}: transformers' logits differ from ours by {difference:.3g} (RMS), where quantized "
            f"inputs change them by {effect:.3g} and rounding explains {bound:.3g}."
        )
    largest = rounding + float((expected - plain).abs().max())
    return _compare_logits(checkpoint.path, found, expected, largest) | {
        "rms_logit_difference": difference,
        "rms_logit_bound": bound,
        "rms_input_effect": effect,
    }


def _rounding(model: StreamedModel, logits: Tensor) -> float:
    return ROUNDINGS * math.sqrt(model.num_blocks) * torch.finfo(model.dtype).eps * float(logits.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _load(directory: Path, *, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with _silent():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", trust_remote_code=trust_remote_code
            )
        except CONSTRUCTION_ERRORS as error:
            raise VerificationError(f"{directory}: transformers cannot load it ({error}).") from None
        return cast(nn.Module, model).eval()


def _logits(directory: Path, model: nn.Module, ids: Tensor) -> Tensor:
    """Run transformers' model: logits [B, T, V] in float32."""
    with _silent(), torch.no_grad():
        try:
            return cast(Tensor, model(input_ids=ids).logits).float()
        except CONSTRUCTION_ERRORS as error:
            raise VerificationError(f"{directory}: transformers cannot run it ({error}).") from None


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


def _require_memory(model: StreamedModel, dtype: torch.dtype) -> None:
    needed = sum(parameter.numel() for parameter in model.skeleton.model.parameters()) * dtype.itemsize
    available = psutil.virtual_memory().available
    if 1.2 * needed > available:
        raise ResourceError(
            f"verification loads the whole model: {needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB available. "
            "Give --no-verify, and verify on a larger machine."
        )
