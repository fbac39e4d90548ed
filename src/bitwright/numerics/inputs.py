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
from bitwright.numerics.hadamard import hadamard
from bitwright.numerics.low_rank import LowRank
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
class InputTransform:
    """An invertible change of the inputs of one site, computed at inference; its weight holds the inverse.

    Inputs x become (x / scale) H, weights W become (W · scale) H, and their product stays what it was, H being
    orthogonal.

    Args:
        scale: [I] > 0, by which inputs are divided; None for none.
        hadamard: size of the blocks of a Hadamard rotation; divides I; None for none.
    """

    scale: Tensor | None = None
    hadamard: int | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return what the quantizer sees of inputs [..., I], in their dtype."""
        if self.scale is not None:
            x = (x / self.scale).to(x.dtype)
        return x if self.hadamard is None else hadamard(x, block=self.hadamard)

    def to_weight(self, weight: Tensor) -> Tensor:
        """Return the weight [O, I] for transformed inputs."""
        if self.scale is not None:
            weight = (weight * self.scale).to(weight.dtype)
        return weight if self.hadamard is None else hadamard(weight, block=self.hadamard)

    def from_weight(self, weight: Tensor) -> Tensor:
        """Undo `to_weight`."""
        if self.hadamard is not None:
            weight = hadamard(weight, block=self.hadamard, transpose=True)
        return weight if self.scale is None else (weight / self.scale).to(weight.dtype)

    def to(self, device: torch.device | str) -> "InputTransform":
        """Return the same transform on a device."""
        return self if self.scale is None else replace(self, scale=self.scale.to(device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FloatColumns:
    """Columns of a weight that stay floats, because their inputs are too large to be quantized with the others.

    Args:
        index: [k] int32, ascending; which columns.
        weight: [O, k] floats. The codes of these columns count for nothing.
    Reference:
        arXiv:2208.07339 (LLM.int8). Differs: the columns are found on calibration text, not per call.
    """

    index: Tensor
    weight: Tensor

    def rows(self, start: int, stop: int) -> "FloatColumns":
        """Return the part that belongs to rows start..stop."""
        return FloatColumns(index=self.index, weight=self.weight[start:stop])

    def put_into(self, dense: Tensor) -> Tensor:
        """Return the weight [O, I] with these columns in their place."""
        return dense.index_copy(1, self.index.long(), self.weight.to(dense.dtype))

    def to(self, device: torch.device | str) -> "FloatColumns":
        """Return the same columns on a device."""
        return FloatColumns(index=self.index.to(device), weight=self.weight.to(device))

    @property
    def num_bits(self) -> int:
        """Bits of the columns and their numbers."""
        return self.weight.numel() * self.weight.element_size() * 8 + self.index.numel() * 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedSite:
    """All that quantization makes of one site.

    Args:
        weight: codes [O, I]; of the transformed weight where inputs are transformed.
        inputs: how inputs become codes; None where they stay floats.
        transform: what happens to inputs before; None for nothing.
        columns: columns that stay floats; never beside a transform.
        low_rank: added to what the codes stand for; None for nothing.
        correction: [O] float32, added to the output; None for nothing.
    """

    weight: QTensor
    inputs: InputQuantizer | None = None
    transform: InputTransform | None = None
    columns: FloatColumns | None = None
    low_rank: LowRank | None = None
    correction: Tensor | None = None

    def coded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] that meets transformed inputs, but for the columns that stay floats."""
        if self.low_rank is None:
            return self.weight.dequantize(dtype)
        return (self.weight.dequantize() + self.low_rank.product()).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] for inputs as the model has them, without transform."""
        dense = self.coded(torch.float32 if self.transform is not None else dtype)
        if self.columns is not None:
            dense = self.columns.put_into(dense)
        return dense if self.transform is None else self.transform.from_weight(dense).to(dtype)

    @property
    def is_dense_equivalent(self) -> bool:
        """Whether the product with `dense()` is all that the site does."""
        return self.inputs is None and self.correction is None

    @property
    def num_bits_total(self) -> int:
        """Bits of all that is stored for the weight: codes, scales, tables, and what stays floats."""
        extra = sum(part.num_bits for part in (self.columns, self.low_rank) if part is not None)
        for tensor in (self.correction, None if self.transform is None else self.transform.scale):
            extra += 0 if tensor is None else 32 * tensor.numel()
        return self.weight.num_bits_total + extra

    def to(self, device: torch.device | str) -> "QuantizedSite":
        """Return the same site on a device."""
        return QuantizedSite(
            weight=self.weight.to(device),
            inputs=None if self.inputs is None else self.inputs.to(device),
            transform=None if self.transform is None else self.transform.to(device),
            columns=None if self.columns is None else self.columns.to(device),
            low_rank=None if self.low_rank is None else self.low_rank.to(device),
            correction=None if self.correction is None else self.correction.to(device),
        )


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
