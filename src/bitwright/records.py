"""Records: what was measured, on what, by what. Standard library only."""

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("bitwright", "torch", "transformers", "safetensors", "numpy", "compressed-tensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine and the versions a figure was obtained with."""

    python: str
    platform: str
    machine: str
    num_cores: int
    versions: dict[str, str]

    @classmethod
    def capture(cls) -> "Environment":
        """Describe this process's environment."""
        versions: dict[str, str] = {}
        for package in PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return cls(
            python=platform.python_version(),
            platform=sys.platform,
            machine=platform.machine(),
            num_cores=os.cpu_count() or 1,
            versions=versions,
        )


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one record as one line and force it to the disk."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def write_text_atomic(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
