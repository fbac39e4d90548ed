"""Bias correction: the mean of the error that quantization adds to a layer's output, given back through its bias.

Rounding leaves an error E = W - Ŵ, and inputs rarely have mean 0: so the output moves by E · E[x], the same for every
token. A bias costs O floats and takes that part away. What is left has mean 0 over the calibration tokens, and the
squared error of the output falls by exactly the square of what the bias corrects.

Shapes: O out features, I in features.
"""

import torch
from torch import Tensor

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.linalg import wide_dtype


def bias_correction(weight: Tensor, dense: Tensor, mean_input: Tensor) -> Tensor:
    """Return what to add to the bias, [O]: the expected output error E[(W - Ŵ) x] = (W - Ŵ) E[x].

    Args:
        weight: [O, I], what the layer computed with; not modified.
        dense: [O, I], what it computes with now: the dequantized weight, with every repair that it already has.
        mean_input: [I], E[x] over the calibration tokens, in units of the inputs. Of the inputs that the layer will
            see: behind a quantized prefix and, where inputs are quantized, of their quantized values; the error then
            lacks only W (E[x before] - E[x after]), which is the prefix's own to correct.
    Returns:
        [O] float32, in units of the output; computed in float64 where the device has it.
    Raises:
        ShapeError: shapes that do not belong to one weight.
        VerificationError: the result is not finite.
    Reference:
        Nagel et al., Data-Free Quantization, arXiv:1906.04721, section 4.2. Differs: E[x] is measured, not derived from
        batch normalisation.
    """
    if weight.ndim != 2 or dense.shape != weight.shape or mean_input.shape != weight.shape[1:]:
        raise ShapeError(
            f"bias_correction: weight {list(weight.shape)}, dense {list(dense.shape)} and mean input "
            f"{list(mean_input.shape)} do not belong together. Give [O, I], [O, I] and [I]."
        )
    wide = wide_dtype(weight.device)
    shift = (weight.to(wide) - dense.to(wide)) @ mean_input.to(device=weight.device, dtype=wide)
    correction = shift.float()
    if not bool(torch.isfinite(correction).all()):
        raise VerificationError(
            "bias_correction: the correction is not finite. Check weight and mean input for NaN and Inf."
        )
    return correction
