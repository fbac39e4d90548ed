"""The stored tensors of a quantized weight, against themselves and against compressed-tensors' own reader."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import CheckpointError
from bitwright.model import packed
from bitwright.model.packed import Packing
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor

NAME = "model.layers.0.mlp.down_proj.weight"
WIDTHS = range(2, 9)
GRANULARITIES = [
    Granularity(kind="tensor"),
    Granularity(kind="channel"),
    Granularity(kind="group", group_size=16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_qtensor(
    shape: tuple[int, int], bits: int, symmetric: bool, granularity: Granularity, dtype: torch.dtype = torch.float32
) -> QTensor:
    """Every code, zero point and sign of scale may occur; both ends of the code range do."""
    number = IntegerFormat(bits=bits, symmetric=symmetric)
    codes = torch.randint(number.qmin, number.qmax + 1, shape, dtype=torch.int32)
    codes.view(-1)[:1], codes.view(-1)[-1:] = number.qmin, number.qmax
    scale_shape = granularity.scale_shape(*shape)
    sign = torch.randint(0, 2, scale_shape) * 2 - 1
    scale = ((0.5 + torch.rand(scale_shape)) * sign * 0.01).to(dtype)
    zero_point = None if symmetric else torch.randint(0, 2**bits, scale_shape, dtype=torch.int32)
    grid = Grid(format=number, granularity=granularity, in_features=shape[1], scale=scale, zero_point=zero_point)
    return QTensor(codes=codes.to(number.code_dtype), grid=grid)


def packing_of(tensor: QTensor, **changes: Any) -> Packing:
    grid = tensor.grid
    group = packed.config_group(grid.format.bits, grid.format.symmetric, grid.granularity, ["Linear"])
    config = {**packed.quantization_config([group], []), **changes}
    return Packing.from_config(config, Path("model"))


def assert_equal(found: QTensor, expected: QTensor) -> None:
    assert found.grid.format == expected.grid.format
    assert found.grid.granularity == expected.grid.granularity
    assert torch.equal(found.codes, expected.codes)
    assert found.grid.scale.dtype == expected.grid.scale.dtype
    assert torch.equal(found.grid.scale, expected.grid.scale)
    if expected.grid.zero_point is None:
        assert found.grid.zero_point is None
    else:
        assert found.grid.zero_point is not None
        assert found.grid.zero_point.dtype == torch.int32
        assert torch.equal(found.grid.zero_point, expected.grid.zero_point)


@settings(max_examples=150)
@given(
    bits=st.sampled_from(WIDTHS),
    symmetric=st.booleans(),
    granularity=st.sampled_from([*GRANULARITIES, Granularity(kind="group", group_size=5)]),
    num_rows=st.integers(1, 70),
    num_columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_decode_undoes_encode(
    bits: int, symmetric: bool, granularity: Granularity, num_rows: int, num_columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits * 1000 + num_rows * 100 + num_columns)
    tensor = random_qtensor((num_rows, num_columns), bits, symmetric, granularity, dtype)
    stored = packed.encode(NAME, tensor)
    assert sorted(packing_of(tensor).weights(stored)[NAME]) == sorted(stored)
    assert_equal(packing_of(tensor).decode(NAME, stored), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: g.kind)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_reads_the_same_weight(
    bits: int, symmetric: bool, granularity: Granularity, dtype: torch.dtype
) -> None:
    """The oracle: the package's own decompressor on our stored tensors gives our weight to the last bit."""
    pytest.importorskip("compressed_tensors")
    base: Any = importlib.import_module("compressed_tensors.compressors.pack_quantized.base")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    tensor = random_qtensor((37, 80), bits, symmetric, granularity, dtype)
    group = packed.config_group(bits, symmetric, granularity, ["Linear"])
    scheme = quantization.QuantizationScheme(
        targets=group["targets"], weights=quantization.QuantizationArgs(**group["weights"]), format=group["format"]
    )
    local = {
        name.removeprefix(NAME.removesuffix("weight")): value for name, value in packed.encode(NAME, tensor).items()
    }
    weight = base.PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    assert weight.dtype == dtype
    assert torch.equal(weight, tensor.dequantize(dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_stored_tensors_have_the_documented_shapes(bits: int, symmetric: bool) -> None:
    stored = packed.encode(NAME, random_qtensor((37, 80), bits, symmetric, GRANULARITIES[2]))
    shapes = {name.removeprefix(NAME): (value.dtype, list(value.shape)) for name, value in stored.items()}
    expected = {
        "_packed": (torch.int32, [37, -(-80 * bits // 32)]),
        "_scale": (torch.float32, [37, 5]),
        "_shape": (torch.int64, [2]),
    }
    if not symmetric:
        expected["_zero_point"] = (torch.int32, [-(-37 * bits // 32), 5])
    assert shapes == expected
    assert all(value.is_contiguous() for value in stored.values()), "safetensors refuses other layouts"


def test_the_exact_group_comes_before_the_broad_one() -> None:
    tensor = random_qtensor((4, 32), 3, True, GRANULARITIES[1])
    broad = packed.config_group(8, True, GRANULARITIES[1], ["re:model.*"])
    exact = packed.config_group(3, True, GRANULARITIES[1], [NAME.removesuffix(".weight")])
    packing = Packing.from_config(packed.quantization_config([broad, exact], []), Path("model"))
    assert_equal(packing.decode(NAME, packed.encode(NAME, tensor)), tensor)


def test_a_weight_outside_every_group_is_refused() -> None:
    tensor = random_qtensor((4, 32), 3, True, GRANULARITIES[1])
    group = packed.config_group(3, True, GRANULARITIES[1], ["re:other"])
    packing = Packing.from_config(packed.quantization_config([group], []), Path("model"))
    with pytest.raises(CheckpointError, match=r"no config group of quantization_config covers model\.layers\.0"):
        packing.decode(NAME, packed.encode(NAME, tensor))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "gptq"}, "gptq, pack-quantized"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "format": "nvfp4-pack-quantized"}}}, "nvfp4"),
        ({"config_groups": {}}, "pack-quantized"),
    ],
)
def test_other_layouts_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"^model: the model is already quantized .*{named}"):
        packing_of(random_qtensor((4, 32), 4, True, GRANULARITIES[1]), **change)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_packing_of_straddling_widths_is_refused(bits: int) -> None:
    tensor = random_qtensor((4, 32), bits, True, GRANULARITIES[1])
    with pytest.raises(
        CheckpointError, match=rf"{bits}-bit weights packed by compressed-tensors 0\.16\.1 use an older"
    ):
        packing_of(tensor, version="0.16.1").decode(NAME, packed.encode(NAME, tensor))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_older_packing_of_other_widths_is_the_same(bits: int) -> None:
    tensor = random_qtensor((4, 32), bits, True, GRANULARITIES[1])
    assert_equal(packing_of(tensor, version="0.9").decode(NAME, packed.encode(NAME, tensor)), tensor)


@pytest.mark.parametrize("part", ["_scale", "_shape"])
def test_a_packed_weight_without_its_parts_is_refused(part: str) -> None:
    tensor = random_qtensor((4, 32), 4, True, GRANULARITIES[1])
    stored = packed.encode(NAME, tensor)
    del stored[NAME + part]
    with pytest.raises(CheckpointError, match="has no scale or shape beside it"):
        packing_of(tensor).weights(stored)


def test_a_runtime_column_order_is_refused() -> None:
    """Codes of a checkpoint with `g_idx` mean another weight when read without it."""
    tensor = random_qtensor((4, 32), 4, True, GRANULARITIES[2])
    stored = {**packed.encode(NAME, tensor), NAME + "_g_idx": torch.zeros(32, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"_g_idx.*order"):
        packing_of(tensor).weights(stored)
