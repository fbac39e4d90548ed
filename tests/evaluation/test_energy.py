"""Energy is what counters say, or nothing: counters here are files and a stand-in for NVIDIA's library."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitwright.evaluation import energy
from bitwright.evaluation.energy import EnergyMeter

RANGE_UJ = 262_143_328_850


def zone(powercap: Path, place: str, name: str, microjoules: int) -> Path:
    folder = powercap / f"intel-rapl:{place}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_and_their_memory_add_and_what_they_contain_does_not(tmp_path: Path) -> None:
    counters = [
        zone(tmp_path, "0", "package-0", 1_000_000),
        zone(tmp_path, "0:0", "core", 400_000),
        zone(tmp_path, "0:1", "dram", 300_000),
        zone(tmp_path, "1", "package-1", 5),
        zone(tmp_path, "2", "psys", 9_000_000),
    ]
    (tmp_path / "intel-rapl").mkdir()  # the control type itself, which Linux puts beside its zones
    with EnergyMeter(powercap=tmp_path) as meter:
        for number, file in enumerate(counters):
            file.write_text(str(int(file.read_text()) + 1_000_000 * 10**number))
    assert meter.result.energy_j == pytest.approx(1 + 100 + 1000, rel=1e-9)
    assert meter.result.counters == ("rapl:package-0", "rapl:0:1:dram", "rapl:package-1")
    assert meter.result.reason is None


def test_a_counter_that_starts_again_is_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zone(tmp_path, "0", "package-0", RANGE_UJ - 2_000_000)
    with EnergyMeter(powercap=tmp_path) as meter:
        file.write_text("3000000")
    assert meter.result.energy_j == pytest.approx(5, rel=1e-6)
    monkeypatch.setattr(energy, "LARGEST_PACKAGE_W", 1e15)  # so much that any time is too long
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert meter.result.energy_j is None
    assert "may have started again twice" in str(meter.result.reason)


def test_without_counters_there_is_a_reason_and_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert (meter.result.energy_j, meter.result.counters) == (None, ())
    assert "no energy counter" in str(meter.reason)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in str(EnergyMeter("cuda", powercap=tmp_path).reason)


def test_a_counter_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "0", "package-0", 1)

    def refuse(file: Path) -> float:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(energy, "_microjoules", refuse)
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert meter.result.energy_j is None
    assert "Run as root" in str(meter.result.reason)


def test_a_gpu_counts_in_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {0: 10_000, 1: 777_000}
    asked: list[int] = []

    class NVMLError(Exception):
        pass

    def handle(index: int) -> int:
        asked.append(index)
        if index not in readings:
            raise NVMLError("Invalid Argument")
        return index

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        NVMLError=NVMLError,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda index: readings[index],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with EnergyMeter("cuda:1", powercap=tmp_path) as meter:
        readings[1] += 2500
    assert (meter.result.energy_j, meter.result.counters, asked) == (pytest.approx(2.5, rel=1e-9), ("nvml:1",), [1])
    assert "GPU 7" in str(EnergyMeter("cuda:7", powercap=tmp_path).reason)
