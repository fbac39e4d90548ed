"""How much memory this process holds, and the most that it has held since a moment of one's choice."""

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESTART_PEAK = "5"


def peak_bytes() -> int:
    """Largest resident size of this process since it began, or since a PeakMemory was made."""
    if STATUS.exists():  # ru_maxrss of a process that another one started begins with the other's
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident size of this process now; its peak where the system does not say."""
    return _status("VmRSS") if STATUS.exists() else peak_bytes()


def _status(name: str) -> int:
    return int(STATUS.read_text(encoding="ascii").partition(f"{name}:")[2].split()[0]) * 1024


@dataclass(slots=True)
class PeakMemory:
    """The resident size at the moment of creation, and the largest since.

    Linux can start its high-water mark again, so that the peak is that of the work alone; elsewhere it is that of the
    whole process. `before` remembers the mark that was lost.

    Attributes:
        held_bytes: resident at creation.
        before_bytes: the process's peak until creation.
    """

    before_bytes: int = field(default_factory=peak_bytes)
    held_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        with suppress(OSError):
            CLEAR.write_text(RESTART_PEAK, encoding="ascii")
        self.held_bytes = resident_bytes()

    @property
    def since_bytes(self) -> int:
        """The largest resident size since creation."""
        return peak_bytes()

    @property
    def whole_bytes(self) -> int:
        """The largest resident size of the process so far."""
        return max(self.before_bytes, peak_bytes())
