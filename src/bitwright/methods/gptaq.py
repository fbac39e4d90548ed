"""GPTAQ: GPTQ whose target is what the unquantized model computes, not what this layer makes of drifted inputs.

GPTQ sees the inputs X as they will be, and stays close to W X. But X has drifted from the X' of the unquantized model,
by the quantized prefix and by its own rounding where inputs are quantized, and what the layer should give is W X'.
Least squares have the answer before any rounding of weights: of all weights V, V X is closest to W X' for

    V = W + W (X' - X) Xᵀ (X Xᵀ + λI)⁻¹

and the objective is the same around V as GPTQ's is around W, so that GPTQ on V does the rest. What the prefix has done
is estimated from calibration text and does not carry over to other text in full: `asymmetry` takes a part of it.

Legend: O out features, I in features.
"""

from torch import Tensor

from bitwright.numerics.linalg import damped_inverse_cholesky, dead_columns, wide_dtype


def asymmetric_target(weight: Tensor, hessian: Tensor, drift: Tensor | None, *, damp: float) -> Tensor:
    """Return the weight [O, I] whose outputs on drifted inputs are closest to those of `weight` on undrifted ones.

    Minimises ‖V X - W X'‖² + λ ‖V - W‖² over V. It is linear in the drift: a part of the drift goes a part of the way.

    Args:
        weight: W, [O, I]; not modified.
        hessian: [I, I], (2/T) X Xᵀ.
        drift: [I, I], (2/T) (X' - X) Xᵀ; None returns the weight itself.
        damp: λ as in `gptq`.
    Raises:
        SingularHessian: no Cholesky factor even with the largest damping.
    Reference:
        arXiv:2504.02692 (GPTAQ). Differs: the correction is the closed form of the least squares problem, taken before
        the sweep, where the paper adds for each column what the columns after it can make up for.
    """
    if drift is None:
        return weight
    wide = wide_dtype(hessian.device)
    filled, dead = hessian.to(wide, copy=True), dead_columns(hessian)
    live = filled.diagonal()[~dead]
    # The drift of dead columns is zero as well, so that any stand-in for their diagonal leaves their weights alone.
    filled.diagonal()[dead] = live.mean() if live.numel() else 1.0
    factor = damped_inverse_cholesky(filled, damp)
    correction = ((weight.to(wide) @ drift.to(wide)) @ factor.T) @ factor
    return (weight.to(wide) + correction).to(weight.dtype)
