"""Energy that a machine's own counters measured, or the reason why there is none. Nothing is estimated.

RAPL   Linux, /sys/class/powercap/intel-rapl:*: whole processor packages (Intel and AMD) and, where it is counted apart,
       their memory, in µJ. The counter starts again at its maximum; kernels since 5.10 show it to root only.
NVML   one NVIDIA GPU, through the package nvidia-ml-py: the whole board, in mJ; since the Volta generation.

Counters know no process: what else runs on the machine is in the figure.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")
LARGEST_PACKAGE_W = 1000.0
"""No package takes more; so a counter cannot have gone round twice in the time that it takes at this power."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counter:
    """A counter of energy.

    Attributes:
        name: such as `rapl:package-0` or `nvml:0`.
        read_j: its reading.
        range_j: where it starts again; None where it does not.
    """

    name: str
    read_j: Callable[[], float]
    range_j: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """What was measured between two moments.

    Attributes:
        energy_j: the sum over all counters; None where there is no figure.
        seconds: between the moments.
        counters: names of what was read.
        reason: why there is no figure; None where there is one.
    """

    energy_j: float | None
    seconds: float
    counters: tuple[str, ...]
    reason: str | None


class EnergyMeter:
    """Measures the energy of what happens inside its `with`; `result` afterwards says how much, or why not.

    Args:
        device: `cpu`, or `cuda` with or without a number, for the GPU's counter and, where there are any, the
            processor's.
        powercap: where Linux keeps RAPL.
    """

    def __init__(self, device: str = "cpu", *, powercap: Path = POWERCAP) -> None:
        self._counters, self._reason = _rapl(powercap)
        if device.startswith("cuda"):
            gpu, self._reason = _nvml(int(device.partition(":")[2] or 0))
            self._counters += [] if gpu is None else [gpu]
        self._result: Energy | None = None

    @property
    def reason(self) -> str | None:
        """Why there will be no figure; None where there will be one."""
        return self._reason

    @property
    def result(self) -> Energy:
        """What was measured; only after the `with`."""
        assert self._result is not None, "the energy is known only after the with block"
        return self._result

    def __enter__(self) -> "EnergyMeter":
        self._start = time.perf_counter()
        self._before = [] if self._reason else [counter.read_j() for counter in self._counters]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = [] if self._reason else [counter.read_j() for counter in self._counters]
        seconds = time.perf_counter() - self._start
        names = tuple(counter.name for counter in self._counters)
        reason = self._reason or self._overflow(seconds)
        energy_j = None
        if reason is None:
            spent = zip(self._counters, self._before, after, strict=True)
            energy_j = sum(_difference(counter, first, last) for counter, first, last in spent)
        self._result = Energy(energy_j=energy_j, seconds=seconds, counters=names, reason=reason)

    def _overflow(self, seconds: float) -> str | None:
        for counter in self._counters:
            if counter.range_j is not None and seconds * LARGEST_PACKAGE_W > counter.range_j:
                longest = counter.range_j / LARGEST_PACKAGE_W
                return (
                    f"{counter.name} may have started again twice in {seconds:.0f} s. "
                    f"Measure at most {longest:.0f} s at a time."
                )
        return None


def _difference(counter: Counter, before: float, after: float) -> float:
    """Energy between two readings, across at most one new start."""
    gone_round = counter.range_j is not None and after < before
    return after - before + (counter.range_j or 0.0) * gone_round


def _rapl(powercap: Path) -> tuple[list[Counter], str | None]:
    """The processors' counters, or why there are none."""
    counters: list[Counter] = []
    for zone in sorted(powercap.glob("intel-rapl:[0-9]*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            place = zone.name.partition(":")[2]
            is_part = ":" in place
            if name.startswith("psys") or (is_part and name != "dram"):
                continue  # the platform contains the packages, and these contain their cores
            _microjoules(zone / "energy_uj")
            range_j = _microjoules(zone / "max_energy_range_uj")
        except PermissionError:
            return [], f"{zone / 'energy_uj'}: may not be read. Run as root, or let your user read it."
        except (OSError, ValueError) as error:
            return [], f"{zone}: cannot be read ({error})."
        counters.append(
            Counter(
                name=f"rapl:{place}:{name}" if is_part else f"rapl:{name}",
                read_j=lambda file=zone / "energy_uj": _microjoules(file),
                range_j=range_j,
            )
        )
    return counters, None if counters else f"{powercap}: this machine shows no energy counter (RAPL) of its processor."


def _microjoules(file: Path) -> float:
    return int(file.read_text(encoding="ascii")) * 1e-6


def _nvml(index: int) -> tuple[Counter | None, str | None]:
    """A GPU's counter, or why there is none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, "the GPU's counter needs the package nvidia-ml-py. Run pip install nvidia-ml-py."
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return None, f"GPU {index}: has no energy counter ({error})."
    return Counter(
        name=f"nvml:{index}", read_j=lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3
    ), None
