"""How well a quantized weight holds the original's, and what rounding to nearest in the same format would hold.

Both are compared where the codes are: after the transform that a site may apply to its inputs at run time. Outputs are
compared on the inputs that the original has at the site.

Legend: T tokens, O out features, I in features, R rows of scales, G groups, n weights per group.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.checkup.findings import SiteFigures
from bitwright.kernels.reference import linear
from bitwright.model.layouts.stored import module_of
from bitwright.numerics.block_scales import StoredE8M0Scale, StoredFp8Scale
from bitwright.numerics.fitting import CLOSED_FORMS
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.metrics import sqnr_db
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import FLOAT32, fit_grid, quick
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import ScaleFormat

FEW_BITS = 3
"""Up to here the best range lies far inside the largest weight, and a quick search would miss it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SiteCase:
    """A quantized weight and what it should be.

    Attributes:
        site: module.
        block: number of its decoder block; None outside.
        reference: [O, I] float32; the original's weight, scaled as the checkpoint folded it.
        inputs: [T, I] float32, as the site sees them after folding; None where no token came by.
        rows: [O] what the outputs were scaled by when folded; None for nothing.
        quantized: what is stored.
        folded: whether the original was scaled.
    """

    site: str
    block: int | None
    reference: Tensor
    inputs: Tensor | None
    rows: Tensor | None
    quantized: QuantizedSite
    folded: bool

    @property
    def target(self) -> Tensor:
        """What the codes should hold: the reference for transformed inputs, without columns that stay floats."""
        site = self.quantized
        target = self.reference if site.transform is None else site.transform.to_weight(self.reference)
        return target if site.columns is None else target.index_fill(1, site.columns.index.long(), 0.0)

    @property
    def coded(self) -> Tensor:
        """What the codes do hold, with what is added to them."""
        dense, columns = self.quantized.coded(), self.quantized.columns
        return dense if columns is None else dense.index_fill(1, columns.index.long(), 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Signal to noise ratios of one case in dB, inf where nothing differs; None where there is no input."""

    weight_db: float
    expected_weight_db: float
    output_db: float | None
    expected_output_db: float | None
    input_db: float | None
    saturated: float
    expected_saturated: float

    @property
    def loss_db(self) -> float:
        """By how much the site is worse than rounding to nearest, by weights or by outputs, whichever is less.

        A method may give up weights that inputs hardly use, and outputs are lost to no fault of the weights where
        inputs cancel: what is broken is worse in both.
        """
        by_weights = _behind(self.weight_db, self.expected_weight_db)
        if self.output_db is None or self.expected_output_db is None:
            return by_weights
        return min(by_weights, _behind(self.output_db, self.expected_output_db))


def measure(case: SiteCase) -> Measured:
    """Compare a case with its reference and with rounding to nearest; shapes must be equal."""
    target, coded = case.target, case.coded
    nearest = rounded(target, case.quantized.weight)
    ideal = nearest.dequantize()
    output_db = expected_output_db = input_db = None
    if case.inputs is not None and case.inputs.shape[0]:
        x = case.inputs if case.quantized.transform is None else case.quantized.transform.apply(case.inputs)
        expected = _outputs(x, target, case.rows)
        output_db = sqnr_db(expected, _outputs(x, coded, case.rows))
        expected_output_db = sqnr_db(expected, _outputs(x, ideal, case.rows))
        input_db = _input_db(case)
    return Measured(
        weight_db=sqnr_db(target, coded),
        expected_weight_db=sqnr_db(target, ideal),
        output_db=output_db,
        expected_output_db=expected_output_db,
        input_db=input_db,
        saturated=case.quantized.weight.saturated_fraction,
        expected_saturated=nearest.saturated_fraction,
    )


def rounded(target: Tensor, like: QTensor) -> QTensor:
    """Round a weight [O, I] to nearest in the format and granularity of another, on its own best scales."""
    grid: AnyGrid = like.grid
    if isinstance(grid, Grid):
        few = grid.format.bits <= FEW_BITS
        method = CLOSED_FORMS.get(type(grid.format)) or ("mse" if few else quick)
        grid = fit_grid(target, grid.format, grid.granularity, method=method, scale=_scale_format(grid))
    return QTensor(codes=grid.quantize(target), grid=grid, outliers=like.outliers)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """A weight in groups that share a scale: what was to be coded, and the codes in units of the scale.

    Attributes:
        weight: [R, G, n], 0 where padded.
        levels: [R, G, n] code less zero point, 0 where padded.
        mask: [1 or R, G, n], 1 where not padded.
        scale: [R, G] as stored.
        zero_point: [R, G] floats, as stored; None where symmetric.
    """

    weight: Tensor
    levels: Tensor
    mask: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def sqnr_db(self, scale: Tensor, zero_point: Tensor | None = None) -> float:
        """Signal to noise if these had been the scales, and zero points, beside the codes."""
        levels = self.levels
        if zero_point is not None:
            assert self.zero_point is not None
            levels = (levels + (self.zero_point - zero_point).unsqueeze(-1)) * self.mask
        return sqnr_db(self.weight.flatten(1), (levels * scale.unsqueeze(-1)).flatten(1))

    def best(self) -> tuple[Tensor, Tensor | None]:
        """Scales [R, G], and zero points where there are any, of the least squared error for these codes."""
        if self.zero_point is None:
            power = self.levels.square().sum(-1)
            best = (self.weight * self.levels).sum(-1) / power
            return torch.where(power > 0, best, self.scale), None
        count = self.mask.sum(-1)
        mean_weight, mean_level = self.weight.sum(-1) / count, self.levels.sum(-1) / count
        spread = (self.levels.square().sum(-1) / count - mean_level.square()).clamp_(min=0)
        slope = ((self.weight * self.levels).sum(-1) / count - mean_weight * mean_level) / spread
        slope = torch.where((spread > 1e-3) & (slope.abs() > 0), slope, self.scale)
        return slope, self.zero_point + mean_level - mean_weight / slope


def groups_of(case: SiteCase) -> Groups | None:
    """Arrange a case by groups; None where tables stand in place of scales, or outliers beside the codes."""
    weight = case.quantized.weight
    if not isinstance(weight.grid, Grid) or weight.outliers is not None:
        return None
    grid, split = weight.grid, weight.grid.granularity.split
    unit = replace(grid, scale=torch.ones_like(grid.scale, dtype=torch.float32), stored=None)
    return Groups(
        weight=split(case.target.float()),
        levels=split(unit.dequantize(weight.codes)),
        mask=split(torch.ones(weight.shape, device=grid.device)),
        scale=grid.scale.float(),
        zero_point=None if grid.zero_point is None else grid.zero_point.float(),
    )


def _outputs(x: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
    """Outputs [T, O] as the original has them."""
    outputs = x @ weight.T
    return outputs if rows is None else outputs / rows


def _input_db(case: SiteCase) -> float | None:
    """What is left of the outputs when inputs become codes and weights are as stored."""
    site = case.quantized
    if site.inputs is None or case.inputs is None or not bool(torch.isfinite(case.inputs).all()):
        return None
    floats = linear(case.inputs, replace(site, inputs=None))
    return sqnr_db(floats, linear(case.inputs, site))


def _scale_format(grid: Grid) -> ScaleFormat:
    if isinstance(grid.stored, StoredFp8Scale):
        return SCALE_FORMATS["e4m3"]
    if isinstance(grid.stored, StoredE8M0Scale):
        return SCALE_FORMATS["e8m0-int8" if grid.stored.exponent_offset else "e8m0"]
    return FLOAT32


def _behind(found_db: float, expected_db: float) -> float:
    return 0.0 if math.isinf(found_db) and found_db > 0 else expected_db - found_db


def figures_of(case: SiteCase, measured: Measured) -> SiteFigures:
    """What a check-up reports of a case."""
    return SiteFigures(
        site=case.site, block=case.block, bits=float(case.quantized.weight.grid.format.bits),
        weight_sqnr_db=finite(measured.weight_db), expected_weight_sqnr_db=finite(measured.expected_weight_db),
        output_sqnr_db=finite(measured.output_db), expected_output_sqnr_db=finite(measured.expected_output_db),
        input_sqnr_db=finite(measured.input_db), saturated=measured.saturated, folded=case.folded,
    )  # fmt: skip


def figures_alone(index: int, name: str, quantized: QuantizedSite) -> SiteFigures:
    """What can be said of a weight in another basis than the original's."""
    return SiteFigures(
        site=module_of(name), block=index, bits=float(quantized.weight.grid.format.bits), weight_sqnr_db=None,
        expected_weight_sqnr_db=None, output_sqnr_db=None, expected_output_sqnr_db=None, input_sqnr_db=None,
        saturated=quantized.weight.saturated_fraction, folded=True,
    )  # fmt: skip


def finite(value: float | None) -> float | None:
    """None in place of what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else value
