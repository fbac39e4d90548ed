"""The one exception tree. Every message says what is wrong, where, and what to do.

`exit_code` is what the command line returns: 2 for bad input, 1 for a result that failed verification or a quality
gate.
"""

import difflib
from collections.abc import Iterable


class BitwrightError(Exception):
    """Base of everything bitwright raises on purpose; the CLI prints it as one line."""

    exit_code = 2


class UnknownName(BitwrightError):
    """A name that no registry, scheme or option knows."""


class RecipeError(BitwrightError):
    """A recipe, scheme or option that contradicts itself or the model."""


class ShapeError(BitwrightError):
    """A tensor whose shape does not fit the requested scheme."""


class CheckpointError(BitwrightError):
    """A model directory that is missing, damaged, unsafe or unsupported."""


class DataError(BitwrightError):
    """Calibration or evaluation text that is empty, too short, or not disjoint."""


class StructureError(BitwrightError):
    """A model whose decoder blocks or weight sites cannot be found."""


class RunError(BitwrightError):
    """A run directory that is in use, belongs to another recipe, or is incomplete."""


class ResourceError(BitwrightError):
    """Not enough disk, memory or permission for the job."""


class MissingDependency(BitwrightError):
    """An optional package is needed and absent; the message names the extra to install."""


class VerificationError(BitwrightError):
    """The result differs from what was computed, is not finite, or lost more than the gate allows."""

    exit_code = 1


class SingularHessian(VerificationError):
    """A Hessian without Cholesky factor even after the largest damping step."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'? Known: a, b, x.` for an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(names)}."


class TrainingDiverged(VerificationError):
    """A loss, a gradient or what a quantizer is given is not finite; the last good checkpoint stays."""
