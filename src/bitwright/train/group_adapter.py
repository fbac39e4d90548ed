"""QA-LoRA: an adapter that folds into the zero points of a packed weight, so that what was trained needs no merging.

The adapter sees the mean of the inputs over each quantization group of a row:

    y = x Wᵀ + scaling · mean(x) Aᵀ Bᵀ        A [r, G], B [O, r]

so that it adds the same number, delta = scaling · (B A)[o, g] / n, to the n weights of a group. With w = s (q - z) that
is a shift of the zero point: z' = z - delta / s. Codes and scales stay.

Zero points are stored as float16. In training the shifted zero points are rounded like that (gradients pass straight
through, but for those beyond its range, which stop at its ends), and the product is that of the weight with these zero
points, bit for bit: nothing is lost by folding. The product x Wᵀ + ... is never computed as a sum; its gradients are
those of the sum. An adapter has no dropout for that reason: what it adds is not apart from the weight.

Legend: T tokens, O out features, I in features, G groups per row, n columns per group, r rank.

Reference: arXiv:2309.14717 (QA-LoRA). Differs: zero points are rounded as stored during training; no dropout.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bitwright.errors import RecipeError
from bitwright.kernels.reference import linear
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.formats import has_float_zero
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE, IntegerFormat
from bitwright.numerics.ste import straight_through
from bitwright.schemes import Scheme
from bitwright.train.lora import Adapter, LoraConfig, adapters_of, attach
from bitwright.train.target_layers import Layer, select

LARGEST_ZERO = torch.finfo(FLOAT_ZERO_DTYPE).max
ModelT = TypeVar("ModelT", bound=nn.Module)


class _FoldedProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, zero_point: Tensor, layer: QuantizedLinear, site: QuantizedSite
    ) -> Tensor:
        """Run the layer with other zero points."""
        ctx.save_for_backward(x, zero_point)
        ctx.layer = layer  # and not the site, whose codes are unpacked
        return linear(x, _with_zero_point(site, zero_point), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decode the weight again. A zero point enters every weight of its group with -scale."""
        x, zero_point = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        site = _with_zero_point(cast(QuantizedLinear, ctx.layer).site(), zero_point)
        of_inputs: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_inputs = (gradient @ site.dense(gradient.dtype)).to(x.dtype)
        sums = _group_sums(x, site)
        rows = gradient.reshape(-1, gradient.shape[-1]).to(sums.dtype)
        return of_inputs, -_grid(site).scale.float() * (rows.T @ sums).float(), None, None


class GroupLoraLinear(Adapter):
    """A packed layer whose zero points are trained by a matrix of low rank.

    Args:
        base: in a scheme with integer codes, float zero points, and scales per group or row.
        config: without dropout; targets count for nothing.
        dtype: of A and B.
    Raises:
        RecipeError: the base cannot take an adapter into its zero points, or the configuration has dropout.
    """

    def __init__(self, base: Layer, config: LoraConfig, *, dtype: torch.dtype = torch.float32) -> None:
        layer = _foldable(base)
        if config.dropout:
            raise RecipeError(
                f"group adapter: dropout {config.dropout} cannot be, since the adapter is part of the weight. Use 0."
            )
        granularity = layer.scheme.weights.granularity
        super().__init__(layer, granularity.num_groups(layer.in_features), config, dtype)
        width = granularity.columns_per_group(layer.in_features)
        starts = torch.arange(0, layer.in_features, width, device=self.lora_a.device)
        self.register_buffer("widths", (layer.in_features - starts).clamp(max=width), persistent=False)

    @property
    def packed(self) -> QuantizedLinear:
        """The base."""
        return cast(QuantizedLinear, self.base)

    def zero_point(self, grid: Grid) -> Tensor:
        """Return the zero points [O, G] of the base's grid, shifted and rounded to what is stored; float32."""
        shift = self.product().float() / self.get_buffer("widths") / grid.scale.float()
        # Where a group hardly varies, a small number is a shift beyond float16: there the adapter has reached its end.
        shifted = (cast(Tensor, grid.zero_point).float() - shift).clamp(-LARGEST_ZERO, LARGEST_ZERO)
        return straight_through(shifted, lambda zero: zero.to(FLOAT_ZERO_DTYPE).float())

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., O] of inputs [..., I], in their dtype: bit for bit that of the folded layer."""
        site = self.packed.site()
        zero_point = self.zero_point(_grid(site))
        product = _FoldedProduct.apply(x, zero_point, self.packed, site)  # pyright: ignore[reportUnknownMemberType]
        return cast(Tensor, product)

    def delta(self) -> Tensor:
        """Return what is added to the weight [O, I], before zero points are rounded."""
        widths = self.get_buffer("widths")
        return (self.product() / widths).repeat_interleave(widths, dim=1)

    def fold(self) -> QuantizedSite:
        """Return the site with the adapter in its zero points; codes and scales are those of the base."""
        site = self.packed.site()
        with torch.no_grad():
            return _with_zero_point(site, self.zero_point(_grid(site)))

    def folded_layer(self) -> QuantizedLinear:
        """Return the packed layer of `fold`."""
        base = self.packed
        stored = {own.GUARD: base.stored()[own.GUARD], **own.encode(self.fold())}
        stored = {name: tensor.to(self.lora_a.device) for name, tensor in stored.items()}
        bias = None if base.bias is None else base.bias.detach()
        return QuantizedLinear(base.scheme, base.out_features, base.in_features, stored, bias)


def add_group_adapters(model: nn.Module, config: LoraConfig) -> dict[str, GroupLoraLinear]:
    """Freeze the model and put a group adapter around every target; in place. Return them by the names of the layers.

    Raises:
        RecipeError: a pattern covers no layer, a target cannot take an adapter into its zero points, the configuration
            has dropout, or the model has adapters.
        StructureError: the model has no decoder blocks.
    """

    def build(name: str, base: Layer) -> GroupLoraLinear:
        try:
            return GroupLoraLinear(base, config)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from None

    return attach(model, select(model, config.targets), build)


def fold_adapters(model: nn.Module) -> Mapping[str, QuantizedSite]:
    """Fold every group adapter of a model, in place; return the sites by the names of the layers."""
    sites: dict[str, QuantizedSite] = {}
    for name, adapter in adapters_of(model).items():
        if isinstance(adapter, GroupLoraLinear):
            layer = adapter.folded_layer()
            sites[name] = layer.site()
            model.set_submodule(name, layer)
    return sites


def _foldable(base: Layer) -> QuantizedLinear:
    if not isinstance(base, QuantizedLinear):
        raise RecipeError("group adapter: this layer is dense. Quantize it to W4A16-g64-floatzero, or use lora.")
    require_foldable(base.scheme)
    return base


def require_foldable(scheme: Scheme) -> None:
    """Raises RecipeError for a scheme without float zero points of rows, into which an adapter could fold."""
    kind = scheme.weights.granularity.kind
    if not isinstance(scheme.weights.format, IntegerFormat) or not has_float_zero(scheme.weights.format):
        raise RecipeError(
            f"group adapter: scheme {scheme} has no float zero points to fold into. Use W4A16-g64-floatzero."
        )
    if kind not in ("group", "channel"):
        raise RecipeError(
            f"group adapter: scheme {scheme} shares zero points between rows ({kind}). Use W4A16-g64-floatzero."
        )


def _grid(site: QuantizedSite) -> Grid:
    return cast(Grid, site.weight.grid)


def _with_zero_point(site: QuantizedSite, zero_point: Tensor) -> QuantizedSite:
    """The site with other zero points, given as float32 that float16 holds."""
    grid = replace(_grid(site), zero_point=zero_point.to(FLOAT_ZERO_DTYPE))
    return replace(site, weight=replace(site.weight, grid=grid))


def _group_sums(x: Tensor, site: QuantizedSite) -> Tensor:
    """Sum what codes are multiplied with over the columns of each group: [T, G], float32 or wider, of [..., I]."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if site.transform is None else site.transform.apply(rows)
    if site.columns is not None:
        rows = rows.index_fill(1, site.columns.index.long(), 0.0)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return _grid(site).granularity.split(wide).sum(dim=-1)
