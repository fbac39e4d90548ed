"""The table of exporters: one line each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import RunError
from bitwright.exporters.bitsandbytes_directory import verify_with_bitsandbytes, write_bitsandbytes
from bitwright.exporters.own_directory import verify_with_plugin
from bitwright.exporters.transformers_directory import copy_directory, verify_with_transformers
from bitwright.model.layouts import bitsandbytes, own
from bitwright.model.layouts.stored import COMPRESSED_TENSORS
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Exporter:
    """Writes a run's model for an engine and checks it with that engine.

    Attributes:
        layout: what the run's model must be stored in: its `quant_method`.
        write: (run's model directory, target directory); creates the target.
        verify: (target directory, whether remote code may run) -> what was compared; raises VerificationError.
    """

    layout: str
    write: Callable[[Path, Path], None]
    verify: Callable[[Path, bool], dict[str, Any]]

    def check(self, model: Path, layouts: Sequence[str]) -> None:
        """Raises RunError if a run's model is stored in other layouts, of which its record tells."""
        found = own.NAME if own.NAME in layouts else COMPRESSED_TENSORS
        if found != self.layout:
            raise RunError(
                f"{model}: stored in layout {found}, not {self.layout}. Export it to {found}, or quantize again with "
                f"layout: {self.layout}."
            )


EXPORTERS: Registry[Exporter] = Registry("exporter")
EXPORTERS.register(
    COMPRESSED_TENSORS, Exporter(layout=COMPRESSED_TENSORS, write=copy_directory, verify=verify_with_transformers)
)
EXPORTERS.register(own.NAME, Exporter(layout=own.NAME, write=copy_directory, verify=verify_with_plugin))
EXPORTERS.register(
    bitsandbytes.NAME, Exporter(layout=own.NAME, write=write_bitsandbytes, verify=verify_with_bitsandbytes)
)
