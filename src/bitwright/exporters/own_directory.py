"""Export in bitwright's own layout: a run's model directory is one already; copy it, and have transformers prove it."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bitwright.errors import CheckpointError, VerificationError
from bitwright.exporters.transformers_directory import (
    PROBE_TOKENS,
    _compare_logits,  # pyright: ignore[reportPrivateUsage]
    _compare_weights,  # pyright: ignore[reportPrivateUsage]
    _load,  # pyright: ignore[reportPrivateUsage]
    _logits,  # pyright: ignore[reportPrivateUsage]
    _require_memory,  # pyright: ignore[reportPrivateUsage]
    _rounding,  # pyright: ignore[reportPrivateUsage]
)
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel


def verify_with_plugin(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Load a directory with transformers through our plug-in; compare with our own, streamed, reading of the files.

    Logits are those of the packed model, and must agree within the rounding of the stored type; on one machine the
    same operations run in the same order, and they are usually equal. Weights are compared after transformers has
    dequantized them, and must be equal to the last bit.

    Raises:
        ResourceError: the whole model does not fit into memory.
        VerificationError: they differ, or transformers cannot load it.
    """
    checkpoint = open_checkpoint(directory)
    ours = StreamedModel(checkpoint, dtype=checkpoint.dense_dtype, trust_remote_code=trust_remote_code)
    _require_memory(ours, ours.dtype)
    vocabulary = int(ours.skeleton.model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        theirs = _load(directory, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise VerificationError(f"{directory}: transformers cannot load it ({error}).") from None
    found, expected = _logits(directory, theirs, ids), ours.logits(ids)
    dense = cast(nn.Module, cast(Any, theirs).dequantize())
    return {
        "engine": "transformers",
        "weights_compared": _compare_weights(dense, ours),
        **_compare_logits(directory, found, expected, _rounding(ours, expected)),
    }
