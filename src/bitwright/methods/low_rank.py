"""Low-rank compensation: a thin product B A beside the codes, which gives back the most that r directions can.

Rounding leaves an error E = W - Ŵ that r (O + I) more numbers cannot hold, but outputs do not need all of it: inputs
move along few directions, and what these make of E is worth the most. The nearest B A in the norm of the calibrated
inputs is known in closed form (see `numerics.low_rank`).

Shapes: O out features, I in features, r rank.
"""

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.low_rank import LowRank, nearest_low_rank, output_error

LOW_RANK = "low_rank"
"""The name of the repair."""


def low_rank_addend(
    weight: Tensor, coded: Tensor, rank: int, *, moments: Tensor | None, dtype: torch.dtype
) -> LowRank | None:
    """Return what to add to a quantized weight; None where its rounding would take what it gives.

    Both factors are computed first and rounded then. Solving for A again once B is rounded would leave the rounding of
    A all the same, and both together are a few millionths of what the addend takes.

    Args:
        weight: [O, I], what the layer should compute with; not modified.
        coded: [O, I], what it computes with now.
        rank: r; at least 1. As many as the smaller side of the weight leave nothing but rounding.
        moments: E[x xᵀ] [I, I] or E[x²] [I] of the inputs, or a multiple; None weighs all columns alike.
        dtype: that the checkpoint stores the factors in.
    Raises:
        RecipeError: no rank.
        ShapeError: shapes that do not belong to one weight.
        VerificationError: NaN or Inf.
    Reference:
        arXiv:2410.06040 (QERA-exact); arXiv:2402.02446 (LQER) for diagonal moments. Differs: weights are quantized
        before, by any method, and not again afterwards (as CALDERA, arXiv:2405.18886, does in turns).
    """
    if rank < 1:
        raise RecipeError(f"low_rank: rank {rank} adds nothing. Give at least 1, or leave low_rank out.")
    if coded.shape != weight.shape:
        raise ShapeError(f"low_rank: weight {list(weight.shape)} and coded {list(coded.shape)} must be alike.")
    error = weight.to(wide_dtype(weight.device)) - coded
    found = nearest_low_rank(error, rank, moments=moments).to(dtype)
    left = error - found.product()
    return found if output_error(left, moments) < output_error(error, moments) else None
