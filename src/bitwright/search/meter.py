"""Measured losses of assignments, each measured once and remembered in a file."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitwright.records import append_jsonl, read_jsonl

Assignment = Mapping[str, str | None]
"""Site -> name of its scheme, None for 16 bit."""


@dataclass(slots=True)
class Meter:
    """Asks `measure` for what it does not know yet.

    Attributes:
        measure: loss of an assignment; the same for the same.
        cache: JSON lines of what was measured, read first if it exists; None keeps nothing. One file per model, data
            and measure.
        known: hash of an assignment -> its loss.
    """

    measure: Callable[[Assignment], float]
    cache: Path | None
    known: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache.exists():
            self.known = {str(line["assignment"]): float(line["loss"]) for line in read_jsonl(self.cache)}

    def loss(self, schemes: Assignment) -> float:
        """Return the measured loss of an assignment."""
        key = hashlib.sha256(json.dumps(dict(schemes), sort_keys=True).encode()).hexdigest()
        if key not in self.known:
            self.known[key] = self.measure(schemes)
            if self.cache is not None:
                append_jsonl(self.cache, {"assignment": key, "loss": self.known[key]})
        return self.known[key]
