"""The table of exporters: one line each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.exporters.transformers_directory import copy_directory, verify_with_transformers
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Exporter:
    """Writes a run's model for an engine and checks it with that engine.

    Attributes:
        write: (run's model directory, target directory); creates the target.
        verify: (target directory, whether remote code may run) -> what was compared; raises VerificationError.
    """

    write: Callable[[Path, Path], None]
    verify: Callable[[Path, bool], dict[str, Any]]


EXPORTERS: Registry[Exporter] = Registry("exporter")
EXPORTERS.register("compressed-tensors", Exporter(write=copy_directory, verify=verify_with_transformers))
