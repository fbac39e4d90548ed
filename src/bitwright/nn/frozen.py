"""The product with a packed weight that is not trained itself, but has something to train before it.

Autograd keeps what a product needs for its gradient: for the inputs that is the weight, and a packed layer that is
called as it is leaves one dense weight per call alive until backward. Here nothing is kept. The weight is decoded once
more in backward, so that at any time one dense weight exists, as in QLoRA.

Legend: T tokens, O out features, I in features.

Reference: arXiv:2305.14314 (QLoRA), section 3.
"""

from typing import Any, cast

import torch
from torch import Tensor

from bitwright.nn.linear import QuantizedLinear


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the layer."""
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decode the weight again and multiply."""
        weight = cast(QuantizedLinear, ctx.layer).site().dense(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None


def frozen_linear(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """Return `layer(x)` [..., O], bit for bit, with a gradient for the inputs [..., I] and for nothing else.

    The gradient is `dy @ W` with the weight that the codes stand for: exact where a scheme quantizes weights only.
    Where it quantizes inputs too, they count as if they had not been (straight-through).

    Raises:
        ShapeError: x has not I columns.
        VerificationError: NaN or Inf in inputs that become codes.
    """
    return cast(Tensor, _FrozenProduct.apply(x, layer))  # pyright: ignore[reportUnknownMemberType]
