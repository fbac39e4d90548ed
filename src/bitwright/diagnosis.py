"""What `bitwright doctor` finds: versions, devices, and what is missing with the command that mends it."""

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

REQUIRED = (
    "bitwright",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "typer",
    "rich",
    "pydantic",
    "plotly",
    "jinja2",
)
OPTIONAL = {
    "compressed-tensors": "loading and verifying exports: pip install 'bitwright[compressed-tensors]'",
    "datasets": "hub data sets as text: pip install 'bitwright[data]'",
    "accelerate": "transformers' device_map for engines that need it: pip install accelerate",
}


def diagnose_installation() -> dict[str, Any]:
    """Return environment, installed packages and missing ones."""
    packages: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing[name] = OPTIONAL.get(name, f"required: pip install {name}")
    return {"environment": _environment(), "packages": packages, "missing": missing}


def _environment() -> dict[str, str]:
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} used by torch)",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available",
        "devices": ", ".join(["cpu", *_accelerators()]),
        "cpu features": torch.backends.cpu.get_cpu_capability(),
    }


def _accelerators() -> list[str]:
    found = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return [*found, "mps"] if torch.backends.mps.is_available() else found
