"""Second moments and the factor that column-wise solvers need. Legend: I in features, T tokens."""

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, SingularHessian

DAMP_STEP = 0.01
MAX_DAMP = 0.25

# Columns worked on at once where a matrix is triangular or symmetric: wide enough for a fast matrix product, narrow
# enough to skip nearly all of the other triangle.
STRIPE = 256
# Of a narrow Gram matrix the other triangle is a larger part.
MIN_STRIPE = 64


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest float dtype of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products of bfloat16, which are a few times as fast as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool({"avx512_bf16", "amx_bf16"} & {name for name, has in torch.cpu.get_capabilities().items() if has})
    return device.type == "xpu"


def accumulate_gram(gram: Tensor, x: Tensor) -> None:
    """Add xᵀx to the Gram matrix in place, exactly symmetric: the upper triangle is computed, the lower one copied.

    The product runs in float32 (float64 for float64 inputs); sums over calls keep the precision of `gram`, so that the
    split into batches only moves the result within float32 rounding.

    Args:
        gram: [I, I], symmetric; float64 where the device has it (`wide_dtype`).
        x: [T, I], any float dtype.
    Raises:
        ShapeError: x has not I columns.
    """
    if x.ndim != 2 or gram.shape != (x.shape[1], x.shape[1]):
        raise ShapeError(
            f"gram: inputs {list(x.shape)} do not fit a Gram matrix {list(gram.shape)}; flatten to [T, I]."
        )
    x = x if x.dtype == torch.float64 else x.float()
    stripe = min(max(x.shape[1] // 8, MIN_STRIPE), STRIPE)
    for start in range(0, x.shape[1], stripe):
        end = min(start + stripe, x.shape[1])
        product = x[:, start:end].T @ x[:, start:]
        square = product[:, : end - start]
        # BLAS may compute the two triangles in different orders; a + b = b + a restores exact symmetry.
        square.copy_((square + square.T).mul_(0.5))
        gram[start:end, start:] += product
        gram[end:, start:end] = gram[start:end, end:].T


def dead_columns(hessian: Tensor) -> Tensor:
    """Return a bool mask [I] of the inputs that were never anything but 0: H_ii == 0."""
    return torch.diagonal(hessian) == 0


def damped_inverse_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Return the upper triangular U with UᵀU = (H + λI)⁻¹, λ as small as the factorisation allows.

    λ starts at `damp` times the mean diagonal and grows in steps of 1 % of it up to 25 % (or `damp`, if larger).

    Let J reverse the order of rows or columns. From J(H + λI)J = L Lᵀ follows H + λI = R Rᵀ with R = J L J upper
    triangular, hence U = R⁻¹: one factorisation and one triangular inverse, where the textbook route inverts H and then
    factors the inverse.

    Args:
        hessian: [I, I], symmetric PSD, not modified; give dead columns the mean of the other diagonal entries first.
        damp: fraction of the mean diagonal; >= 0.
    Returns:
        [I, I] in the dtype of `hessian`; computed in float64 where the device has it.
    Raises:
        RecipeError: damp is negative.
        ShapeError: the matrix is not square.
        SingularHessian: NaN or Inf, or no factor even with the largest λ.
    Reference:
        GPTQ, arXiv:2210.17323, section 3.3 step 3. Differs: the damping grows until the factor exists.
    """
    if damp < 0:
        raise RecipeError(f"damp must be at least 0, not {damp}.")
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ShapeError(f"hessian: {list(hessian.shape)} is not square.")
    dtype = wide_dtype(hessian.device)
    mean = torch.diagonal(hessian).to(dtype).mean()
    num_steps = max(0, round((MAX_DAMP - damp) / DAMP_STEP))
    fraction = damp
    for step in range(num_steps + 1):
        fraction = damp + step * DAMP_STEP
        upper = _inverse_factor(hessian, fraction * mean, dtype)
        if upper is not None:
            return upper.to(hessian.dtype)
    raise SingularHessian(
        f"hessian of {hessian.shape[0]} columns: no Cholesky factor up to damp {fraction:.2f}. It holds NaN or Inf, or "
        "is not positive semidefinite; check the calibration inputs of this site."
    )


def _inverse_factor(hessian: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor | None:
    reversed_hessian = hessian.to(dtype).flip(0, 1)
    reversed_hessian.diagonal().add_(added)
    lower, info = torch.linalg.cholesky_ex(reversed_hessian)
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        return None
    del reversed_hessian
    upper = _reversed_inverse(lower)
    return upper if bool(torch.isfinite(upper).all()) else None


def _reversed_inverse(lower: Tensor) -> Tensor:
    """Return J L⁻¹ J. A column of L⁻¹ is 0 above its own row: leaving that out takes a third of the time."""
    size = lower.shape[0]
    result = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    for start in range(0, size, STRIPE):
        end = min(start + STRIPE, size)
        unit = torch.zeros(size - start, end - start, dtype=lower.dtype, device=lower.device)
        unit.fill_diagonal_(1.0)
        columns = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
        result[: size - start, size - end : size - start] = columns.flip(0, 1)
    return result
