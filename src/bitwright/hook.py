"""`import bitwright` suffices to load quantized models with transformers, and still imports neither torch nor it.

The plug-in needs transformers' quantizers, which take seconds to import. So a finder waits in `sys.meta_path` for
whoever imports them, has the plug-in registered right after, and removes itself.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


class QuantizersFinder:
    """Finds transformers' quantizers as the other finders do, and registers the plug-in once they are there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec, with a loader that registers; None for every other module."""
        del path, target
        if fullname != QUANTIZERS:
            return None
        position = sys.meta_path.index(self)
        del sys.meta_path[position]
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(position, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            register()

        setattr(spec.loader, "exec_module", execute_and_register)
        return spec


def install() -> None:
    """Register the plug-in now if transformers' quantizers are there, otherwise as soon as they are."""
    if QUANTIZERS in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, QuantizersFinder())


def register() -> None:
    """Teach transformers to load bitwright's own layout."""
    from bitwright import transformers_plugin as _  # noqa: F401  importing registers
