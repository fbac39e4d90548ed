"""Writing safetensors files so that a reader, or a crash, sees a whole file or none."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitwright.errors import ResourceError
from bitwright.records import sync_folder, temporary_beside


def save_tensors_atomic(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file in one step, and wait until it is on disk.

    Args:
        path: of the file.
        tensors: by name.
        facts: what else its header says.
    Raises:
        ResourceError: the disk is full or the file may not be written; the old content is untouched.
    """
    temporary = temporary_beside(path)
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata={"format": "pt", **(facts or {})})
        temporary.chmod(permissions)  # what the user's umask gives; safetensors itself shuts everybody else out
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            temporary.unlink()
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise ResourceError(
            f"{path}: cannot be written ({reason}). Free disk space or choose another directory; then start again."
        ) from None
