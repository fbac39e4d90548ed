"""Starting an adapter at the error of quantization instead of at zero.

An adapter that starts with B = 0 leaves a quantized model as bad as quantization made it. The best matrix of rank r
that can be added to the quantized weight Q is the one nearest to W - Q (`numerics.low_rank`).

Legend: O out features, I in features, r rank.

Reference: arXiv:2310.08659 (LoftQ), with one round of its alternation; arXiv:2410.06040 (QERA).
"""

import math

import torch
from torch import Tensor

from bitwright.errors import ShapeError
from bitwright.numerics.low_rank import nearest_low_rank, output_error
from bitwright.train.lora import LoraLinear


def start_at_error(adapter: LoraLinear, weight: Tensor, *, moments: Tensor | None = None) -> None:
    """Let an adapter start at what its quantized base lacks to the original weight.

    Directions in which nothing is lacking start as LoRA starts. Where the rounded start would be no better than none,
    as on a base without error, the adapter stays as it is.

    Args:
        adapter: around the quantized base; not merged.
        weight: [O, I], the original.
        moments: as `nearest_low_rank`.
    Raises:
        ShapeError: the weight of another layer.
    """
    base = adapter.base_weight().float()
    if weight.shape != base.shape:
        raise ShapeError(f"low-rank start: weight {list(weight.shape)} and base {list(base.shape)} must be alike.")
    error = weight.to(base.device).float() - base
    start, factor = nearest_low_rank(error, adapter.rank, moments=moments), math.sqrt(adapter.scaling)
    a, b = adapter.lora_a.detach().clone(), torch.zeros_like(adapter.lora_b)
    a[: start.rank], b[:, : start.rank] = (start.a / factor).to(a.dtype), (start.b / factor).to(b.dtype)
    left = error - adapter.scaling * (b.float() @ a.float())
    if output_error(left, moments) < output_error(error, moments):
        with torch.no_grad():
            adapter.lora_a.copy_(a)
            adapter.lora_b.copy_(b)
