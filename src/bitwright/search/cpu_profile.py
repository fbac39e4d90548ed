"""The profile of the processor this runs on, measured: what its memory delivers and how fast it multiplies.

Each figure is the best of several short runs, because whatever disturbs a run makes it slower. The profile names no
kernels: bitwright's own layers keep codes in memory and decode every weight before they multiply.
"""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml

from bitwright.records import Environment, write_text_atomic
from bitwright.search.hardware import GIGA, TERA, Arithmetic, Hardware, load_hardware
from bitwright.strict_yaml import to_plain

THIS_CPU = "this-cpu"
STREAM_BYTES = 2**28
"""More than the caches of a processor hold."""
MATMUL_SIZE = 768
SECONDS_EACH = 0.6
NOTE = "bitwright's own layers decode every weight before they multiply, so that no scheme is faster than 16 bit here."


def find_hardware(name: str) -> Hardware:
    """Return a profile by name or file; `this-cpu` is measured now.

    Raises:
        UnknownName: no profile of that name.
        RecipeError: the file cannot be read, or holds something a profile does not know.
    """
    return calibrate_cpu() if name == THIS_CPU else load_hardware(name)


def calibrate_cpu(out: Path | None = None, *, seconds_each: float = SECONDS_EACH) -> Hardware:
    """Measure this machine in a few seconds.

    Args:
        out: YAML file to write, which `load_hardware` reads.
        seconds_each: spent on each of the figures.
    """
    rates: dict[Arithmetic, Callable[[], object]] = {
        "float32": _matmul(torch.float32),
        "bf16": _matmul(torch.bfloat16),
        "int8": _int8_matmul(),
    }
    operations = 2 * MATMUL_SIZE**3
    stream = torch.ones(STREAM_BYTES // 4)
    threads = torch.get_num_threads()
    measured = Hardware(
        name=f"{Environment.capture().cpu}, {threads} thread{'s' if threads > 1 else ''}",
        source=f"measured with torch {torch.__version__}: a sum of {STREAM_BYTES} bytes, {MATMUL_SIZE}^3 products",
        bandwidth_gb_per_s=round(STREAM_BYTES / _best_seconds(stream.sum, seconds_each) / GIGA, 2),
        memory_gb=round(psutil.virtual_memory().total / GIGA, 2),
        tera_ops_per_s={
            name: round(operations / _best_seconds(call, seconds_each) / TERA, 4) for name, call in rates.items()
        },
        stays_packed=True,
        note=NOTE,
    )
    if out is not None:
        write_text_atomic(out, yaml.safe_dump(to_plain(measured), sort_keys=False, width=120))
    return measured


def _matmul(dtype: torch.dtype) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator).to(dtype)
    return lambda: a @ a


def _int8_matmul() -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (MATMUL_SIZE, MATMUL_SIZE), generator=generator, dtype=torch.int8)
    return lambda: torch._int_mm(a, a)  # pyright: ignore[reportPrivateUsage]


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    call()
    best = float("inf")
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
