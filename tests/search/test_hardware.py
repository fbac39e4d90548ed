"""Profiles are data with sources, read strictly; kernels take what they say and nothing else."""

from pathlib import Path

import pytest

from bitwright.errors import RecipeError, UnknownName
from bitwright.schemes import Scheme
from bitwright.search.cpu_profile import calibrate_cpu
from bitwright.search.hardware import hardware_names, load_hardware


@pytest.mark.parametrize("name", hardware_names())
def test_profiles_load_and_say_where_they_are_from(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.source
    assert "2026" in hardware.checked
    assert all(kernel.source for kernel in hardware.kernels)
    assert hardware.memory_bytes > hardware.bytes_per_s / 1000


def test_all_profiles_are_there() -> None:
    assert {"a100-80gb", "apple-m2-max", "apple-m3-max", "h100-sxm", "h200", "jetson-orin", "rtx-4090", "t4"} == set(
        hardware_names()
    )


@pytest.mark.parametrize(
    ("scheme", "takes"),
    [("W4A16-g128", True), ("W4A16-g128-asym", False), ("W8A8", True), ("fp8", True), ("fp8-a16", False)],
)
def test_kernels_for_experts(scheme: str, takes: bool) -> None:
    hardware, wanted = load_hardware("h100-sxm"), Scheme.parse(scheme)
    assert hardware.kernel(wanted) is not None
    assert (hardware.kernel(wanted, "expert") is not None) == takes


@pytest.mark.parametrize(
    ("hardware", "scheme", "arithmetic"),
    [
        ("h100-sxm", "W4A16-g128", "bf16"),
        ("h100-sxm", "W4A16-g128-asym", "bf16"),
        ("h100-sxm", "W8A8", "int8"),
        ("h100-sxm", "fp8", "fp8"),
        ("h100-sxm", "W3A16-g128", None),
        ("h100-sxm", "W4A16-g256", None),
        ("h100-sxm", "W4A8", None),
        ("a100-80gb", "fp8", None),
        ("a100-80gb", "fp8-a16", "bf16"),
        ("a100-80gb", "W4A16-g64-floatzero", None),
        ("t4", "W8A8", "int8"),
        ("rtx-4090", "nvfp4-a16", "bf16"),
        ("rtx-4090", "mxfp4-a16", None),
        ("apple-m2-max", "mxfp4-a16", "bf16"),
        ("apple-m2-max", "W5A16-g64", "bf16"),
    ],
)
def test_kernels(hardware: str, scheme: str, arithmetic: str | None) -> None:
    kernel = load_hardware(hardware).kernel(Scheme.parse(scheme))
    assert (None if kernel is None else kernel.arithmetic) == arithmetic


def test_unknown_names_and_keys_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'h100-sxm'"):
        load_hardware("h100-smx")
    file = tmp_path / "mine.yaml"
    lines = "name: x\nsource: y\nbandwidth_gb_per_s: 10\nmemory_gb: 8\n"
    file.write_text(lines + "tera_ops_per_s: {fp16: 3}\n")
    with pytest.raises(RecipeError, match="unknown arithmetic 'fp16'"):
        load_hardware(file)
    file.write_text(lines + "tera_ops_per_s: {}\nwatts: 0\n")
    with pytest.raises(RecipeError, match="watts must be above 0"):
        load_hardware(file)
    file.write_text(lines + "tera_ops_per_s: {}\nbandwith: 3\n")
    with pytest.raises(RecipeError, match="unknown key 'bandwith'"):
        load_hardware(file)


def test_this_machine_is_measured_and_written(tmp_path: Path) -> None:
    measured = calibrate_cpu(tmp_path / "this.yaml", seconds_each=0.01)
    assert load_hardware(tmp_path / "this.yaml") == measured
    assert measured.stays_packed
    assert set(measured.tera_ops_per_s) == {"float32", "bf16", "int8"}
