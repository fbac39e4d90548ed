"""A model directory like another one, with the values of some parameters replaced."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bitwright.errors import RunError
from bitwright.model.directory import complete_directory
from bitwright.model.skeleton import Skeleton
from bitwright.model.tensor_file import save_tensors_atomic


def write_dense_copy(skeleton: Skeleton, values: Mapping[str, Tensor], target: Path) -> None:
    """Write a directory with the tensors of a checkpoint, in their dtypes, and new values of some; under its name last.

    Every shard of the checkpoint becomes one shard, so that one shard at a time is in memory. What is packed there is
    dense here.

    Args:
        skeleton: of the model.
        values: parameter (as the model calls it) -> its new value, in its shape. Tied names are left out.
        target: must not exist, or be empty.
    Raises:
        RunError: the target is not free.
        CheckpointError: a parameter is stored in a way that cannot be traced.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target}: exists and is not empty. Choose another --out.")
    checkpoint = skeleton.checkpoint
    stored: dict[str, Tensor] = {}
    for parameter, value in values.items():
        if parameter in skeleton.sources:
            stored.update(skeleton.stored_tensors(parameter, value.detach()))
    by_file: dict[str, list[str]] = {}
    for name in checkpoint.names:
        by_file.setdefault(checkpoint.file(name).name, []).append(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        written.mkdir()
        for index, names in enumerate(by_file.values(), start=1):
            tensors = checkpoint.read([name for name in names if name not in stored])
            tensors |= {name: stored[name] for name in names if name in stored}
            save_tensors_atomic(written / f"model-{index:05d}-of-{len(by_file):05d}.safetensors", tensors)
        dense = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        complete_directory(checkpoint, written, dense if checkpoint.is_packed else None)
        if target.exists():
            target.rmdir()
        written.replace(target)
