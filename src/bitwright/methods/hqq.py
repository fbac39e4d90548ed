"""Half-quadratic quantization (HQQ): better zero points in seconds, without any data.

Least squares lets a few outliers of a group pull its zero point away from all the others. HQQ minimises

    Σ |w - ŵ|^p,  p < 1

instead, which forgives large errors and rewards small ones. The problem is split by an auxiliary error e:

    min over z, e of  Σ |e|^p + β/2 (e - r)²,   r = w - ŵ(z)

With z fixed, e is r shrunk towards 0: sign(r) max(|r| - |r|^(p-1) / β, 0). With e fixed and the codes q kept, z is in
closed form the mean of q - (w - e) / s. Both steps alternate while β grows.

Written with r in units of the step s, the second step reads z <- z - mean(r - e), and r - e is sign(r) min(|r|,
|r|^(p-1) / β): the mean of the residuals, of which one beyond β^(1/(p-2)) steps counts the less the larger it is. A
symmetric grid has no zero point; there the same residuals move the scale, s <- <q, w - e> / <q, q>.

Alternating minimises the split problem and may raise the sum above. So every iterate is measured and each group keeps
its best; what is stored of it is measured again and taken only where it is better than the start: no group ends worse.

Shapes: O out features, I in features, R rows of scales, G groups, n weights per group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.formats import has_float_zero
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE, IntegerFormat
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scales import FloatScale


def hqq(
    weight: Tensor, grid: AnyGrid, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20
) -> QTensor:
    """Move zero points (of symmetric grids: scales) to lower Σ |w - ŵ|^p in each group, then round to nearest.

    Args:
        weight: [O, I] floats; not modified.
        grid: where to start, with float scales. Integer zero points move as floats; then both neighbours are tried.
        p: of the norm, in (0, 1].
        beta: first weight of the coupling, > 0, of residuals in units of the step. Small: least squares; large: hardly
            a move.
        kappa: factor on beta per iteration, >= 1.
        iterations: at most; ends before where no group improves.
    Returns:
        Codes on a grid of the same kind whose objective is no worse in any group.
    Raises:
        RecipeError: an option out of range, or a grid without scales that may move: codebooks, quantized scales.
        ShapeError: the weight does not fit the grid.
        VerificationError: NaN or Inf in the weight.
    Reference:
        Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023. Differs: residuals in units
        of the step, so that the unit of the weights does not matter (in theirs, with weights far below 1, beta = 10
        shrinks nearly every e to 0, which is least squares); the objective is the l_p sum and not the mean absolute
        error, and it decides for each group and not for the whole weight.
    """
    for name, value, holds in (
        ("p", p, 0 < p <= 1), ("beta", beta, beta > 0), ("kappa", kappa, kappa >= 1),
        ("iterations", iterations, iterations >= 0),
    ):  # fmt: skip
        if not holds:
            raise RecipeError(
                f"hqq: {name} {value} is out of range. Published are p 0.7, beta 10, kappa 1.01, iterations 20."
            )
    if not isinstance(grid, Grid) or not isinstance(grid.format, IntegerFormat) or grid.stored is not None:
        raise RecipeError(
            f"hqq: moves the zero points or float scales of integers, which a grid of {grid.format.name} lacks or "
            "stores in another way. Use rtn or gptq."
        )
    grid.quantize(weight)  # Refuses weights that do not fit or are not finite.
    iterate = _alternate(weight, _Point.of(grid), p, beta, kappa, iterations)
    best, best_error = grid, _measure(weight, _Point.of(grid), p, beta)[0]
    for candidate in _stored(iterate, grid):
        error, _ = _measure(weight, _Point.of(candidate), p, beta)
        better = error < best_error
        best, best_error = _choose(better, candidate, best), torch.where(better, error, best_error)
    return QTensor(codes=best.quantize(weight), grid=best)


@dataclass(frozen=True, slots=True)
class _Point:
    """Scales and zero points [R, G] as float32: a grid as it is, or an iterate that no grid could store."""

    format: IntegerFormat
    granularity: Granularity
    scale: Tensor
    zero_point: Tensor | None

    @staticmethod
    def of(grid: Grid) -> "_Point":
        assert isinstance(grid.format, IntegerFormat)
        zero_point = None if grid.zero_point is None else grid.zero_point.float()
        return _Point(grid.format, grid.granularity, grid.scale.float(), zero_point)

    def moved(self, by: Tensor) -> "_Point":
        """Move zero points by so many steps, or scales by such a fraction; not where the result is not finite."""
        if self.zero_point is None:
            scale = (self.scale * (1 + by)).float()
            return replace(self, scale=torch.where(torch.isfinite(scale) & (scale != 0), scale, self.scale))
        zero_point = (self.zero_point - by).float()
        return replace(self, zero_point=torch.where(torch.isfinite(zero_point), zero_point, self.zero_point))


def _alternate(weight: Tensor, start: _Point, p: float, beta: float, kappa: float, iterations: int) -> _Point:
    """Return the best of each group among the start and all iterates."""
    if start.zero_point is not None:
        start = replace(start, format=replace(start.format, float_zero=True))
    best = current = start
    best_error, by = _measure(weight, start, p, beta)
    for _ in range(iterations):
        current, beta = current.moved(by), beta * kappa
        error, by = _measure(weight, current, p, beta)
        better = error < best_error
        if not bool(better.any()):
            break
        best_error = torch.where(better, error, best_error)
        best = replace(best, scale=torch.where(better, current.scale, best.scale))
        if best.zero_point is not None and current.zero_point is not None:
            best = replace(best, zero_point=torch.where(better, current.zero_point, best.zero_point))
    return best


def _stored(iterate: _Point, grid: Grid) -> Iterator[Grid]:
    """Yield grids like the given one next to an iterate."""
    before, found = grid.zero_point, iterate.zero_point
    if before is None or found is None:
        scale = FloatScale(grid.scale.dtype).round(iterate.scale)
        yield replace(grid, scale=torch.where(torch.isfinite(scale), scale, grid.scale))
    elif has_float_zero(grid.format):
        rounded = found.to(FLOAT_ZERO_DTYPE)
        yield replace(grid, zero_point=torch.where(torch.isfinite(rounded), rounded, before))
    else:
        lowest, highest = grid.format.end_codes
        for rounded in (found.floor(), found.ceil()):
            yield replace(grid, zero_point=rounded.clamp_(lowest, highest).to(before.dtype))


def _choose(better: Tensor, first: Grid, second: Grid) -> Grid:
    """The scales and zero points [R, G] of the first grid where it is better, of the second elsewhere."""
    zero_point = second.zero_point
    if zero_point is not None and first.zero_point is not None:
        zero_point = torch.where(better, first.zero_point, zero_point)
    return replace(second, scale=torch.where(better, first.scale, second.scale), zero_point=zero_point)


def _measure(weight: Tensor, point: _Point, p: float, beta: float) -> tuple[Tensor, Tensor]:
    """Return Σ |w - ŵ|^p of each group [R, G], and by how much the closed form moves its zero point or scale."""
    granularity, wide = point.granularity, wide_dtype(weight.device)
    error, moved, weights = (torch.zeros(point.scale.shape, dtype=wide, device=weight.device) for _ in range(3))
    for rows in granularity.row_chunks(weight):
        part = granularity.scale_rows(rows)
        scale = point.scale[part].unsqueeze(-1)
        zero_point = None if point.zero_point is None else point.zero_point[part].unsqueeze(-1)
        groups = granularity.split(weight[rows].float())
        present = granularity.split(torch.ones_like(weight[rows], dtype=torch.float32))
        levels = point.format.snap(groups / scale, zero_point)
        # A difference of neighbouring floats is exact, so that errors of any size are right to float32 precision.
        residual = ((groups - levels * scale) / scale).mul_(present)
        size = residual.abs()
        power = size.pow(p)
        error[part] += power.sum(-1, dtype=wide)
        # |r|^(p-1) is infinite at 0, and its product with |r| undefined: the minimum of both is 0 there.
        influence = torch.fmin(size, power.div_(size).div_(beta)).copysign_(residual)
        moved[part] += (influence if zero_point is not None else influence * levels).sum(-1, dtype=wide)
        weights[part] += (present if zero_point is not None else (levels * present).square_()).sum(-1, dtype=wide)
    return error * point.scale.to(wide).abs() ** p, moved / weights
