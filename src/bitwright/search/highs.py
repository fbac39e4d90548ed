"""HiGHS, by way of scipy: linear programs in 0/1 variables."""

import ctypes
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from bitwright.errors import RecipeError

_OPTIMAL, _INFEASIBLE = 0, 2
_STDOUT = 1


def minimise(cost: NDArray[np.float64], constraints: Sequence[LinearConstraint]) -> NDArray[np.float64] | None:
    """Return the 0/1 variables of least cost under the constraints; None if nothing keeps them.

    HiGHS holds constraints and costs to a millionth, so both should be of the size of 1.

    Raises:
        RecipeError: the solver gave up.
    """
    for presolve in (True, False):
        # Presolving rows that hold by a hair can fail inside HiGHS, which says `vector::reserve`.
        with _silenced(), suppress(ValueError):
            result = milp(
                cost,
                constraints=constraints,
                integrality=np.ones(len(cost)),
                bounds=Bounds(0.0, 1.0),
                options={"mip_rel_gap": 0.0, "presolve": presolve},
            )
            if result.status == _INFEASIBLE:
                return None
            if result.status == _OPTIMAL:
                return np.asarray(result.x, dtype=np.float64)
    raise RecipeError("the solver stopped without an answer. Loosen a limit a little, or give fewer items or choices.")


@contextmanager
def _silenced() -> Generator[None, None, None]:
    """Keep lines of the solver's own, printed past Python, out of the program's output, which may be JSON."""
    if os.name != "posix":
        yield
        return
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, _STDOUT)
        os.close(kept)
        os.close(nowhere)
