"""A linear layer whose weight stays packed in memory, as the checkpoint stores it.

Each call decodes the weight, multiplies, and forgets it: memory is what the file takes, and one dense weight at a time.
What the product means, with inputs quantized or not, is `kernels.reference`; a faster kernel may replace it, never
change it.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bitwright.kernels.reference import linear
from bitwright.model.layouts import own
from bitwright.numerics.inputs import QuantizedSite
from bitwright.schemes import Scheme


class QuantizedLinear(nn.Module):
    """`nn.Linear` on codes; its buffers have the names and the bits of a checkpoint in bitwright's own layout.

    Args:
        scheme: with the granularity that was really used.
        out_features: O.
        in_features: I.
        stored: tensors as `own.encode` and `own.guard` make them, by their names inside the module; on the meta device
            where a loader is to put those of a checkpoint into their place. `own.check_stored` finds wrong ones.
        bias: [O]; None for none.
    """

    def __init__(
        self, scheme: Scheme, out_features: int, in_features: int, stored: Mapping[str, Tensor], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.scheme, self.out_features, self.in_features = scheme, out_features, in_features
        self._names = tuple(stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.get_buffer(own.GUARD).dtype

    def stored(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores of the weight, by the names inside the module."""
        return {name: self.get_buffer(name) for name in self._names}

    def site(self) -> QuantizedSite:
        """Return the weight and what happens to the inputs."""
        # The shape is known here; reading it from a device would make the call wait.
        shape = torch.tensor((self.out_features, self.in_features), device="cpu")
        return own.decode(self.scheme, {**self.stored(), "weight_shape": shape})

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., O] with inputs [..., I], in their dtype."""
        return linear(x, self.site(), self.bias)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return the dense layer; inputs are no longer quantized there.

        Args:
            dtype: of weight and bias; the model's by default.
        """
        dtype = self.dtype if dtype is None else dtype
        site = self.site()
        bias = self.bias if site.correction is None else site.correction + (0 if self.bias is None else self.bias)
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(site.dense(dtype))
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(dtype))
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move to another device, but keep every stored number: `.to(dtype)` must not round scales."""
        before = self.stored()
        super()._apply(fn, recurse)
        for name, found in self.stored().items():
            if found.dtype != before[name].dtype and name != own.GUARD:
                setattr(self, name, before[name].to(found.device))
        return self

    def extra_repr(self) -> str:
        """As `nn.Linear`, and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )
