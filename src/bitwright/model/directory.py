"""Completing a model directory whose shards are written: index, configuration, tokenizer and the other small files."""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile
from typing import Any

from bitwright.model.checkpoint import HUB_PATTERNS, WEIGHT_INDEX, Checkpoint, scan_headers
from bitwright.records import write_json_atomic


def complete_directory(checkpoint: Checkpoint, target: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write what a directory of finished shards lacks to be a model directory.

    Args:
        checkpoint: of the model that it is a version of.
        target: holds the shards.
        config: the configuration; None for that of the checkpoint, byte for byte.
    """
    infos = scan_headers(sorted(target.glob("*.safetensors")))
    index = {
        "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
        "weight_map": {name: info.file.name for name, info in sorted(infos.items())},
    }
    write_json_atomic(target / WEIGHT_INDEX, index)
    for file in sorted(checkpoint.path.iterdir()):
        belongs = file.is_file() and any(fnmatch(file.name, pattern) for pattern in HUB_PATTERNS)
        if belongs and file.name != WEIGHT_INDEX and file.suffix != ".safetensors":
            copyfile(file, target / file.name)
    if config is not None:
        write_json_atomic(target / "config.json", config)
