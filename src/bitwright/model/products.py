"""While active, products of chosen weights run on codes instead of floats, whatever module asks for them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.kernels.reference import linear
from bitwright.model.sites import StorageKey, storage_key
from bitwright.numerics.inputs import QuantizedSite


class QuantizedProducts(TorchFunctionMode):
    """Replaces `functional.linear(x, weight)` for weights known by their memory.

    Args:
        products: memory of a weight [O, I] -> what quantization makes of its site.
    """

    def __init__(self, products: Mapping[StorageKey, QuantizedSite]) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            weight = given["weight"]
            site = self._products.get(storage_key(weight)) if isinstance(weight, Tensor) else None
            if site is not None:
                return linear(given["input"], site, given.get("bias"))
        return func(*args, **kwargs)
