"""What rounding to nearest makes of a site's weight, inputs or cached outputs: the errors that every score weighs.

Shapes: O out features, I in features, T tokens.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.model.layouts.own import input_scale
from bitwright.model.sites import Site
from bitwright.model.skeleton import Skeleton
from bitwright.numerics.fitting import fit
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer
from bitwright.numerics.outliers import split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.recipe import Plan, Recipe, resolve
from bitwright.schemes import MODEL_SCALE, Scheme


class Rounder:
    """Rounds the weights of sites to nearest, as a recipe with one scheme and method rtn would.

    Args:
        skeleton: knows in which dtype each weight, and so its scales, is stored.
        sites: of the model; a scheme that does not fit one of them is refused here.
        schemes: the menu.
        recipe: its range method and what it does with ragged rows.
    Raises:
        ShapeError: a group size does not fit a row and the recipe does not allow another.
    """

    def __init__(self, skeleton: Skeleton, sites: Sequence[Site], schemes: Sequence[Scheme], recipe: Recipe) -> None:
        self._skeleton, self._recipe = skeleton, recipe
        self._plans: dict[str, Plan] = {}
        for scheme in schemes:
            uniform = Recipe(scheme=scheme, method="rtn", range_method=recipe.range_method, ragged=recipe.ragged)
            self._plans[str(scheme)] = resolve(uniform, sites)

    def round(self, site: Site, scheme: str, weight: Tensor, mean_square: Tensor | None) -> Tensor:
        """Return the dense values [O, I] of a weight [O, I] in a scheme of the menu: float32, in its stored precision.

        Args:
            site: whose weight it is.
            scheme: its name.
            weight: float32; not modified.
            mean_square: [I] E[x²] of the inputs; None where no token reached the site.
        """
        entry = self._plans[scheme].sites[site.name]
        assert entry.scheme is not None
        assert entry.granularity is not None
        weights, dtype = entry.scheme.weights, self._skeleton.stored_dtype(site.parameter)
        scale = FloatScale(dtype) if weights.scale == MODEL_SCALE else SCALE_FORMATS[weights.scale]
        method = self._recipe.range_method_for(has_statistics=mean_square is not None)
        importance = mean_square.to(weight.device) if method == "importance" and mean_square is not None else None
        outliers = None
        if weights.outliers:
            weight, outliers = split_outliers(weight, weights.outliers, importance=importance, dtype=dtype)
        grid = fit(
            weight, weights.format, entry.granularity,
            method="mse" if method == "importance" else method, importance=importance, scale=scale,
        )  # fmt: skip
        codes = grid.quantize(weight)
        if isinstance(grid, Grid) and scale.stored_afterwards:
            grid = store_scale(grid, scale)
        return QTensor(codes=codes, grid=grid, outliers=outliers).dequantize(dtype).float()


def activation_quantizers(schemes: Sequence[Scheme]) -> Mapping[str, InputQuantizer]:
    """Return what the activations of each scheme do to rows [T, I], by the scheme's name.

    Raises:
        RecipeError: a scheme leaves activations in 16 bit, or needs scales from calibration.
    """
    found: dict[str, InputQuantizer] = {}
    for scheme in schemes:
        acts = scheme.activations
        if acts is None:
            raise RecipeError(f"scheme {scheme} leaves activations in 16 bit. Use a scheme such as W8A8 or W8A4.")
        if acts.observer is not None:
            raise RecipeError(
                f"scheme {scheme}: activations with calibrated scales have no sensitivity score yet. Use dynamic ones."
            )
        found[str(scheme)] = InputQuantizer(format=acts.format, granularity=acts.granularity, scale=input_scale(acts))
    return found


def fake_quantize_rows(quantizer: InputQuantizer, x: Tensor) -> Tensor:
    """Return what activations [..., I] become, in their shape and dtype."""
    rows = quantizer.quantize(x.reshape(-1, x.shape[-1])).dequantize()
    return rows.view(x.shape).to(x.dtype)
