"""Quantized inputs: how the activations [T, I] that enter a linear product become codes.

Dynamic scales are found from the inputs themselves, per token, per group of a token's channels, or per tensor. Static
scales were found on calibration text and are part of the checkpoint. NVFP4 is in between: a static level for the whole
tensor, dynamic FP8 scales below it.

Legend: T tokens, I in features, G groups of columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import FLOAT32, fit_grid
from bitwright.numerics.scales import ScaleFormat


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputQuantizer:
    """Turns inputs into codes.

    Args:
        format: the codes.
        granularity: which inputs share a scale; `tensor` or `columns` when static.
        scale: how scales found at run time are rounded.
        static: the calibrated grid; None where scales are found at run time.
    """

    format: LevelFormat
    granularity: Granularity
    scale: ScaleFormat = FLOAT32
    static: Grid | None = None

    def quantize(self, x: Tensor) -> QTensor:
        """Return codes [T, I] and their grid for inputs [T, I] of any float dtype.

        Raises:
            ShapeError: the inputs do not fit the calibrated grid.
            VerificationError: NaN or Inf in the inputs.
        """
        grid = self.static or fit_grid(x, self.format, self.granularity, method="minmax", scale=self.scale)
        return QTensor(codes=grid.quantize(x), grid=grid)

    def to(self, device: torch.device | str) -> "InputQuantizer":
        """Return the same quantizer on a device."""
        return self if self.static is None else replace(self, static=self.static.to(device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedSite:
    """All that quantization makes of one site: its weight, and what happens to its inputs (None: nothing)."""

    weight: QTensor
    inputs: InputQuantizer | None = None

    def to(self, device: torch.device | str) -> "QuantizedSite":
        """Return the same site on a device."""
        inputs = None if self.inputs is None else self.inputs.to(device)
        return QuantizedSite(weight=self.weight.to(device), inputs=inputs)


def static_grid(
    low: Tensor,
    high: Tensor,
    format: LevelFormat,
    granularity: Granularity,
    in_features: int,
    *,
    scale: ScaleFormat = FLOAT32,
) -> Grid:
    """Return the grid of a calibrated range.

    Args:
        low: [G] smallest input to represent, <= 0.
        high: [G] largest input to represent, >= 0.
        format: the codes.
        granularity: `tensor` (G = 1) or `columns`.
        in_features: I.
        scale: how the checkpoint will store the scale.
    Raises:
        RecipeError: another granularity.
        ShapeError: low or high is not [G].
    """
    if not granularity.spans_rows:
        raise RecipeError(f"a static scale cannot be per {granularity.kind}, which only a call knows.")
    expected = (granularity.num_groups(in_features),)
    if low.shape != expected or high.shape != expected:
        raise ShapeError(f"static scale: ends {list(low.shape)} and {list(high.shape)} must be {list(expected)}.")
    # The two ends of each range, spread over a group's columns, are a matrix whose min-max grid is the one wanted.
    width = granularity.columns_per_group(in_features)
    ends = torch.stack([low, high]).float().repeat_interleave(width, dim=1)[:, :in_features]
    return fit_grid(ends, format, granularity, method="minmax", scale=scale)
