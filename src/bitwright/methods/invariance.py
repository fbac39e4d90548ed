"""Whether a block still computes what it did: its output with inputs changed as they will be at inference, unrounded.

Folding changes weights, and the block shows by itself what came of it. A change of inputs at inference (a scale, a
rotation, columns that stay floats) is only planned while a block is quantized; here the products are computed with it.
"""

from collections.abc import Iterable
from functools import partial

from torch import Tensor
from torch.nn import functional

from bitwright.methods.stage import BlockStage
from bitwright.model.products import Product, ReplacedProducts
from bitwright.model.proof import in_float32
from bitwright.model.sites import StorageKey, storage_key, weight_view
from bitwright.numerics.inputs import InputTransform


def output_of(stage: BlockStage, changed: Iterable[str] = ()) -> Tensor:
    """Return the block's output [B, T, D] on the probe's windows, in float32.

    Args:
        stage: whose block runs as it is now.
        changed: sites whose products are computed on inputs as the stage's transforms and float columns change them.
    """
    with in_float32(stage.block):
        products: dict[StorageKey, Product] = {}
        for name in changed:
            view = weight_view(stage.block, stage.sites[name], stage.name)
            transform = stage.input_transforms.get(name, InputTransform())
            products[storage_key(view)] = partial(
                _product, transform, transform.to_weight(view), stage.float_columns.get(name)
            )
        with ReplacedProducts(products):
            return stage.probe().float()


def _product(
    transform: InputTransform, weight: Tensor, columns: Tensor | None, x: Tensor, added: Tensor | None
) -> Tensor:
    x = transform.apply(x)
    if columns is None:
        return functional.linear(x, weight, added)
    index = columns.to(x.device)
    apart = functional.linear(x[..., index], weight[:, index])
    return functional.linear(x.index_fill(-1, index, 0.0), weight, added) + apart
