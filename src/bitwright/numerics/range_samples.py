"""The weights that share scales, cut into parts that a search for scales can work on.

Legend: O out features, I in features, R rows of scales, G groups per row, n weights per group.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.linalg import wide_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Weights that share scales, in pieces small enough to work on.

    Args:
        pieces: each [R, G, n]; errors and ranges of the pieces combine (only a granularity that spans rows has
            several).
        root_importance: square root of the importance, [1 or R, G, n], 0 where a group is padded; may be longer than a
            piece; None when all weights count the same and nothing is padded.
        counts: [1 or R, G], weights per group; padding not counted.
    """

    pieces: list[Tensor]
    root_importance: Tensor | None
    counts: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (piece.float() for piece in self.pieces)

    def squared_error(self, format: LevelFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return Σ importance · (w - ŵ)² per group [R, G] in the widest float."""
        wide = wide_dtype(scale.device)
        # In units of the step every residual is of order 1, so that neither tiny nor huge weights leave float32.
        divisor, zero = scale.float().unsqueeze(-1), None if zero_point is None else zero_point.float().unsqueeze(-1)
        errors: list[Tensor] = []
        for groups in self:
            scaled = groups / divisor
            residual = format.snap(scaled, zero).sub_(scaled)
            if self.root_importance is not None:
                residual.mul_(self.root_importance[..., : groups.shape[-1]])
            errors.append(torch.linalg.vector_norm(residual, dim=-1).to(wide).square_())
        return sum(errors[1:], start=errors[0]).mul_(scale.to(wide).square())

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return smallest and largest weight per group, [R, G] each; 0 is always inside."""
        low = high = torch.zeros((), device=self.counts.device)
        for groups in self:
            lowest, highest = torch.aminmax(groups, dim=-1)
            low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        return low, high

    def upper_quantile(self, position: Tensor, sign: float) -> Tensor:
        """Return what is at a fractional position [G] from the top of max(sign · w, 0): [R, G]; padding comes last."""
        num_top = math.floor(position.max().item()) + 2
        top = self.pieces[0].new_empty((*self.pieces[0].shape[:-1], 0), dtype=torch.float32)
        for groups in self:
            values = torch.cat([top, (groups * sign).clamp_(min=0)], dim=-1)
            top = values.topk(min(num_top, values.shape[-1]), dim=-1).values
        last = top.shape[-1] - 1
        above = position.floor().long().clamp_(max=last).expand(top.shape[:-1]).unsqueeze(-1)
        fraction = (position - position.floor()).to(top.dtype).unsqueeze(-1)
        upper, lower = top.gather(-1, above), top.gather(-1, (above + 1).clamp_(max=last))
        return torch.lerp(upper, lower, fraction).squeeze(-1)


def samples_of(
    weight: Tensor, granularity: Granularity, root_importance: Tensor | None
) -> Iterator[tuple[slice, Samples]]:
    """Yield rows of scales and their weights, parts that can be fitted one after the other.

    Args:
        weight: [O, I].
        granularity: which weights share a scale.
        root_importance: [1, I]; None when all weights count the same.
    """
    chunks = list(granularity.row_chunks(weight))
    if granularity.spans_rows:
        rows = chunks[0].stop
        pieces = [granularity.split(weight[chunk]) for chunk in chunks]
        counts = _count(weight, granularity, weight.shape[0])
        yield slice(0, 1), Samples(pieces, _padded_root(weight, granularity, root_importance, rows), counts)
        return
    height = granularity.block_rows or 1
    for chunk in chunks:
        # Rows of one-row groups are alike, so that one row of weights stands for all of them.
        rows = chunk.stop - chunk.start if height > 1 else 1
        yield (
            granularity.scale_rows(chunk),
            Samples(
                [granularity.split(weight[chunk].float())],
                _padded_root(weight, granularity, root_importance, rows),
                _count(weight, granularity, rows),
            ),
        )


def _padded_root(
    weight: Tensor, granularity: Granularity, root_importance: Tensor | None, num_rows: int
) -> Tensor | None:
    """Importance arranged like the weights; 0 for padding, whose error (where 0 is not exact) must not count."""
    in_features = weight.shape[1]
    height = num_rows if granularity.spans_rows else granularity.block_rows or 1
    if root_importance is None:
        if in_features % granularity.columns_per_group(in_features) == 0 and num_rows % height == 0:
            return None
        root_importance = torch.ones(1, in_features, device=weight.device)
    return granularity.split(root_importance.expand(num_rows, -1))


def _count(weight: Tensor, granularity: Granularity, num_rows: int) -> Tensor:
    """Weights per group [1 or R, G]."""
    ones = torch.ones(1, weight.shape[1], device=weight.device)
    if granularity.spans_rows:
        return granularity.split(ones).sum(-1) * num_rows
    return granularity.split(ones.expand(num_rows, -1)).sum(-1)
