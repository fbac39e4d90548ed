"""Weights under quantization-aware training: the master weight goes through the codes that will be exported.

Forward, the value is that of the formats themselves, `grid.dequantize(grid.quantize(weight))`, with scales rounded as
the checkpoint stores them. Backward, rounding is the identity, and the ends of the range clip:

    d value / d weight        1 inside the range, 0 outside
    d value / d scale         level - w / s inside, the end level outside; times g = 1 / sqrt(N · Qp)
    d value / d zero point    0 inside, -s outside; times g

Modes say what moves besides the weight:

    minmax     nothing; the range is found again from the weight at every step, and clips nothing (LLM-QAT)
    learned    scale and float zero point are parameters (LSQ, LSQ+); formats with a step and plain float scales
    fixed      nothing; the grid stays where it starts
    scales     only the scale; the codes stay what they are at the start (second stage of EfficientQAT)

Ternary and binary codes have no range to cover: their `minmax` takes the mean magnitude, as BitNet and XNOR-Net do.

References: LSQ, arXiv:1902.08153; LSQ+, arXiv:2004.09576; LLM-QAT, arXiv:2305.17888; EfficientQAT, arXiv:2407.11062.

Legend: O out features, I in features, R rows of scales, G groups per row, n weights per group, N of them not padding.
"""

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bitwright.errors import RecipeError
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, LearnedTableFormat
from bitwright.numerics.fitting import fit
from bitwright.numerics.formats import has_float_zero
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE, IntegerFormat
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.outliers import SparseOutliers, split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.numerics.ste import straight_through
from bitwright.numerics.ternary import BinaryFormat, TernaryFormat
from bitwright.schemes import Scheme

Mode = Literal["minmax", "learned", "fixed", "scales"]
SMALLEST_SHARE = 2.0**-10
"""A learned scale keeps its sign and at least this share of its start; below, every weight of its group is clipped."""
BISECTIONS = 10
"""Of the way from a level to a weight: to a thousandth of it."""
_STORED = "stored_"
_WITH_STEP = (IntegerFormat, MinifloatFormat, TernaryFormat)


def fit_start(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> AnyGrid:
    """Return the grid of least squared error for a weight [O, I]; outliers of the scheme do not count.

    Args:
        weight: float32; not modified.
        scheme: with the granularity that fits the weight.
        dtype: the checkpoint's.
    """
    weights, importance = scheme.weights, None
    if weights.outliers:
        weight, outliers = split_outliers(weight, weights.outliers, dtype=dtype)
        importance = torch.ones_like(weight)
        importance.view(-1)[outliers.index.long()] = 0
    storage = weights.stored_scale(dtype)
    grid = fit(weight, weights.format, weights.granularity, method="mse", importance=importance, scale=storage)
    return _as_stored(grid, storage)


@torch.no_grad()
def inside_cells(weight: Tensor, found: QTensor, share: float) -> Tensor:
    """Return numbers [O, I] near a weight that round to the codes that a method has found.

    Training from the levels themselves forgets which roundings were close calls: from here those turn first. But a
    method such as GPTQ rounds many weights away from themselves on purpose. At the very border of their cells all of
    them would turn in the first steps, hence the share. The cell of a level is an interval, so the way from the level
    to the weight is bisected.

    Args:
        weight: [O, I] float32; not modified.
        found: codes of the same shape, on the grid that training starts from.
        share: of the way from the level to the weight, or to the border of the cell where the weight is beyond; 0 to 1.
    """
    level = found.dequantize(torch.float32)
    inside, outside = level, weight
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        same = found.grid.quantize(middle) == found.codes
        inside, outside = torch.where(same, middle, inside), torch.where(same, outside, middle)
    nearest = torch.where(found.grid.quantize(weight) == found.codes, weight, inside)
    return level + share * (nearest - level)


def mean_step(grid: AnyGrid, num_rows: int) -> float:
    """Return the distance of neighbouring levels of a matrix [num_rows, I], on average over levels and groups."""
    format, shape = grid.format, (num_rows, grid.in_features)
    low, high = (
        grid.dequantize(torch.full(shape, code, dtype=format.code_dtype, device=grid.device))
        for code in format.end_codes
    )
    return float((high - low).abs().mean()) / (format.num_codes - 1)


def can_learn(grid: AnyGrid) -> bool:
    """Whether the scales of a grid can be learned: a format with a step, and scales that are plain floats."""
    return isinstance(grid, Grid) and grid.stored is None and isinstance(grid.format, _WITH_STEP)


def check_mode(mode: Mode, scheme: Scheme) -> None:
    """Refuse a mode that the format of a scheme cannot have.

    Raises:
        RecipeError: it cannot.
    """
    format = scheme.weights.format
    has_tables = isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat)
    is_plain = not has_tables and isinstance(scheme.weights.stored_scale(torch.float32), FloatScale)
    if mode == "learned" and not (is_plain and isinstance(format, _WITH_STEP)):
        raise RecipeError(f"{scheme}: its scales cannot be learned (tables, signs or stored scales). Use mode fixed.")
    if mode == "scales" and not is_plain:
        raise RecipeError(f"{scheme}: it has no plain float scales to train. Use mode fixed.")
    if mode == "minmax" and has_tables:
        raise RecipeError(f"{scheme}: a table per row or group has no range. Use mode fixed.")


class FakeWeight(nn.Module):
    """The quantizer of one weight [O, I].

    Args:
        scheme: with the granularity that fits the weight.
        weight: where training starts, float32. Mode `scales` keeps its codes: give a dequantized weight to keep those
            that a method has found.
        grid: where training starts.
        dtype: the checkpoint's: of scales that the scheme leaves to the model, and of outliers.
        mode: see the module's docstring.
    Raises:
        RecipeError: a mode that the format cannot have; a grid of another scheme or shape.
    """

    def __init__(self, scheme: Scheme, weight: Tensor, grid: AnyGrid, dtype: torch.dtype, mode: Mode) -> None:
        super().__init__()
        self.scheme, self.mode, self.dtype = scheme, mode, dtype
        self.storage = scheme.weights.stored_scale(dtype)
        _check_grid(grid, scheme, weight.shape[0])
        self._template = _as_stored(grid, self.storage)
        check_mode(mode, scheme)
        self.frozen: Tensor
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=weight.device))
        self.outlier_index: Tensor | None
        self.register_buffer("outlier_index", self._find_outliers(weight))
        self._names = tuple(_tensors(self._template))
        for name, tensor in _tensors(self._template).items():
            if name in self._trained_names():
                self.register_parameter(name, nn.Parameter(tensor.detach().float().clone()))
            else:
                self.register_buffer(name, tensor.detach().clone())
        if self.trains_scale:
            start = cast(Grid, self._template)
            self.register_buffer("smallest", start.scale.float() * SMALLEST_SHARE)
            self.register_buffer("factor", gradient_factor(start, weight.shape[0]))
        if mode == "scales":
            self.register_buffer("codes", self._template.quantize(self._without_outliers(weight)))

    @property
    def trains_scale(self) -> bool:
        """Whether scales are parameters."""
        return self.mode in ("learned", "scales")

    def grid(self, weight: Tensor) -> AnyGrid:
        """Return the grid as it is now, with everything rounded to what is stored.

        Args:
            weight: [O, I] as it is now; only mode `minmax` looks at it.
        """
        if self.mode == "minmax" and not bool(self.frozen):
            return self._refit(weight)
        tensors = {name: cast(Tensor, getattr(self, name)).detach() for name in self._names}
        if self.trains_scale:
            tensors["scale"] = bounded_scale(tensors["scale"], self.get_buffer("smallest"), self.storage_dtype)
        if "zero_point" in self._trained_names():
            format = cast(IntegerFormat, self._template.format)
            tensors["zero_point"] = tensors["zero_point"].clamp(format.min_value, format.max_value).to(FLOAT_ZERO_DTYPE)
        return _with_tensors(self._template, tensors, self.storage)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of plain float scales."""
        assert isinstance(self.storage, FloatScale)
        return self.storage.dtype

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight [O, I] float32 that `qtensor` stands for, differentiable."""
        inner = self._without_outliers(weight)
        grid = self.grid(inner.detach())
        if self.mode == "scales":
            value = self._decoded(cast(Grid, grid))
        else:
            scale, zero_point = (self._parameter(name) for name in ("scale", "zero_point"))
            value = fake_quantize(
                inner, grid, scale=scale, zero_point=zero_point, factor=self._buffers.get("factor"),
                clips=self.mode != "minmax",
            )  # fmt: skip
        if self.outlier_index is None:
            return value
        kept = straight_through(weight.flatten()[self.outlier_index.long()], lambda x: x.to(self.dtype).float())
        return value.flatten().index_copy(0, self.outlier_index.long(), kept).view_as(weight)

    @torch.no_grad()
    def qtensor(self, weight: Tensor) -> QTensor:
        """Return codes and grid of a weight [O, I], as they are exported."""
        inner = self._without_outliers(weight)
        grid = self.grid(inner)
        outliers: SparseOutliers | None = None
        if self.outlier_index is not None:
            value = weight.flatten()[self.outlier_index.long()].to(self.dtype)
            outliers = SparseOutliers(index=self.outlier_index, value=value, shape=(weight.shape[0], weight.shape[1]))
        codes = self.get_buffer("codes") if self.mode == "scales" else grid.quantize(inner)
        return QTensor(codes=codes, grid=grid, outliers=outliers)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Leave the grid where it is now, for the rest of the training."""
        if self.mode == "minmax" and not bool(self.frozen):
            for name, tensor in _tensors(self._refit(self._without_outliers(weight))).items():
                self.get_buffer(name).copy_(tensor)
        self.frozen.fill_(True)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _refit(self, weight: Tensor) -> AnyGrid:
        format = self._template.format
        method = "absmean" if isinstance(format, TernaryFormat | BinaryFormat) else "minmax"
        granularity = self._template.granularity
        return _as_stored(
            fit(weight.detach(), format, granularity, method=method, importance=None, scale=self.storage), self.storage
        )

    def _decoded(self, grid: Grid) -> Tensor:
        """Return what the kept codes stand for, with the true gradient of the scale: `Grid.dequantize`, bit for bit."""
        codes = self.get_buffer("codes")
        zero_point = None if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
        levels = grid.format.decode(grid.granularity.split(codes), zero_point)
        scale = straight_through(self.get_parameter("scale"), lambda _: grid.scale.float())
        return grid.granularity.join(levels * scale.unsqueeze(-1), *codes.shape)

    def _find_outliers(self, weight: Tensor) -> Tensor | None:
        fraction = self.scheme.weights.outliers
        return split_outliers(weight.detach(), fraction, dtype=self.dtype)[1].index if fraction else None

    def _without_outliers(self, weight: Tensor) -> Tensor:
        if self.outlier_index is None:
            return weight
        return weight.flatten().index_fill(0, self.outlier_index.long(), 0.0).view_as(weight)

    def _trained_names(self) -> tuple[str, ...]:
        if self.mode == "learned" and has_float_zero(self._template.format):
            return ("scale", "zero_point")
        return ("scale",) if self.trains_scale else ()

    def _parameter(self, name: str) -> Tensor | None:
        return self.get_parameter(name) if name in self._trained_names() else None


def bounded_scale(scale: Tensor, smallest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return learned scales [R, G] as they are stored: on their side of 0, no closer to it than `smallest`."""
    sign = torch.sign(smallest)
    return FloatScale(dtype).round(torch.maximum(scale * sign, smallest.abs()) * sign)


def gradient_factor(grid: Grid, num_rows: int) -> Tensor:
    """Return LSQ's g = 1 / sqrt(N · Qp) [R, G] for the N numbers of a matrix [num_rows, I] that share a scale."""
    ones = torch.ones(1, 1, device=grid.device).expand(num_rows, grid.in_features)
    return (grid.granularity.split(ones).sum(-1) * grid.format.max_value).rsqrt()


def fake_quantize(
    x: Tensor,
    grid: AnyGrid,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    factor: Tensor | None = None,
    clips: bool = True,
) -> Tensor:
    """Return `grid.dequantize(grid.quantize(x))` in float32, with straight-through gradients.

    Args:
        x: [O, I], any float dtype.
        grid: as stored.
        scale: [R, G] parameter behind the grid's scale; None where it is not trained.
        zero_point: [R, G] parameter behind the grid's zero point; None where it is not trained.
        factor: [R, G] on the gradients of scale and zero point; None for 1.
        clips: whether numbers outside the range have no gradient.
    """
    return cast(Tensor, _FakeQuantize.apply(x, scale, zero_point, grid, factor, clips))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        _zero_point: Tensor | None,
        grid: AnyGrid,
        factor: Tensor | None,
        clips: bool,
    ) -> Tensor:
        """Round to the grid."""
        codes = grid.quantize(x)
        ctx.save_for_backward(x, codes if scale is not None else None)
        ctx.grid, ctx.factor, ctx.clips = grid, factor, clips
        return grid.dequantize(codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients in the module's docstring."""
        x, codes = ctx.saved_tensors
        grid = cast(AnyGrid, ctx.grid)
        groups, pulls = grid.granularity.split(x.float()), grid.granularity.split(gradient)
        inside = _inside(grid, groups) if ctx.clips else torch.ones_like(groups, dtype=torch.bool)
        to_x = grid.granularity.join(pulls * inside, *x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_scale = to_zero = None
        factor = 1.0 if ctx.factor is None else ctx.factor
        if codes is not None:
            assert isinstance(grid, Grid)
            zero_point = None if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
            scaled = groups / grid.scale.float().unsqueeze(-1)
            levels = grid.format.decode(grid.granularity.split(codes), zero_point)
            to_scale = (pulls * (levels - scaled * inside)).sum(-1) * factor
        if ctx.needs_input_grad[2]:
            assert isinstance(grid, Grid)
            to_zero = -(pulls * ~inside).sum(-1) * grid.scale.float() * factor
        return to_x, to_scale, to_zero, None, None, None


def _inside(grid: AnyGrid, groups: Tensor) -> Tensor:
    """Which numbers [R, G, n] lie between the lowest and the highest level of their group."""
    if isinstance(grid, CodebookGrid):
        tables = grid.codebook.float()
        return (groups >= tables[..., :1]) & (groups <= tables[..., -1:])
    assert isinstance(grid, Grid)
    shift = 0.0 if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
    shifted = groups / grid.scale.float().unsqueeze(-1) + shift
    return (shifted >= grid.format.min_value) & (shifted <= grid.format.max_value)


def _check_grid(grid: AnyGrid, scheme: Scheme, num_rows: int) -> None:
    expected = (scheme.weights.format.name, scheme.weights.granularity)
    if (grid.format.name, grid.granularity) != expected or not grid.fits(num_rows):
        raise RecipeError(
            f"{scheme}: the grid to start from is of {grid.format.name} per {grid.granularity.kind} over "
            f"{grid.in_features} columns, and does not fit. Fit one with this scheme and its effective group size."
        )


def _as_stored(grid: AnyGrid, storage: ScaleFormat) -> AnyGrid:
    """Return a grid whose scales are rounded to what the checkpoint stores."""
    if not isinstance(grid, Grid) or grid.stored is not None:
        return grid
    if isinstance(storage, FloatScale):
        return replace(grid, scale=storage.round(grid.scale))
    return store_scale(grid, storage)


def _tensors(grid: AnyGrid) -> dict[str, Tensor]:
    """Return the tensors of a grid, by names that do not depend on their values."""
    if isinstance(grid, CodebookGrid):
        return {"codebook": grid.codebook}
    assert isinstance(grid, Grid)
    tensors = {"scale": grid.scale}
    if grid.stored is not None:
        tensors = {_STORED + name: tensor for name, tensor in grid.stored.tensors().items()}
    return tensors if grid.zero_point is None else tensors | {"zero_point": grid.zero_point}


def _with_tensors(grid: AnyGrid, tensors: dict[str, Tensor], storage: ScaleFormat) -> AnyGrid:
    """Undo `_tensors`, on a grid of the same kind."""
    if isinstance(grid, CodebookGrid):
        return replace(grid, codebook=tensors["codebook"])
    assert isinstance(grid, Grid)
    zero_point = tensors.get("zero_point")
    if grid.stored is None:
        return replace(grid, scale=tensors["scale"], zero_point=zero_point)
    inner = {name.removeprefix(_STORED): tensor for name, tensor in tensors.items() if name.startswith(_STORED)}
    stored = storage.load(inner)
    return replace(grid, scale=stored.values(), stored=stored, zero_point=zero_point)
