"""Stored tensors of quantized sites in compressed-tensors' layouts: there and back, their shapes, and what is refused.

That the package itself reads them the same way is checked in tests/oracles.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.model.layouts import compressed_tensors as ct
from bitwright.model.layouts.stored import StoredQuantization, ct_config, from_config
from bitwright.numerics.block_scales import BoundFp8Scale, FixedFp8Scale
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite, static_grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.schemes import MODEL_SCALE, Scheme

MODULE = "model.layers.0.mlp.down_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [
    f"W{bits}A16-{granularity}{symmetry}"
    for bits in range(2, 9)
    for granularity in ("tensor", "channel", "g16")
    for symmetry in ("", "-asym")
]
INT8 = [
    f"W8A8-{granularity}{symmetry}"
    for granularity in ("tensor", "channel", "g16", "block16x32")
    for symmetry in ("", "-asym")
]
FLOATS = ["fp8-tensor", "fp8-channel", "fp8-g16", "fp8-block16x32", "fp8-block32-a16"]
BLOCK_SCALED = ["mxfp8", "mxfp8-a16", "mxfp6", "mxfp6-a16", "mxfp4", "mxfp4-a16", "nvfp4", "nvfp4-a16"]
INPUTS = [
    "W8A8-acttensor", "W8A8-actg32", "W8A8-actasym", "W8A8-static-minmax", "W8A8-static-mse-actasym", "W4A4-g16",
    "W3A5-channel-static-minmax-actasym", "fp8-static", "fp8-actg32", "fp8-acttensor",
]  # fmt: skip
SCHEMES = [*INTEGERS, *INT8, *FLOATS, *BLOCK_SCALED, *INPUTS]


def random_site(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> QuantizedSite:
    """Every code, zero point and sign of scale may occur; both ends of an integer's range do."""
    weights, format = scheme.weights, cast(LevelFormat, scheme.weights.format)
    scale_shape = weights.granularity.scale_shape(*shape)
    steps = (0.5 + torch.rand(scale_shape)) * 0.01
    stored = None
    if weights.scale == MODEL_SCALE:
        scale = (steps * (torch.randint(0, 2, scale_shape) * 2 - 1)).to(dtype)
    else:
        bound = SCALE_FORMATS[weights.scale].bind(steps.max().double())
        scale = bound.round(steps)
        stored = bound.store(scale)
    zero_point = None
    if not format.symmetric:
        zero_point = torch.randint(0, 2 ** int(format.bits), scale_shape, dtype=torch.int32)
    grid = Grid(
        format=format,
        granularity=weights.granularity,
        in_features=shape[1],
        scale=scale,
        zero_point=zero_point,
        stored=stored,
    )
    return QuantizedSite(weight=QTensor(codes=random_codes(scheme, shape), grid=grid), inputs=inputs_of(scheme, shape))


def random_codes(scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    format = cast(LevelFormat, scheme.weights.format)
    if isinstance(format, IntegerFormat):
        codes = torch.randint(format.qmin, format.qmax + 1, shape, dtype=torch.int32)
        codes.view(-1)[:1], codes.view(-1)[-1:] = format.qmin, format.qmax
    else:
        codes = torch.randint(0, 2 ** int(format.bits), shape, dtype=torch.int32)
        codes[format.decode(codes.to(torch.uint8), None).isnan()] = 0
    return codes.to(format.code_dtype)


def inputs_of(scheme: Scheme, shape: tuple[int, int]) -> InputQuantizer | None:
    acts = scheme.activations
    if acts is None:
        return None
    static, scale = None, SCALE_FORMATS[acts.scale]
    if acts.is_static:
        low, high = torch.tensor([-1.5]), torch.tensor([2.25])
        static = static_grid(low, high, acts.format, acts.granularity, shape[1])
    elif acts.observer is not None:
        scale = FixedFp8Scale(bound=BoundFp8Scale(global_scale=torch.tensor([37.5])))
    return InputQuantizer(format=acts.format, granularity=acts.granularity, scale=scale, static=static)


def layout_of(scheme: Scheme, in_features: int = 96) -> str:
    layout = ct.layout_of(scheme, in_features, torch.bfloat16)
    assert layout is not None
    return layout


def read(scheme: Scheme, targets: tuple[str, ...] = ("Linear",), **changes: Any) -> StoredQuantization:
    """The reader of a checkpoint with one scheme, from its configuration as text."""
    config = ct_config([(scheme, layout_of(scheme), targets)], ["lm_head"]) | changes
    return from_config(json.loads(json.dumps(config)), Path("model"))


def stored_names(stored: Mapping[str, Tensor]) -> list[str]:
    return [f"{MODULE}.{name}" for name in stored]


def assert_equal(found: QuantizedSite, expected: QuantizedSite) -> None:
    assert torch.equal(found.weight.codes, expected.weight.codes)
    assert isinstance(found.weight.grid, Grid)
    assert isinstance(expected.weight.grid, Grid)
    assert_equal_grids(found.weight.grid, expected.weight.grid)
    if expected.inputs is None:
        assert found.inputs is None
        return
    assert found.inputs is not None
    assert found.inputs.format == expected.inputs.format
    assert found.inputs.granularity == expected.inputs.granularity
    assert found.inputs.scale.name == expected.inputs.scale.name
    if expected.inputs.static is not None:
        assert found.inputs.static is not None
        assert_equal_grids(found.inputs.static, expected.inputs.static)
    if isinstance(expected.inputs.scale, FixedFp8Scale):
        assert isinstance(found.inputs.scale, FixedFp8Scale)
        assert torch.equal(found.inputs.scale.bound.global_scale, expected.inputs.scale.bound.global_scale)


def assert_equal_grids(found: Grid, expected: Grid) -> None:
    assert (found.format, found.granularity) == (expected.format, expected.granularity)
    assert found.scale.dtype == expected.scale.dtype
    assert torch.equal(found.scale, expected.scale)
    assert (found.stored is None) == (expected.stored is None)
    if expected.zero_point is None:
        assert found.zero_point is None
    else:
        assert found.zero_point is not None
        assert found.zero_point.dtype == torch.int32
        assert torch.equal(found.zero_point, expected.zero_point)


@settings(max_examples=200)
@given(
    name=st.sampled_from(SCHEMES),
    num_rows=st.integers(1, 70),
    num_groups=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_decode_undoes_encode(name: str, num_rows: int, num_groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_rows * 10 + num_groups)
    scheme = Scheme.parse(name)
    site = random_site(scheme, (num_rows, 32 * num_groups), dtype)
    stored = ct.encode(layout_of(scheme), site)
    reader = read(scheme)
    assert sorted(reader.weights(stored_names(stored))[f"{MODULE}.weight"]) == sorted(stored_names(stored))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert reader.shape(f"{MODULE}.weight", shapes, stored) == (num_rows, 32 * num_groups)
    assert reader.quantizes_inputs == (scheme.activations is not None)
    assert_equal(reader.decode(f"{MODULE}.weight", stored), site)


@settings(max_examples=50)
@given(bits=st.integers(2, 8), asym=st.booleans(), num_rows=st.integers(1, 70), num_columns=st.integers(1, 70))
def test_rows_of_any_length_are_packed(bits: int, asym: bool, num_rows: int, num_columns: int) -> None:
    torch.manual_seed(bits * 1000 + num_rows * 100 + num_columns)
    scheme = Scheme.parse(f"W{bits}A16-channel{'-asym' if asym else ''}")
    site = random_site(scheme, (num_rows, num_columns))
    assert_equal(read(scheme).decode(f"{MODULE}.weight", ct.encode(ct.PACKED, site)), site)


SHAPES: dict[str, dict[str, tuple[torch.dtype, list[int]]]] = {
    "W3A16-g16": {
        "weight_packed": (torch.int32, [37, 9]),
        "weight_scale": (torch.bfloat16, [37, 6]),
        "weight_shape": (torch.int64, [2]),
    },
    "W3A16-g16-asym": {
        "weight_packed": (torch.int32, [37, 9]),
        "weight_scale": (torch.bfloat16, [37, 6]),
        "weight_shape": (torch.int64, [2]),
        "weight_zero_point": (torch.int32, [4, 6]),
    },
    "W4A16-tensor-asym": {
        "weight_packed": (torch.int32, [37, 12]),
        "weight_scale": (torch.bfloat16, [1]),
        "weight_shape": (torch.int64, [2]),
        "weight_zero_point": (torch.int8, [1]),
    },
    "W8A8-asym": {
        "weight": (torch.int8, [37, 96]),
        "weight_scale": (torch.bfloat16, [37, 1]),
        "weight_zero_point": (torch.int8, [37, 1]),
    },
    "W8A8-static-minmax-actasym": {
        "weight": (torch.int8, [37, 96]),
        "weight_scale": (torch.bfloat16, [37, 1]),
        "input_scale": (torch.float32, [1]),
        "input_zero_point": (torch.int8, [1]),
    },
    "fp8-block16x32": {
        "weight": (torch.float8_e4m3fn, [37, 96]),
        "weight_scale": (torch.bfloat16, [3, 3]),
    },
    "fp8-tensor-static": {
        "weight": (torch.float8_e4m3fn, [37, 96]),
        "weight_scale": (torch.bfloat16, [1]),
        "input_scale": (torch.float32, [1]),
    },
    "mxfp8": {"weight": (torch.float8_e4m3fn, [37, 96]), "weight_scale": (torch.uint8, [37, 3])},
    "mxfp6": {"weight_packed": (torch.uint8, [37, 72]), "weight_scale": (torch.uint8, [37, 3])},
    "mxfp4": {"weight_packed": (torch.uint8, [37, 48]), "weight_scale": (torch.uint8, [37, 3])},
    "nvfp4": {
        "weight_packed": (torch.uint8, [37, 48]),
        "weight_scale": (torch.float8_e4m3fn, [37, 6]),
        "weight_global_scale": (torch.float32, [1]),
        "input_global_scale": (torch.float32, [1]),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_stored_tensors_have_the_documented_shapes(name: str) -> None:
    scheme = Scheme.parse(name)
    stored = ct.encode(layout_of(scheme), random_site(scheme, (37, 96)))
    assert {part: (tensor.dtype, list(tensor.shape)) for part, tensor in stored.items()} == SHAPES[name]
    assert all(tensor.is_contiguous() for tensor in stored.values()), "safetensors refuses other layouts"


def test_fp6_codes_are_little_endian_in_three_bytes() -> None:
    scheme = Scheme.parse("mxfp6-a16")
    site = random_site(scheme, (1, 32))
    site.weight.codes[0, :4] = torch.tensor([0b000001, 0b000010, 0b000100, 0b101000], dtype=torch.uint8)
    packed = ct.encode(ct.MXFP6, site)["weight_packed"]
    assert packed[0, :3].tolist() == [0b10_000001, 0b0100_0000, 0b101000_00]


def test_fp4_codes_start_in_the_low_nibble() -> None:
    scheme = Scheme.parse("mxfp4-a16")
    site = random_site(scheme, (1, 32))
    site.weight.codes[0, :2] = torch.tensor([0x3, 0xE], dtype=torch.uint8)
    assert int(ct.encode(ct.MXFP4, site)["weight_packed"][0, 0]) == 0xE3


def number(bits: int, kind: str, strategy: str, size: int | None = None, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": size, **others}


E8M0 = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
FP8_SCALE = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "W4A16-g32-asym": (number(4, "int", "group", 32, symmetric=False), None),
    "W8A8": (number(8, "int", "channel"), number(8, "int", "token", dynamic=True)),
    "W4A8-g32-static-minmax-actasym": (
        number(4, "int", "group", 32),
        number(8, "int", "tensor", symmetric=False, dynamic=False),
    ),
    "fp8-block128-actg64": (
        number(8, "float", "block", block_structure=[128, 128]),
        number(8, "float", "group", 64, dynamic=True),
    ),
    "mxfp6": (number(6, "float", "group", 32, **E8M0), number(6, "float", "group", 32, **E8M0, dynamic=True)),
    "nvfp4": (
        number(4, "float", "tensor_group", 16, **FP8_SCALE),
        number(4, "float", "tensor_group", 16, **FP8_SCALE, dynamic="local"),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_a_config_group(name: str) -> None:
    scheme = Scheme.parse(name)
    weights, inputs = ARGUMENTS[name]
    layout = layout_of(scheme, 128)
    assert ct.arguments(scheme, layout) == {
        "weights": weights | {"dynamic": False, "actorder": None},
        "input_activations": None if inputs is None else inputs | {"actorder": None},
        "format": layout,
    }


def test_one_layout_names_the_whole_and_several_are_mixed() -> None:
    first, second = Scheme.parse("W8A8"), Scheme.parse("fp8")
    alone = ct_config([(first, ct.INT, ["a"]), (Scheme.parse("W8A8-asym"), ct.INT, ["b"])], [])
    mixed = ct_config([(first, ct.INT, ["a"]), (second, ct.FLOAT, ["b"])], [])
    assert alone["format"] == ct.INT
    assert mixed["format"] == "mixed-precision"
    assert [group["format"] for group in mixed["config_groups"].values()] == [ct.INT, ct.FLOAT]
    assert alone["quantization_status"] == mixed["quantization_status"] == "compressed"


def test_the_exact_group_comes_before_the_broad_one() -> None:
    exact, broad = Scheme.parse("W3A16-channel"), Scheme.parse("W8A16-channel")
    config = ct_config([(broad, ct.PACKED, ["re:model.*"]), (exact, ct.PACKED, [MODULE])], [])
    site = random_site(exact, (4, 32))
    assert_equal(from_config(config, Path("model")).decode(f"{MODULE}.weight", ct.encode(ct.PACKED, site)), site)


def test_a_weight_outside_every_group_is_refused() -> None:
    scheme = Scheme.parse("W3A16-channel")
    stored = ct.encode(ct.PACKED, random_site(scheme, (4, 32)))
    with pytest.raises(CheckpointError, match=r"no config group of quantization_config covers model\.layers\.0"):
        read(scheme, ("re:other",)).weights(stored_names(stored))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "gptq"}, "gptq, pack-quantized"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "format": "marlin-24"}}}, "marlin-24"),
        ({"config_groups": {}}, "compressed-tensors, pack-quantized"),
    ],
)
def test_other_layouts_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^model: the model is already quantized \(.*{named}"):
        read(Scheme.parse("W4A16-channel"), **change)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weights": None},
        {"weights": {"num_bits": 4, "strategy": "channel"}},
        {"weights": {"num_bits": 5, "type": "float", "symmetric": True, "strategy": "channel"}},
        {"weights": {"num_bits": 9, "type": "int", "symmetric": True, "strategy": "channel"}},
        {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "attn_head"}},
    ],
)
def test_a_group_that_cannot_be_read_is_refused(arguments: dict[str, Any]) -> None:
    group = {"targets": ["Linear"], "format": ct.PACKED, **arguments}
    with pytest.raises(CheckpointError, match=r"^model: quantization_config has a config group that cannot be read"):
        read(Scheme.parse("W4A16-channel"), config_groups={"group_0": group})


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_packing_of_straddling_widths_is_refused(bits: int) -> None:
    scheme = Scheme.parse(f"W{bits}A16-channel")
    stored = ct.encode(ct.PACKED, random_site(scheme, (4, 32)))
    with pytest.raises(CheckpointError, match=rf"{bits}-bit weights packed by compressed-tensors 0\.17\.1 use"):
        read(scheme, version="0.17.1").weights(stored_names(stored))
    assert read(scheme, version="0.18.0").weights(stored_names(stored))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_older_packing_of_other_widths_is_the_same(bits: int) -> None:
    scheme = Scheme.parse(f"W{bits}A16-channel")
    site = random_site(scheme, (4, 32))
    stored = ct.encode(ct.PACKED, site)
    reader = read(scheme, version="0.9")
    assert reader.weights(stored_names(stored))
    assert_equal(reader.decode(f"{MODULE}.weight", stored), site)


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name, parts in SHAPES.items() for part in parts if part != "weight_scale"],
)
def test_a_weight_without_one_of_its_parts_is_refused(name: str, part: str) -> None:
    """Engines would make it up: zeros for zero points, whatever memory holds for scales."""
    scheme = Scheme.parse(name)
    stored = ct.encode(layout_of(scheme), random_site(scheme, (37, 96)))
    del stored[part]
    with pytest.raises(CheckpointError, match=rf"^model: {MODULE}\.{part} is missing"):
        read(scheme).weights(stored_names(stored))


def test_a_packed_weight_without_scale_is_refused() -> None:
    scheme = Scheme.parse("W4A16-channel")
    stored = ct.encode(ct.PACKED, random_site(scheme, (4, 32)))
    del stored["weight_scale"]
    with pytest.raises(CheckpointError, match="weight_packed has no scale beside it"):
        read(scheme).weights(stored_names(stored))


def test_a_runtime_column_order_is_refused() -> None:
    """Codes of a checkpoint with `g_idx` mean another weight when read without it."""
    scheme = Scheme.parse("W4A16-g16")
    stored = ct.encode(ct.PACKED, random_site(scheme, (4, 32)))
    with pytest.raises(CheckpointError, match=r"_g_idx.*order"):
        read(scheme).weights([*stored_names(stored), f"{MODULE}.weight_g_idx"])


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_codes_of_another_float_are_refused(name: str) -> None:
    """Engines cast E5M2 to E4M3 without a word."""
    scheme = Scheme.parse(name)
    stored = ct.encode(layout_of(scheme), random_site(scheme, (4, 32)))
    stored["weight"] = stored["weight"].view(torch.float8_e5m2)
    with pytest.raises(CheckpointError, match=r"weights of torch\.float8_e5m2, which engines take for E4M3"):
        read(scheme).decode(f"{MODULE}.weight", stored)
