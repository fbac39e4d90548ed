"""bitwright: LLM compression with proof. `bitwright.quantize(...)` and its siblings mirror the command line."""

from typing import TYPE_CHECKING, Any

from bitwright import hook
from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from bitwright.pipeline import QuantizeResult, evaluate, export, inspect, quantize
    from bitwright.recipe import Calibration, Recipe, load_recipe
    from bitwright.reports.page import write_report as report
    from bitwright.schemes import Scheme

__version__ = "0.1.0"
__all__ = [
    "BitwrightError", "Calibration", "QuantizeResult", "Recipe", "Scheme", "__version__", "evaluate", "export",
    "inspect", "load_recipe", "quantize", "report",
]  # fmt: skip
_ORIGINS = {
    **dict.fromkeys(("QuantizeResult", "evaluate", "export", "inspect", "quantize"), "bitwright.pipeline"),
    **dict.fromkeys(("Calibration", "Recipe", "load_recipe"), "bitwright.recipe"),
    "Scheme": "bitwright.schemes",
    "report": "bitwright.reports.page",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is used."""
    if name not in _ORIGINS:
        raise AttributeError(f"module 'bitwright' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_ORIGINS[name]), "write_report" if name == "report" else name)


hook.install()
