"""Quantization-aware training: linear layers whose weight and inputs are quantized in every forward pass.

`prepare` puts `QatLinear` into the place of the chosen layers, any loop trains the model, `convert` takes the codes of
the very grids of the last step, and `remove` leaves an ordinary dense model with the trained values.

Legend: O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import RecipeError, StructureError, did_you_mean
from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite
from bitwright.schemes import Scheme
from bitwright.train.fake_inputs import FakeInputs
from bitwright.train.fake_weights import FakeWeight, Mode, can_learn, fit_start

MODES = ("auto", "minmax", "learned", "fixed", "scales")
INPUT_MODES = ("learned", "fixed")


@dataclass(frozen=True, kw_only=True, slots=True)
class QatOptions:
    """How quantizers behave in training.

    Attributes:
        mode: a mode of `FakeWeight`, or auto: learned where the format allows it, fixed elsewhere.
        inputs: whether static scales of inputs are learned, or stay as calibrated.
        freeze_after: the fraction of all steps, in (0, 1], after which the training loop is to call `freeze_grids`:
            weights settle better on levels that no longer move. 1 never freezes.
    Raises:
        RecipeError: an unknown mode, or a fraction out of range.
    """

    mode: Literal["auto", "minmax", "learned", "fixed", "scales"] = "auto"
    inputs: Literal["learned", "fixed"] = "learned"
    freeze_after: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"qat: unknown mode '{self.mode}'.{did_you_mean(self.mode, MODES)}")
        if self.inputs not in INPUT_MODES:
            raise RecipeError(f"qat: unknown input mode '{self.inputs}'.{did_you_mean(self.inputs, INPUT_MODES)}")
        if not 0 < self.freeze_after <= 1:
            raise RecipeError(f"qat: freeze_after {self.freeze_after} is outside (0, 1]. Use 0.8, or 1 for never.")


class QatLinear(nn.Module):
    """`nn.Linear` on fake-quantized weight and inputs.

    Its value is that of `kernels.reference.linear` on the exported codes, but for the order of sums: weight and inputs
    are the same numbers, bit for bit, while integer products are added in float32 here.

    Attributes:
        weight: float32 [O, I], the master weight; not trained in mode `scales`.
        bias: of the layer it replaces.
        fake_weight: the weight's quantizer.
        fake_inputs: the inputs' quantizer; None where they stay floats.
    """

    def __init__(self, linear: nn.Linear, fake_weight: FakeWeight, fake_inputs: FakeInputs | None) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.dense_dtype = linear.weight.dtype
        kept = linear.weight.dtype == torch.float32
        self.weight = linear.weight if kept else nn.Parameter(linear.weight.detach().float())
        self.weight.requires_grad_(fake_weight.mode != "scales")
        self.bias: nn.Parameter | None = linear.bias
        self.fake_weight, self.fake_inputs = fake_weight, fake_inputs
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., O] with inputs [..., I], in their dtype."""
        weight = self.fake_weight(self.weight)
        if self.fake_inputs is None:
            return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        bias = None if self.bias is None else self.bias.float()
        # Mixed precision would round the levels once more, to numbers that no kernel multiplies.
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(self.fake_inputs(x), weight, bias).to(x.dtype)

    def site(self) -> QuantizedSite:
        """Return what is exported."""
        inputs = None if self.fake_inputs is None else self.fake_inputs.quantizer()
        return QuantizedSite(weight=self.fake_weight.qtensor(self.weight), inputs=inputs)

    def dequantized(self) -> nn.Linear:
        """Return the dense layer of the trained levels, in the dtype of the layer that was replaced."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.fake_weight.qtensor(self.weight).dequantize(self.dense_dtype))
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def freeze(self) -> None:
        """Leave all grids where they are now."""
        self.fake_weight.freeze(self.weight)
        if self.fake_inputs is not None:
            self.fake_inputs.freeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QatLinear":
        """Move to another device, but keep every dtype: `.to(dtype)` must round neither master weights nor scales."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def extra_repr(self) -> str:
        """As `nn.Linear`, with scheme and mode."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.fake_weight.scheme}, mode={self.fake_weight.mode}"
        )


def prepare(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    start: Mapping[str, AnyGrid] | None = None,
    options: QatOptions | None = None,
    *,
    inputs: Mapping[str, InputQuantizer] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, QatLinear]:
    """Replace linear layers by their trainable quantized counterparts, in place.

    Args:
        model: in memory, as transformers loads it.
        schemes: module name -> scheme, with the granularity that fits the weight.
        start: grids to start from; None and missing ones are fitted for the least squared error.
        options: None for the defaults.
        inputs: calibrated quantizers of inputs; missing static scales start from the first batch.
        dtype: of the checkpoint that will be written; None for that of each layer.
    Returns:
        The new modules by name.
    Raises:
        StructureError: a name that is no `nn.Linear` of the model.
        RecipeError: a mode that a format cannot have; a start for a site without a scheme.
    """
    options, start, inputs = options or QatOptions(), start or {}, inputs or {}
    for name in (*start, *inputs):
        if name not in schemes:
            raise RecipeError(f"qat: '{name}' has a start but no scheme.{did_you_mean(name, schemes)}")
    linears = {name: linear_of(model, name) for name in schemes}
    prepared: dict[str, QatLinear] = {}
    for name, linear in linears.items():
        prepared[name] = _prepared(linear, schemes[name], start.get(name), options, inputs.get(name), dtype)
        model.set_submodule(name, prepared[name])
    return prepared


def convert(model: nn.Module) -> dict[str, QuantizedSite]:
    """Return the sites of a prepared model as they are exported: the codes of its last forward pass."""
    return {name: module.site() for name, module in _prepared_modules(model)}


def remove(model: nn.Module) -> None:
    """Put dense layers with the trained levels into the place of all quantized ones; inputs are floats again."""
    for name, module in list(_prepared_modules(model)):
        model.set_submodule(name, module.dequantized())


def freeze_grids(model: nn.Module) -> None:
    """Stop scales and zero points of all weights and inputs; weights go on."""
    for _, module in _prepared_modules(model):
        module.freeze()


def grid_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scales and zero points that are trained: for a learning rate of their own, without weight decay."""
    found: list[nn.Parameter] = []
    for _, module in _prepared_modules(model):
        parts = (module.fake_weight, module.fake_inputs)
        found += [p for part in parts if part is not None for p in part.parameters() if p.requires_grad]
    return found


def _prepared(
    linear: nn.Linear,
    scheme: Scheme,
    start: AnyGrid | None,
    options: QatOptions,
    inputs: InputQuantizer | None,
    dtype: torch.dtype | None,
) -> QatLinear:
    weight = linear.weight.detach().float()
    dtype = dtype or linear.weight.dtype
    grid = fit_start(weight, scheme, dtype) if start is None else start.to(weight.device)
    fake_weight = FakeWeight(scheme, weight, grid, dtype, _mode(options, grid))
    fake_inputs: FakeInputs | None = None
    if scheme.activations is not None:
        learned = options.inputs == "learned"
        fake_inputs = FakeInputs(scheme.activations, linear.in_features, dtype, start=inputs, learned=learned)
        fake_inputs.to(weight.device)
    return QatLinear(linear, fake_weight, fake_inputs)


def _mode(options: QatOptions, grid: AnyGrid) -> Mode:
    if options.mode != "auto":
        return options.mode
    return "learned" if can_learn(grid) else "fixed"


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """Return the layer whose weight can be trained.

    Raises:
        StructureError: there is none of that name, or it is no `nn.Linear`.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        names = [each for each, found in model.named_modules() if isinstance(found, nn.Linear)]
        raise StructureError(f"qat: the model has no module '{name}'.{did_you_mean(name, names)}") from None
    if not isinstance(module, nn.Linear):
        raise StructureError(f"{name}: a {type(module).__name__} is no nn.Linear. Leave this site out of the training.")
    return module


def _prepared_modules(model: nn.Module) -> Iterator[tuple[str, QatLinear]]:
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, QatLinear))
