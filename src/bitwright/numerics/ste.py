"""Straight-through estimators: what is not differentiable (rounding, storing) runs forward and is ignored backward.

The forward value is that of the operation itself, bit for bit. The common trick `x + (f(x) - x).detach()` rounds once
more and may miss it by one digit; what was trained would then not be what is stored.

Reference: Bengio et al., arXiv:1308.3432.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the operation."""
        return operation(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pass the gradient on as if the operation had been the identity."""
        return gradient, None


def straight_through(x: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `operation(x)`, of the shape and dtype of x, whose gradient is taken to be that of x itself."""
    return cast(Tensor, _StraightThrough.apply(x, operation))  # pyright: ignore[reportUnknownMemberType]
