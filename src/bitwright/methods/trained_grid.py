"""Integer grids under training: a weight goes through the very arithmetic of `Grid.quantize` and `Grid.dequantize`.

Where that is not differentiable (rounding to codes, storing scales and zero points) gradients pass straight through;
clipping stops them. So the codes that come out stand, bit for bit, for the weights that were trained with. Gradients of
scales are then those of LSQ (arXiv:1902.08153), without its factor.

Legend: O out features, I in features, R rows of scales, G groups per row, n weights per group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE, IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scales import FloatScale
from bitwright.numerics.ste import straight_through


class TrainedGrid:
    """The grid of one weight, for the loop of a method to move.

    Attributes:
        start: where training starts.
        format: integers.
        scale: [R, G] float32, of the start.
        zero_point: [R, G] float32, of the start; None when symmetric.
        fixed_scale: scales are stored in a way that only a search can respect (powers of two), and stay what they are.
    """

    def __init__(self, grid: AnyGrid, num_rows: int) -> None:
        if not isinstance(grid, Grid) or not isinstance(grid.format, IntegerFormat):
            raise RecipeError(f"{grid.format.name}: only integer grids can be trained. Use gptq or rtn.")
        self.start, self.format, self.num_rows = grid, grid.format, num_rows
        self.scale = grid.scale.float()
        self.zero_point = None if grid.zero_point is None else grid.zero_point.float()
        self.fixed_scale = grid.stored is not None

    def split(self, weight: Tensor) -> Tensor:
        """Arrange a weight [O, I] by groups: [R, G, n]."""
        return self.start.granularity.split(weight)

    def join(self, groups: Tensor) -> Tensor:
        """Undo `split`."""
        return self.start.granularity.join(groups, self.num_rows, self.start.in_features)

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Round scales [R, G] to what is stored; float32."""
        stored = FloatScale(self.start.scale.dtype)
        return straight_through(scale, lambda step: stored.round(step).float())

    def stored_zero(self, zero_point: Tensor) -> Tensor:
        """Round zero points [R, G] to what is stored, inside the code range; float32."""
        inside = zero_point.clamp(self.format.qmin, self.format.qmax)
        if self.format.float_zero:
            return straight_through(inside, lambda zero: zero.to(FLOAT_ZERO_DTYPE).float())
        return straight_through(inside, torch.round)

    def codes(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the codes, as floats, of weights in units of their scale [R, G, n]."""
        if zero_point is None:
            codes = straight_through(scaled, torch.round)
        elif self.format.float_zero:
            codes = straight_through(scaled + zero_point.unsqueeze(-1), torch.round)
        else:
            codes = straight_through(scaled, torch.round) + zero_point.unsqueeze(-1)
        return codes.clamp(self.format.qmin, self.format.qmax)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the weight [O, I] that codes [R, G, n] stand for."""
        centred = codes if zero_point is None else codes - zero_point.unsqueeze(-1)
        return self.join(centred * scale.unsqueeze(-1))

    def result(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> QTensor:
        """Return codes [R, G, n] as a quantized weight on a grid of the kind of the start."""
        start = self.start
        zero = None if zero_point is None or start.zero_point is None else zero_point.to(start.zero_point.dtype)
        kept = start.scale if self.fixed_scale else scale.to(start.scale.dtype)
        grid = replace(start, scale=kept, zero_point=zero)
        return QTensor(codes=self.join(codes).to(self.format.code_dtype).contiguous(), grid=grid)
