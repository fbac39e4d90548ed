"""The packed linear layer, and the stored tensors that it is made of, for every family of schemes."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import CheckpointError
from bitwright.kernels import reference
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.block_scales import FixedFp8Scale
from bitwright.numerics.fitting import fit
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite, static_grid
from bitwright.numerics.outliers import split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import FAMILIES, MODEL_SCALE, ActivationScheme, Scheme

OTHERS = (
    "W4A16-g32", "W3A16-g7-asym", "W4A16-tensor-asym", "W4A16-g16-floatzero", "W8A8-floatzero",
    "W5A16-block8x16-asym", "W8A8", "W8A8-static-minmax-actasym", "W8A8-static-minmax-actg32", "W4A4-g16",
    "fp8-block16x8", "nf4-b64-dq", "lut3-g16-dq", "kmeans4-g16-o0.45", "kmeans2-g32-o5", "kmeans3-tensor",
    "ternary-channel", "binary-tensor", "nvfp4-a16", "mxfp4-a16",
)  # fmt: skip
SCHEMES = (*FAMILIES, *OTHERS)
WEIGHT_ONLY = [name for name in SCHEMES if Scheme.parse(name).activations is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (24, 88)


def quantized(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedSite:
    """A random weight of a model in `dtype`, rounded to nearest."""
    weights = scheme.weights
    weight, outliers = torch.randn(shape), None
    if weights.outliers:
        weight, outliers = split_outliers(weight, weights.outliers, dtype=dtype)
    scale = FloatScale(dtype) if weights.scale == MODEL_SCALE else SCALE_FORMATS[weights.scale]
    grid = fit(weight, weights.format, weights.granularity, method="minmax", importance=None, scale=scale)
    codes = grid.quantize(weight)
    if isinstance(grid, Grid) and scale.stored_afterwards:
        grid = store_scale(grid, scale)
    inputs = None if scheme.activations is None else input_quantizer(scheme.activations, shape[1])
    return QuantizedSite(weight=QTensor(codes=codes, grid=grid, outliers=outliers), inputs=inputs)


def input_quantizer(acts: ActivationScheme, in_features: int) -> InputQuantizer:
    static, scale = None, own.input_scale(acts)
    if acts.is_static:
        num_groups = acts.granularity.num_groups(in_features)
        ends = torch.full((num_groups,), -1.5), torch.full((num_groups,), 2.25)
        static = static_grid(*ends, acts.format, acts.granularity, in_features)
    elif acts.observer is not None:
        scale = FixedFp8Scale.for_largest(torch.tensor(0.5, dtype=torch.float64))
    return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale, static=static)


def stored_of(site: QuantizedSite, dtype: torch.dtype) -> dict[str, Tensor]:
    return {own.GUARD: own.guard(dtype), **own.encode(site)}


def layer_of(
    name: str, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> tuple[QuantizedLinear, QuantizedSite]:
    scheme = Scheme.parse(name)
    site = quantized(scheme, SHAPE, dtype)
    given = torch.randn(SHAPE[0]).to(dtype) if bias else None
    return QuantizedLinear(scheme, *SHAPE, stored_of(site, dtype), given), site


def described(stored: Mapping[str, Tensor]) -> dict[str, own.Stored]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}


def assert_bits_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_computes_what_its_site_means(name: str, dtype: torch.dtype) -> None:
    layer, site = layer_of(name, dtype)
    x = torch.randn(2, 3, SHAPE[1]).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, reference.linear(x, site, layer.bias))
    assert torch.equal(layer(x[0]), reference.linear(x[0], site, layer.bias)), "inputs of two dimensions"


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_a_layer_without_quantized_inputs_is_its_dense_layer(name: str) -> None:
    layer, site = layer_of(name, torch.bfloat16, bias=False)
    dense = layer.dequantized()
    x = torch.randn(5, SHAPE[1]).bfloat16()
    assert type(dense) is nn.Linear
    assert dense.bias is None
    assert dense.weight.dtype == torch.bfloat16
    assert torch.equal(dense.weight, site.weight.dequantize(torch.bfloat16))
    assert torch.equal(layer(x), functional.linear(x, dense.weight))
    assert torch.equal(layer(x), dense(x))


def test_a_dense_layer_of_another_dtype() -> None:
    layer, site = layer_of("nf4", torch.bfloat16)
    dense = layer.dequantized(torch.float32)
    assert layer.bias is not None
    assert torch.equal(dense.weight, site.weight.dequantize(torch.float32))
    assert torch.equal(dense.bias, layer.bias.float())
    assert dense.weight.requires_grad
    assert (dense.in_features, dense.out_features) == (layer.in_features, layer.out_features)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_state_is_what_is_stored_and_a_call_adds_nothing_to_it(name: str) -> None:
    layer, site = layer_of(name, torch.bfloat16)
    expected = stored_of(site, torch.bfloat16)
    layer(torch.randn(2, SHAPE[1]).bfloat16())
    state = layer.state_dict()
    state.pop("bias")
    assert_bits_equal(state, expected)
    held = [*layer.buffers(), *layer.parameters(), *(v for v in vars(layer).values() if isinstance(v, Tensor))]
    assert sum(t.nbytes for t in held) == sum(t.nbytes for t in expected.values()) + 2 * SHAPE[0]
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_cast_moves_bias_and_guard_and_no_stored_number(name: str, dtype: torch.dtype) -> None:
    layer, site = layer_of(name, torch.bfloat16)
    before = own.encode(site)
    layer.to(dtype)
    layer.to("cpu")
    assert layer.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    after = layer.stored()
    assert after.pop(own.GUARD).dtype == dtype
    assert_bits_equal(after, before)
    assert layer(torch.randn(2, SHAPE[1]).to(dtype)).dtype == dtype


def test_a_layer_moves_to_another_device() -> None:
    layer, _ = layer_of("lut3-g16-dq")
    expected = described(layer.stored())
    layer.to("meta", torch.float32)
    assert described(layer.stored()) == expected
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_inputs_of_a_layer_have_a_gradient() -> None:
    layer, site = layer_of("W4A16-g32")
    x = torch.randn(3, SHAPE[1], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (torch.ones(3, SHAPE[0]) @ site.weight.dequantize()))


def test_a_layer_says_what_it_is() -> None:
    layer, _ = layer_of("nf4-b64-dq", bias=False)
    assert repr(layer) == "QuantizedLinear(in_features=88, out_features=24, bias=False, scheme=nf4-g64-dq)"


@settings(max_examples=150)
@given(
    name=st.sampled_from(SCHEMES),
    num_rows=st.integers(1, 40),
    in_features=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_stored_is_what_is_expected(name: str, num_rows: int, in_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_rows * 100 + in_features)
    scheme = Scheme.parse(name)
    stored = stored_of(quantized(scheme, (num_rows, in_features), dtype), dtype)
    own.check_stored("m", scheme, num_rows, in_features, described(stored))
    assert own.needed_tensors(scheme) == {part for part in stored if not part.startswith("weight_outlier_")}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_other_tensor_is_refused(name: str) -> None:
    scheme = Scheme.parse(name)
    sound = described(stored_of(quantized(scheme, SHAPE, torch.bfloat16), torch.bfloat16))
    for part, (shape, dtype) in sound.items():
        with pytest.raises(CheckpointError, match=rf"^m\.\w+: is missing; the module is in {scheme}"):
            own.check_stored("m", scheme, *SHAPE, {key: value for key, value in sound.items() if key != part})
        with pytest.raises(CheckpointError, match=r"^m\.weight_\w+: torch|^m\.input_\w+: torch|^m\.weight: torch"):
            own.check_stored("m", scheme, *SHAPE, sound | {part: ((*shape[:-1], shape[-1] + 1), dtype)})
        with pytest.raises(
            CheckpointError, match=rf"^m\.{part}: torch\.float64 .* a weight \[24, 88\] in {scheme} has"
        ):
            own.check_stored("m", scheme, *SHAPE, sound | {part: (shape, torch.float64)})
    with pytest.raises(CheckpointError, match=r"^m\.weight_extra: is not part of it"):
        own.check_stored("m", scheme, *SHAPE, sound | {"weight_extra": ((1,), torch.float32)})


def test_outliers_by_row_and_flat_are_both_expected() -> None:
    """Which layout is smaller depends on how many there are."""
    found: set[str] = set()
    for name in ("kmeans4-g16-o0.45", "kmeans2-g32-o5"):
        found |= set(stored_of(quantized(Scheme.parse(name), SHAPE, torch.bfloat16), torch.bfloat16))
    assert {"weight_outlier_index", "weight_outlier_row_start", "weight_outlier_column"} <= found


def test_the_guard_has_the_shape_of_no_weight() -> None:
    assert own.guard(torch.bfloat16).shape == (0,)
    assert own.guard(torch.bfloat16).dtype == torch.bfloat16
