"""The product with a frozen packed weight: its value, its gradient, and what it does not keep."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from bitwright.model.layouts import own
from bitwright.nn.frozen import frozen_linear
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.fitting import fit
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import FloatColumns, InputQuantizer, InputTransform, QuantizedSite
from bitwright.numerics.low_rank import LowRank
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import MODEL_SCALE, Scheme

WEIGHT_ONLY = ("W4A16-g32", "W4A16-g16-floatzero", "nf4", "nf4-b64-dq", "kmeans2-g32", "lut3-g16", "ternary-g32")
QUANTIZED_INPUTS = ("W8A8", "W4A4-g16", "fp8", "mxfp4")
OUT, IN = 24, 96


def site_of(scheme: Scheme, weight: Tensor, dtype: torch.dtype) -> QuantizedSite:
    weights = scheme.weights
    scale = FloatScale(dtype) if weights.scale == MODEL_SCALE else SCALE_FORMATS[weights.scale]
    grid = fit(weight, weights.format, weights.granularity, method="minmax", importance=None, scale=scale)
    codes = grid.quantize(weight)
    if isinstance(grid, Grid) and scale.stored_afterwards:
        grid = store_scale(grid, scale)
    acts = scheme.activations
    inputs = None
    if acts is not None:
        inputs = InputQuantizer(format=acts.format, granularity=acts.granularity, scale=own.input_scale(acts))
    return QuantizedSite(weight=QTensor(codes=codes, grid=grid), inputs=inputs)


def layer_of(name: str, dtype: torch.dtype = torch.float32, **extras: object) -> QuantizedLinear:
    scheme = Scheme.parse(name)
    plain = site_of(scheme, torch.randn(OUT, IN), dtype)
    site = QuantizedSite(weight=plain.weight, inputs=plain.inputs, **extras)  # pyright: ignore[reportArgumentType]
    stored = {own.GUARD: own.guard(dtype), **own.encode(site)}
    return QuantizedLinear(scheme, OUT, IN, stored, torch.randn(OUT).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *QUANTIZED_INPUTS])
def test_value_is_that_of_the_layer_and_the_gradient_that_of_its_weight(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, dtype)
    x = torch.randn(2, 3, IN).to(dtype).requires_grad_()
    y = frozen_linear(x, layer)
    assert torch.equal(y, layer(x.detach()))
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, dy @ layer.site().dense(dtype))


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_the_gradient_is_the_derivative(name: str) -> None:
    layer = layer_of(name)
    layer.bias = None
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda inputs: frozen_linear(inputs, layer), (x,))  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.parametrize(
    "extras",
    [
        {"correction": torch.ones(OUT)},
        {"transform": InputTransform(scale=torch.linspace(0.5, 2, IN), hadamard=32)},
        {"columns": FloatColumns(index=torch.tensor([3, 40], dtype=torch.int32), weight=torch.ones(OUT, 2))},
        {"low_rank": LowRank(a=torch.ones(2, IN), b=torch.ones(OUT, 2))},
    ],
    ids=lambda extras: next(iter(cast(dict[str, object], extras))),
)
def test_what_a_site_has_besides_its_codes_is_in_the_gradient(extras: dict[str, object]) -> None:
    layer = layer_of("W8A16-channel", **extras)
    x = torch.randn(5, IN, requires_grad=True)
    (kept,) = torch.autograd.grad(frozen_linear(x, layer).sum(), x)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(kept, plain)


def test_quantized_inputs_count_as_if_they_were_not() -> None:
    """Dynamic scales alone would give some gradient; the codes give none, so the layer itself cannot be trained."""
    layer = layer_of("W8A8")
    x = torch.randn(5, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(frozen_linear(x, layer)[0].sum(), x)
    torch.testing.assert_close(gradient[0], layer.site().dense().sum(0))
    assert not gradient[1:].any()


def test_nothing_is_kept_for_backward() -> None:
    layer = layer_of("nf4")
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        frozen_linear(x, layer)
        assert not kept
        layer(x)
    assert any(tensor.numel() == OUT * IN for tensor in kept), "the layer as it is keeps its dense weight"


def test_inputs_that_need_no_gradient_get_none() -> None:
    layer = layer_of("nf4")
    assert not frozen_linear(torch.randn(5, IN), layer).requires_grad


def test_autocast_changes_value_and_gradient_as_it_does_for_the_layer() -> None:
    layer = layer_of("W4A16-g32")
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = frozen_linear(x, layer), layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == torch.float32


def test_a_model_trains_through_a_frozen_layer() -> None:
    before, layer = nn.Linear(IN, IN), layer_of("nf4")
    x = torch.randn(4, IN)
    frozen_linear(before(x), layer).square().sum().backward()
    dense = layer.dequantized().requires_grad_(False)
    (expected,) = torch.autograd.grad(dense(before(x)).square().sum(), before.weight)
    assert before.weight.grad is not None
    torch.testing.assert_close(before.weight.grad, expected)
