"""Choosing scales and zero points: min-max, percentile, MSE and importance-weighted MSE.

Every method sees the weights as groups that share a scale and answers with a scale and, for asymmetric formats, a zero
point. The range always includes 0. The scale is rounded to what is stored (a float, a power of two, an FP8 number)
*before* errors are measured and codes chosen, so that what is searched is what is stored. Double-quantized scales are
the exception: they are chosen as floats and quantized together afterwards (`store_scale`).

Legend: O out features, I in features, R rows of scales, G groups per row, n weights per group.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.formats import LevelFormat, has_float_zero
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE
from bitwright.numerics.level_ranges import absmean, twn
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.range_samples import Samples, samples_of
from bitwright.numerics.scales import MIN_SCALE, BoundScale, FloatScale, ScaleFormat
from bitwright.numerics.table import TableFormat
from bitwright.registry import Registry

# Factors on the largest magnitude. From 1 to 0.4, where the optimum of 3 to 8 bits lies, in steps of 0.0125, finer than
# the valley of the error; then geometrically to 0.05, for 2 bits and for outliers that matter little.
SHRINK_FACTORS = tuple(1 - step / 80 for step in range(49)) + tuple(0.4 * 0.9**step for step in range(1, 21))
# Enough to see that clipping helps, and about how much.
QUICK_FACTORS = (0.92, 0.84, 0.76, 0.68, 0.6)

# Steps of floats double with every power of two. A scale up to twice as large clips nothing and costs little
# resolution, but may move the largest weights to where a level is near.
FLOAT_FACTORS = SHRINK_FACTORS + tuple(1 + step / 40 for step in range(1, 41))
# Factors whose scales are computed together: scales are few, and a call for each would cost as much as the errors do.
FACTORS_AT_ONCE = 16


RangeMethod = Callable[[Samples, LevelFormat, BoundScale], tuple[Tensor, Tensor | None]]
RANGE_METHODS: Registry[RangeMethod] = Registry("range method")
FLOAT32 = FloatScale(torch.float32)


def fit_grid(
    weight: Tensor,
    format: LevelFormat,
    granularity: Granularity,
    *,
    method: RangeMethod | str = "minmax",
    importance: Tensor | None = None,
    scale: ScaleFormat = FLOAT32,
) -> Grid:
    """Choose the grid of a weight.

    Works through rows in chunks: the temporaries stay at a few times the chunk, whatever the weight's size.

    Args:
        weight: [O, I], any float dtype; not modified.
        format: the codes.
        granularity: which weights share a scale.
        method: a name in `RANGE_METHODS` or a method, such as `percentile(99.99)`.
        importance: [I], E[x_i²] of the inputs, >= 0. With it `mse` minimises `Σ importance_i (w_i - ŵ_i)²`; methods
            without an objective ignore it.
        scale: how the checkpoint will store the scales.
    Raises:
        ShapeError: the weight is not [O, I] or is empty; the importance is not [I].
        VerificationError: NaN or Inf in weight or importance, a negative importance, a weight too large for float32.
        RecipeError: a scale that float16 cannot hold.
        UnknownName: unknown method.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ShapeError(f"fit_grid: a weight must be [O, I] and not empty, not {list(weight.shape)}.")
    choose = RANGE_METHODS[method] if isinstance(method, str) else method
    root_importance = None if importance is None else _root(importance, weight)
    bound = scale.bind(_largest_step(weight, format))
    # Allocated before the chunks: small results between freed chunks would fragment the heap, and memory would grow.
    shape = granularity.scale_shape(weight.shape[0], weight.shape[1])
    chosen = torch.empty(shape, dtype=bound.round(torch.ones(1, 1, device=weight.device)).dtype, device=weight.device)
    zero_dtype = FLOAT_ZERO_DTYPE if has_float_zero(format) else torch.int32
    zero_point = None if format.symmetric else torch.empty(shape, dtype=zero_dtype, device=weight.device)
    for rows, samples in samples_of(weight, granularity, root_importance):
        chosen_scale, chosen_zero = choose(samples, format, bound)
        _check_scale(chosen_scale, format)
        chosen[rows] = chosen_scale
        if zero_point is not None and chosen_zero is not None:
            zero_point[rows] = chosen_zero
    grid = Grid(
        format=format, granularity=granularity, in_features=weight.shape[1], scale=chosen, zero_point=zero_point
    )
    return grid if scale.stored_afterwards else _with_stored(grid, bound)


def store_scale(grid: Grid, scale: ScaleFormat) -> Grid:
    """Return the grid with its float scales replaced by what `scale` stores of them."""
    bound = scale.bind(grid.scale.abs().max().to(wide_dtype(grid.device)))
    return _with_stored(grid, bound)


def _with_stored(grid: Grid, bound: BoundScale) -> Grid:
    stored = bound.store(grid.scale)
    return grid if stored is None else replace(grid, scale=stored.values(), stored=stored)


def minmax(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor | None]:
    """Cover the whole range: no clipping, coarsest steps."""
    return _cover(*samples.ends(), format, bound)


def centred(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor | None]:
    """Let half of the levels reach the largest magnitude: with a zero point, or as many levels above 0, `minmax`.

    Symmetric integers have one level more below 0. Steps are finer than those of `minmax` then, the ends of the other
    side are clipped by half a step, and the lowest level is seldom used.
    """
    low, high = samples.ends()
    if not format.symmetric or format.min_value == -format.max_value:
        return _cover(low, high, format, bound)
    wide = wide_dtype(low.device)
    reach = torch.maximum(high, -low).to(wide)
    return _rounded(_steps(reach, (format.max_value - format.min_value) / 2), format, bound), None


def percentile(percent: float) -> RangeMethod:
    """Return a method that covers all but the outermost `100 - percent` percent on each side.

    Interpolates linearly between order statistics. Small groups have no tail to cut: with fewer than
    1 / (1 - percent/100) weights this only interpolates between the two largest.

    Raises:
        RecipeError: percent outside (50, 100].
    """
    if not 50 < percent <= 100:
        raise RecipeError(f"percentile: {percent} is outside (50, 100]. Use 99.9 or 99.99.")

    def method(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor | None]:
        position = (samples.counts - 1) * (1 - percent / 100)
        low, high = samples.upper_quantile(position, -1.0).neg_(), samples.upper_quantile(position, 1.0)
        return _cover(low, high, format, bound)

    return method


def mse(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor | None]:
    """Search ranges for the least (importance-weighted) squared error; never worse than `minmax`.

    Exhaustive over `SHRINK_FACTORS` (for floats `FLOAT_FACTORS`), so that a better objective or a superset of codes can
    never lose to a local minimum. With a full symmetric range both signs of the scale are tried; with a zero point, its
    neighbours too, and where it may be a float the integers as well.

    Reference:
        The importance matrix of llama.cpp and the weighted clip of AutoRound; ours searches both signs and measures the
        error of the scale as stored. Larger scales of FP4: Four Over Six, arXiv:2512.02010, which tries the factor 1.5.
    """
    low, high = samples.ends()
    return _best(samples, format, _cover(low, high, format, bound), _candidates(low, high, format, bound))


def quick(samples: Samples, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor | None]:
    """Search as `mse` does over a few factors only: for whoever compares many weights and keeps none of the grids."""
    low, high = samples.ends()
    shrunk = (_cover(low * factor, high * factor, format, bound) for factor in QUICK_FACTORS)
    return _best(samples, format, _cover(low, high, format, bound), shrunk)


def _best(
    samples: Samples,
    format: LevelFormat,
    first: tuple[Tensor, Tensor | None],
    others: Iterable[tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Return, group by group, the scale and zero point of the least error; the first where they tie."""
    best_scale, best_zero = first
    best_error = samples.squared_error(format, best_scale, best_zero)
    for scale, zero_point in others:
        error = samples.squared_error(format, scale, zero_point)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero_point is not None:
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


RANGE_METHODS.register("minmax", minmax)
RANGE_METHODS.register("percentile", percentile(99.9))
RANGE_METHODS.register("mse", mse)
RANGE_METHODS.register("absmean", absmean)
RANGE_METHODS.register("twn", twn)


def _cover(low: Tensor, high: Tensor, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor | None]:
    """Return the smallest step whose grid reaches from low to high; [R, G] each."""
    wide = wide_dtype(low.device)
    low, high = low.to(wide), high.to(wide)
    if not format.symmetric:
        scale, zero_point = _affine(low, high, format, bound)
        return scale, _stored_zero(zero_point, format)
    upright = torch.maximum(_steps(high, format.max_value), _steps(-low, -format.min_value))
    if not bound.signed:
        return _rounded(upright, format, bound), None
    flipped = torch.maximum(_steps(high, -format.min_value), _steps(-low, format.max_value))
    return _rounded(torch.where(flipped < upright, -flipped, upright), format, bound), None


def _steps(reach: Tensor, level: float) -> Tensor:
    """The step [R, G] at which a level reaches so far; 0 where the format has no level on that side of 0."""
    return reach / level if level > 0 else torch.zeros_like(reach)


def _rounded(step: Tensor, format: LevelFormat, bound: BoundScale) -> Tensor:
    """Round steps to storage. Without a level 0 only the smallest scale brings a group of zeros close to 0."""
    if not _has_zero(format):
        step = torch.where(step == 0, torch.full_like(step, MIN_SCALE[torch.float32]), step)
    return bound.round(step)


@lru_cache(maxsize=64)
def _has_zero(format: LevelFormat) -> bool:
    return not format.symmetric or float(format.snap(torch.zeros(1), None)) == 0


def _reach(format: LevelFormat) -> float:
    """The level that a search brings the largest magnitude to.

    Of integers the restricted range's, so that the full range can only gain from its extra code. The two ends of a
    learned table may differ at will, and one may even lie on the other side of 0; its farther end counts.
    """
    return max(-format.min_value, format.max_value) if isinstance(format, TableFormat) else format.max_value


def _candidates(
    low: Tensor, high: Tensor, format: LevelFormat, bound: BoundScale
) -> Iterator[tuple[Tensor, Tensor | None]]:
    wide = wide_dtype(low.device)
    low, high = low.to(wide), high.to(wide)
    factors = bound.factors or (FLOAT_FACTORS if isinstance(format, MinifloatFormat) else SHRINK_FACTORS)
    if format.symmetric:
        reach = torch.maximum(high, -low) / _reach(format)
        signs = (1.0, -1.0) if bound.signed and format.min_value != -format.max_value else (1.0,)
        for some in _batches([sign * factor for factor in factors for sign in signs], reach):
            for scale in _rounded(reach * some, format, bound):
                yield scale, None
        return
    for some in _batches(factors, low):
        scales, zero_points = _affine(low * some, high * some, format, bound)
        # Shrinking both ends alike keeps the zero point; its neighbours clip one end more than the other.
        shifted = [torch.round(zero_points) + shift for shift in (0, -1, 1)]
        if has_float_zero(format):
            shifted += [zero_points + shift for shift in (0.0, -0.5, 0.5)]
        stored = torch.stack([_stored_zero(each, format) for each in shifted], dim=1)
        for scale, tried in zip(scales, stored, strict=True):
            for zero_point in tried:
                yield scale, zero_point


def _batches(factors: Sequence[float], like: Tensor) -> Iterator[Tensor]:
    """Factors [F, 1, 1], some at a time."""
    for start in range(0, len(factors), FACTORS_AT_ONCE):
        some = torch.tensor(factors[start : start + FACTORS_AT_ONCE], dtype=like.dtype, device=like.device)
        yield some.view(-1, 1, 1)


def _affine(low: Tensor, high: Tensor, format: LevelFormat, bound: BoundScale) -> tuple[Tensor, Tensor]:
    """Return the scale and the exact zero point at which `low` is the lowest level."""
    scale = bound.round((high - low) / (format.max_value - format.min_value))
    return scale, format.min_value - low / scale.to(low.dtype)


def _stored_zero(zero_point: Tensor, format: LevelFormat) -> Tensor:
    """Round zero points as the format stores them, inside the code range."""
    inside = zero_point.clamp(format.min_value, format.max_value)
    return inside.to(FLOAT_ZERO_DTYPE) if has_float_zero(format) else torch.round(inside).to(torch.int32)


def _largest_step(weight: Tensor, format: LevelFormat) -> Tensor:
    """The step [] at which the format reaches the largest magnitude of the whole weight.

    Raises:
        VerificationError: NaN or Inf in the weight.
    """
    low, high = torch.aminmax(weight)
    largest = torch.maximum(-low, high).to(wide_dtype(weight.device))
    if not bool(torch.isfinite(largest)):
        raise VerificationError("fit_grid: the weight holds NaN or Inf. Repair the checkpoint; it cannot be quantized.")
    return largest / _reach(format)


def _root(importance: Tensor, weight: Tensor) -> Tensor:
    """Return the square root of the importance over its mean, [1, I]; a common factor changes no choice."""
    if importance.shape != weight.shape[1:]:
        raise ShapeError(f"fit_grid: importance {list(importance.shape)} must be [{weight.shape[1]}], one per column.")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise VerificationError("fit_grid: importance has NaN, Inf or negative entries; it is a mean square of inputs.")
    wide = importance.to(device=weight.device, dtype=wide_dtype(weight.device))
    mean = wide.mean()
    wide = wide / mean if float(mean) > 0 else torch.ones_like(wide)
    return wide.sqrt().float().unsqueeze(0)


def _check_scale(scale: Tensor, format: LevelFormat) -> None:
    reach = scale.float().abs() * max(-format.min_value, format.max_value)
    if bool(torch.isfinite(reach).all()):
        return
    if scale.dtype == torch.float16:
        raise RecipeError("fit_grid: a scale exceeds 65504, the largest float16. Store bfloat16 or float32 scales.")
    raise VerificationError("fit_grid: a weight is so large that its grid overflows float32. Repair the checkpoint.")
