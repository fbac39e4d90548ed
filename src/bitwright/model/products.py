"""While active, products of chosen weights are computed otherwise, as on codes, whatever module asks for them."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.errors import StructureError
from bitwright.kernels.reference import linear
from bitwright.model.sites import StorageKey, storage_key
from bitwright.numerics.inputs import QuantizedSite

# Functions that multiply activations by a weight, with the names of their arguments in order: those of the activations,
# of the weight and of what is added.
_ARGUMENTS: dict[Any, tuple[tuple[str, ...], str, str, str]] = {
    functional.linear: (("input", "weight", "bias"), "input", "weight", "bias"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (("input", "other"), "input", "other", "")),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), (("input", "mat2"), "input", "mat2", "")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), (("input", "mat1", "mat2"), "mat1", "mat2", "input")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), (("input", "batch1", "batch2"), "batch1", "batch2", "input")),
}


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(inputs [..., I], what is added to the product or None) -> outputs [..., O]."""


class ReplacedProducts(TorchFunctionMode):
    """Replaces products with weights known by their memory: those that `SiteCalls` sees, also stacks of experts.

    Args:
        products: memory of a weight, [O, I] or transposed -> what is computed instead.
    """

    def __init__(self, products: Mapping[StorageKey, Product]) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _ARGUMENTS:
            names, activations, weight, added = _ARGUMENTS[func]
            given = dict(zip(names, args, strict=False)) | kwargs
            x, matrix = given.get(activations), given.get(weight)
            if isinstance(x, Tensor) and isinstance(matrix, Tensor) and self._is_replaced(matrix):
                if (given.get("alpha", 1), given.get("beta", 1)) != (1, 1):
                    raise StructureError(
                        f"{func.__name__}: a scaled product of a quantized weight is not supported yet."
                    )
                return self._product(x, matrix, given.get(added))
        return func(*args, **kwargs)

    def _is_replaced(self, weight: Tensor) -> bool:
        return any(storage_key(each) in self._products for each in (weight if weight.ndim == 3 else [weight]))

    def _product(self, x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
        if weight.ndim < 3:
            return self._products[storage_key(weight)](x, added)
        experts: list[Tensor] = []
        for inputs, matrix in zip(x.expand(len(weight), -1, -1), weight, strict=True):
            product = self._products.get(storage_key(matrix))
            experts.append(inputs @ matrix if product is None else product(inputs, None))
        return torch.stack(experts) if added is None else torch.stack(experts) + added


class QuantizedProducts(ReplacedProducts):
    """Runs products on codes.

    Args:
        products: memory of a weight, [O, I] or transposed -> what quantization makes of its site.
    """

    def __init__(self, products: Mapping[StorageKey, QuantizedSite]) -> None:
        super().__init__({key: partial(_on_codes, site) for key, site in products.items()})


def _on_codes(site: QuantizedSite, x: Tensor, added: Tensor | None) -> Tensor:
    return linear(x, site, added)
