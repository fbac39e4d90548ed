"""A matrix of low rank beside a quantized weight: the best that r directions of the output can give back.

Let E [O, I] be what quantization took from a weight, and R = E[x xᵀ] the second moments of its inputs. Then tr(E R Eᵀ)
is the squared error of the outputs per token, and of all matrices of rank r the nearest in it is

    U Uᵀ E        U [O, r]: the eigenvectors of E R Eᵀ with the r largest eigenvalues

This is the textbook's truncated SVD of E R^½, multiplied by R^-½ (U are its left singular vectors, and R^½ R^-½ goes
away), without a root or an inverse: inputs that were never seen do no harm. And U Uᵀ is a projection, so that what is
left, (1 - U Uᵀ) E x, is at most E x for every input x, calibrated or not.

Legend: O out features, I in features, r rank, k directions that were really found, at most r.

Reference: Eckart and Young for R = 1; arXiv:2410.06040 (QERA), theorems 1 and 2, for diagonal and full R.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.linalg import wide_dtype

_SMALLEST_MOMENT = 1e-8
"""Added to all moments, relative to the largest: where inputs tell nothing, the size of the error decides."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LowRank:
    """B A, to be added to a weight [O, I].

    Args:
        a: [k, I] floats.
        b: [O, k] floats.
    """

    a: Tensor
    b: Tensor

    def product(self) -> Tensor:
        """Return B A [O, I], computed in float32."""
        return self.b.float() @ self.a.float()

    def apply(self, x: Tensor) -> Tensor:
        """Return what is added to the output [T, O], float32, of inputs [T, I]."""
        return (x.float() @ self.a.float().T) @ self.b.float().T

    def to(self, target: torch.device | str | torch.dtype) -> "LowRank":
        """Return the same on a device, or rounded to a dtype."""
        return LowRank(a=self.a.to(target), b=self.b.to(target))

    @property
    def rank(self) -> int:
        """k, the number of directions."""
        return self.a.shape[0]

    @property
    def num_bits(self) -> int:
        """Bits of both factors."""
        return 8 * (self.a.numel() * self.a.element_size() + self.b.numel() * self.b.element_size())


def factor_shapes(rank: int, out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B: no weight has more directions than its smaller side."""
    count = min(rank, out_features, in_features)
    return (count, in_features), (out_features, count)


def nearest_low_rank(error: Tensor, rank: int, *, moments: Tensor | None = None) -> LowRank:
    """Return the B A of rank r that takes the most of an error [O, I].

    Args:
        error: W - Q, what quantization took from the weight.
        rank: r; at least 1. Directions without error are left out.
        moments: E[x xᵀ] [I, I] or E[x²] [I] of the inputs, or a multiple; None weighs all columns alike.
    Returns:
        float32; each direction's row of A has the same largest magnitude as its column of B, which suits small floats.
    Raises:
        ShapeError: moments of other inputs.
        VerificationError: NaN or Inf.
    """
    core, basis = error.to(wide_dtype(error.device)), None
    if error.shape[0] > error.shape[1]:  # E = basis · core, and eigenvectors of a smaller matrix are enough
        basis, core = torch.linalg.qr(core)
    energy = _times_moments(core, moments) @ core.T
    if not bool(torch.isfinite(energy).all()):
        raise VerificationError("low rank: the error or the moments hold NaN or Inf. Check weight and inputs for them.")
    values, vectors = torch.linalg.eigh((energy + energy.T) / 2)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    alive = values > values[0] * torch.finfo(values.dtype).eps * len(energy)
    directions = vectors[:, alive]
    a, b = directions.T @ core, directions if basis is None else basis @ directions
    balance = (a.abs().amax(dim=1) / b.abs().amax(dim=0)).sqrt()
    return LowRank(a=(a / balance[:, None]).float().contiguous(), b=(b * balance).float().contiguous())


def output_error(error: Tensor, moments: Tensor | None = None) -> float:
    """Return tr(E R Eᵀ), the squared error of the outputs per token; without moments the squared norm of E.

    Raises:
        ShapeError: moments of other inputs.
    """
    wide = error.to(wide_dtype(error.device))
    return float((_times_moments(wide, moments) * wide).sum())


def _times_moments(error: Tensor, moments: Tensor | None) -> Tensor:
    """E R, with a little added to R that counts only where R says nothing; without any moments E."""
    num_inputs = error.shape[1]
    if moments is None:
        return error
    if tuple(moments.shape) not in ((num_inputs,), (num_inputs, num_inputs)):
        raise ShapeError(
            f"low rank: moments {list(moments.shape)} must be [{num_inputs}] or [{num_inputs}, {num_inputs}]."
        )
    moments = moments.to(error.device, error.dtype)
    largest = (moments if moments.ndim == 1 else moments.diagonal()).max()
    floor = torch.where(largest > 0, _SMALLEST_MOMENT * largest, torch.ones_like(largest))
    return (error * moments if moments.ndim == 1 else error @ moments) + floor * error
