"""The scale of binary and ternary weights as range methods: a level to place instead of a range to cover.

Each method reads the weights of a scale, piece by piece, and answers with the scale as it will be stored. The rules
themselves are in `ternary`. The optimal ones are optimal before the scale is rounded for storage. Floats round finely
enough; where a scale format lists factors to try, as powers of two do, the best of the stored scales is measured.

Legend: R rows of scales, G groups per row.
"""

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics import ternary
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.range_samples import Samples
from bitwright.numerics.scales import BoundScale

BINARY, TERNARY = 2, 3


def absmean(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, None]:
    """Place the levels at the mean magnitude; ignores the importance. See `ternary.absmean`.

    Raises:
        RecipeError: the format has neither two nor three levels.
    """
    _check_levels(format, (BINARY, TERNARY), "absmean")
    return _stored(ternary.absmean(samples.pieces, samples.counts), format, bound), None


def twn(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, None]:
    """Place the levels at the mean magnitude above 0.7 mean|w|; ignores the importance. See `ternary.twn`.

    Raises:
        RecipeError: the format is not ternary.
    """
    _check_levels(format, (TERNARY,), "twn")
    return _stored(ternary.twn(samples.pieces, samples.counts), format, bound), None


def optimal_ternary(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, None]:
    """Place the levels where the (importance-weighted) squared error is least. See `ternary.optimal_ternary`.

    Raises:
        RecipeError: the format is not ternary.
    """
    _check_levels(format, (TERNARY,), "optimal-ternary")
    step = ternary.optimal_ternary(samples.pieces, _importance(samples))
    return _best_stored(step, samples, format, bound), None


def optimal_binary(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, None]:
    """Place the levels where the (importance-weighted) squared error is least. See `ternary.optimal_binary`.

    Raises:
        RecipeError: the format is not binary.
    """
    _check_levels(format, (BINARY,), "optimal-binary")
    step = ternary.optimal_binary(samples.pieces, samples.counts, _importance(samples))
    return _best_stored(step, samples, format, bound), None


def _check_levels(format: LevelFormat, allowed: tuple[int, ...], method: str) -> None:
    fits = format.symmetric and format.num_codes in allowed and format.min_value == -1 and format.max_value == 1
    if not fits:
        kinds = " or ".join({BINARY: "binary", TERNARY: "ternary"}[number] for number in allowed)
        raise RecipeError(f"{method}: places {kinds} levels and cannot fit {format.name}. Use the range method mse.")


def _importance(samples: Samples) -> Tensor | None:
    root = samples.root_importance
    return None if root is None else root.to(wide_dtype(root.device)).square()


def _stored(step: Tensor, format: LevelFormat, bound: BoundScale) -> Tensor:
    """Round to storage. Only the smallest scale brings binary weights of a group of zeros close to 0."""
    if format.num_codes == BINARY:
        step = torch.where(step == 0, torch.full_like(step, torch.finfo(torch.float32).tiny), step)
    return bound.round(step)


def _best_stored(step: Tensor, samples: Samples, format: LevelFormat, bound: BoundScale) -> Tensor:
    best = _stored(step, format, bound)
    if bound.factors is None:
        return best
    best_error = samples.squared_error(format, best, None)
    for factor in bound.factors:
        scale = _stored(step * factor, format, bound)
        error = samples.squared_error(format, scale, None)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(best_error, error)
    return best
