"""Export in bitwright's own layout: a run's model directory is one already; copy it, and have transformers prove it."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from bitwright.errors import CheckpointError, VerificationError
from bitwright.exporters.reload import (
    compare_logits,
    compare_weights,
    load,
    logits,
    probe_tokens,
    require_memory,
    rounding_bound,
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
    require_memory(ours, ours.dtype)
    ids = probe_tokens(ours)
    try:
        theirs = load(directory, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise VerificationError(f"{directory}: transformers cannot load it ({error}).") from None
    found, expected = logits(directory, theirs, ids), ours.logits(ids)
    dense = cast(nn.Module, cast(Any, theirs).dequantize())
    return {
        "engine": "transformers",
        "weights_compared": compare_weights(dense, ours),
        **compare_logits(directory, found, expected, rounding_bound(ours, expected)),
    }
