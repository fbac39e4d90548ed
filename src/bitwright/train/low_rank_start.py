"""Starting an adapter at the error of quantization instead of at zero.

An adapter that starts with B = 0 leaves a quantized model as bad as quantization made it. The best matrix of rank r
that can be added to the quantized weight Q is the truncated SVD of W - Q (Eckart and Young), and the error of the
outputs is least for that of (W - Q) R^½, with R the second moments of the inputs, multiplied by R^-½ again.

Legend: O out features, I in features, r rank.

Reference: arXiv:2310.08659 (LoftQ), with one round of its alternation; arXiv:2410.06040 (QERA), theorems 1 and 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import ShapeError
from bitwright.numerics.linalg import wide_dtype
from bitwright.train.lora import LoraLinear

_SMALLEST_MOMENT = 1e-8
"""Relative to the largest; inputs that were never seen must not divide by 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LowRank:
    """B A with as many directions as there were to be had, at most r; both halves of the same size.

    Attributes:
        a: [k, I] float32.
        b: [O, k] float32.
    """

    a: Tensor
    b: Tensor

    def product(self) -> Tensor:
        """Return B A [O, I]."""
        return self.b @ self.a


def low_rank_start(error: Tensor, rank: int, *, moments: Tensor | None = None) -> LowRank:
    """Return the B A of rank r nearest to an error [O, I].

    Args:
        error: W - Q, what quantization took from the weight.
        rank: r; at least 1. Directions without error are left out.
        moments: E[x xᵀ] [I, I] or E[x²] [I] of the inputs; None weighs all columns alike.
    Raises:
        ShapeError: moments of other inputs.
    """
    root, inverse = _roots(moments, error)
    left, values, right = torch.linalg.svd(_times(error.to(root.dtype), root), full_matrices=False)
    alive = int((values[:rank] > values[0] * torch.finfo(torch.float32).eps).sum())
    half = values[:alive].sqrt()
    return LowRank(a=_times(half[:, None] * right[:alive], inverse).float(), b=(left[:, :alive] * half).float())


def weighted_error(error: Tensor, moments: Tensor | None = None) -> float:
    """Return tr(E R Eᵀ), the squared error of the outputs per token; without moments the squared norm of E."""
    root, _ = _roots(moments, error)
    return float(_times(error.to(root.dtype), root).square().sum())


def start_at_error(adapter: LoraLinear, weight: Tensor, *, moments: Tensor | None = None) -> None:
    """Let an adapter start at what its quantized base lacks to the original weight.

    Directions in which nothing is lacking start as LoRA starts. Where the rounded start would be no better than none,
    as on a base without error, the adapter stays as it is.

    Args:
        adapter: around the quantized base; not merged.
        weight: [O, I], the original.
        moments: as `low_rank_start`.
    Raises:
        ShapeError: the weight of another layer.
    """
    base = adapter.base_weight().float()
    if weight.shape != base.shape:
        raise ShapeError(f"low-rank start: weight {list(weight.shape)} and base {list(base.shape)} must be alike.")
    error = weight.to(base.device).float() - base
    start, factor = low_rank_start(error, adapter.rank, moments=moments), math.sqrt(adapter.scaling)
    a, b = adapter.lora_a.detach().clone(), torch.zeros_like(adapter.lora_b)
    count = len(start.a)
    a[:count], b[:, :count] = (start.a / factor).to(a.dtype), (start.b / factor).to(b.dtype)
    left = error - adapter.scaling * (b.float() @ a.float())
    if weighted_error(left, moments) < weighted_error(error, moments):
        with torch.no_grad():
            adapter.lora_a.copy_(a)
            adapter.lora_b.copy_(b)


def _roots(moments: Tensor | None, error: Tensor) -> tuple[Tensor, Tensor]:
    """R^½ and R^-½ in the widest float: both [I], or both [I, I]."""
    wide, num_inputs = wide_dtype(error.device), error.shape[1]
    if moments is None:
        ones = torch.ones(num_inputs, dtype=wide, device=error.device)
        return ones, ones
    if tuple(moments.shape) not in ((num_inputs,), (num_inputs, num_inputs)):
        raise ShapeError(
            f"low-rank start: moments {list(moments.shape)} must be [{num_inputs}] or [{num_inputs}, {num_inputs}]."
        )
    moments = moments.to(error.device, wide)
    if moments.ndim == 1:
        root = _safe(moments).sqrt()
        return root, root.reciprocal()
    values, vectors = torch.linalg.eigh(moments)
    root = _safe(values).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _safe(values: Tensor) -> Tensor:
    largest = float(values.max())
    return values.clamp(min=_SMALLEST_MOMENT * largest) if largest > 0 else torch.ones_like(values)


def _times(matrix: Tensor, factor: Tensor) -> Tensor:
    return matrix * factor if factor.ndim == 1 else matrix @ factor
