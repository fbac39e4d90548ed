"""bitsandbytes as the oracle: every stored byte and every dequantized value, bit for bit.

Its CPU kernels quantize nested scales by way of 65536 bins (`rounding="binned"` here). Its fallback for other dtypes
takes the nearest value, as its CUDA kernels do, and is the oracle of `rounding="nearest"`.
"""

from typing import Any

import pytest
import torch

from bitwright.numerics.granularity import Granularity
from bitwright.numerics.nested import NestedScale, StoredNestedScale, dynamic_map
from bitwright.numerics.nibbles import pack_high_first, unpack_high_first
from bitwright.numerics.ranges import fit_grid, store_scale
from bitwright.numerics.scales import FloatScale
from bitwright.numerics.table import FP4_BNB, NF4, TableFormat

functional: Any = pytest.importorskip("bitsandbytes.functional")

NAMES = {"nf4": NF4, "fp4": FP4_BNB}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 128), (96, 512), (257, 640)]

every_case = pytest.mark.parametrize(
    ("quant_type", "block_size", "dtype", "shape"),
    [
        (quant_type, block_size, dtype, shape)
        for quant_type in NAMES
        for block_size in (32, 64, 128, 256)
        for dtype in DTYPES
        for shape in SHAPES
        if shape[1] % block_size == 0
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


def random_weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes with heavy tails, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], 1, generator=generator).mul(0.5).exp()
    tails = torch.randn(*shape, generator=generator).mul(0.3).exp()
    return (torch.randn(*shape, generator=generator) * rows * tails * 0.02).to(dtype)


def dequantize(codes: torch.Tensor, format: TableFormat, scale: torch.Tensor) -> torch.Tensor:
    values = format.decode(codes, None)
    return (values.view(*scale.shape, -1) * scale.unsqueeze(-1)).view(codes.shape)


def neighbours(x: torch.Tensor, distance: int) -> torch.Tensor:
    end = torch.full_like(x, torch.inf if distance > 0 else -torch.inf)
    for _ in range(abs(distance)):
        x = torch.nextafter(x, end)
    return x


def quantize_blocks(
    weight: torch.Tensor, format: TableFormat, *, block_size: int, nested: NestedScale | None = None
) -> tuple[torch.Tensor, torch.Tensor, StoredNestedScale | None]:
    """What round to nearest with range method minmax makes of a weight: codes, float scales, stored scales."""
    granularity = Granularity(kind="group", group_size=block_size)
    grid = fit_grid(weight, format, granularity, method="minmax", scale=nested or FloatScale(torch.float32))
    codes = grid.quantize(weight)
    if nested is None:
        return codes, grid.scale, None
    stored = store_scale(grid, nested).stored
    assert isinstance(stored, StoredNestedScale)
    return codes, grid.scale, stored


@pytest.mark.parametrize("quant_type", NAMES)
def test_tables(quant_type: str) -> None:
    assert torch.tensor(NAMES[quant_type].values).equal(functional.get_4bit_type(quant_type, device="cpu"))


def test_the_normal_map() -> None:
    assert torch.tensor(NF4.values).equal(functional.create_normal_map().unique())


def test_the_dynamic_map() -> None:
    assert torch.tensor(dynamic_map()).equal(functional.create_dynamic_map())


@every_case
def test_float_scales(quant_type: str, block_size: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random_weight(shape, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
    codes, scale, stored = quantize_blocks(weight, NAMES[quant_type], block_size=block_size)
    assert stored is None
    assert pack_high_first(codes).equal(packed.flatten())
    assert scale.flatten().equal(state.absmax)
    ours = dequantize(codes, NAMES[quant_type], scale).to(dtype)
    assert ours.equal(functional.dequantize_4bit(packed, state))


@every_case
def test_nested_scales(quant_type: str, block_size: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random_weight(shape, dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=True
    )
    codes, _, stored = quantize_blocks(
        weight, NAMES[quant_type], block_size=block_size, nested=NestedScale(rounding="binned")
    )
    assert stored is not None
    assert pack_high_first(codes).equal(packed.flatten())
    assert stored.scale.flatten().equal(state.absmax)
    assert stored.nested_absmax.equal(state.state2.absmax)
    assert stored.nested_offset[0].equal(state.offset)
    assert state.state2.blocksize == stored.block
    ours = dequantize(codes, NAMES[quant_type], stored.values()).to(dtype)
    assert ours.equal(functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nested_scales_rounded_to_nearest_are_read_alike(quant_type: str, dtype: torch.dtype) -> None:
    weight = random_weight((257, 640), dtype)
    codes, scale, stored = quantize_blocks(weight, NAMES[quant_type], block_size=64, nested=NestedScale())
    assert stored is not None
    deviation = (scale - scale.mean()).flatten().double()
    table = functional.create_dynamic_map()
    nearest, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise(deviation, table, 256)
    assert stored.scale.flatten().equal(nearest)
    assert stored.nested_absmax.equal(nested_absmax)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    assert pack_high_first(codes).equal(packed.flatten())
    assert not stored.scale.flatten().equal(state.absmax)  # else this test adds nothing to the one above
    state.absmax = stored.scale.flatten()
    ours = dequantize(codes, NAMES[quant_type], stored.values()).to(dtype)
    assert ours.equal(functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", NAMES)
@pytest.mark.parametrize("distance", range(-3, 4))
def test_neighbours_of_every_border(quant_type: str, distance: int) -> None:
    format = NAMES[quant_type]
    levels = torch.tensor(format.levels)
    near = neighbours((levels[:-1] + levels[1:]) / 2, distance)
    # A first weight of 1 makes the scale 1, so that weights arrive at the table as they are.
    weight = torch.nn.functional.pad(torch.cat([torch.ones(1), near]), (0, 64 - 1 - near.numel())).view(1, 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    assert state.absmax.tolist() == [1.0]
    assert format.encode(weight, None).flatten().equal(unpack_high_first(packed, 64))


@pytest.mark.parametrize("quant_type", NAMES)
def test_every_code_is_read_alike(quant_type: str) -> None:
    format = NAMES[quant_type]
    packed = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    scale = random_weight((8, 1), torch.float32).abs()
    state = functional.QuantState(
        absmax=scale.flatten(), shape=torch.Size([8, 64]), dtype=torch.float32, blocksize=64, quant_type=quant_type
    )
    ours = dequantize(unpack_high_first(packed, 512).view(8, 64), format, scale)
    assert ours.equal(functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", NAMES)
def test_blocks_of_zeros(quant_type: str) -> None:
    """bitsandbytes stores the scale 0 for them; ours must not be 0, and nothing else may change."""
    weight = random_weight((64, 256), torch.bfloat16)
    weight[5] = 0
    weight[9, 64:128] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    codes, _, stored = quantize_blocks(weight, NAMES[quant_type], block_size=64, nested=NestedScale(rounding="binned"))
    assert stored is not None
    assert pack_high_first(codes).equal(packed.flatten())
    assert stored.nested_offset[0].equal(state.offset)
    assert stored.nested_absmax.equal(state.state2.absmax)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2).add_(state.offset).view(stored.scale.shape)
    positive = theirs > 0
    assert stored.values()[positive].equal(theirs[positive])
    assert not (~positive & (weight.view(64, 4, 64) != 0).any(-1)).any()
    ours = dequantize(codes, NAMES[quant_type], stored.values()).bfloat16()
    assert ours.equal(functional.dequantize_4bit(packed, state))


def test_only_scales_that_bitsandbytes_makes_zero_or_negative_differ() -> None:
    weight = random_weight((64, 256), torch.float32)
    weight[3, 5] = 100
    weight[::2, 128:192] *= 1e-3
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, scale, stored = quantize_blocks(weight, NF4, block_size=64, nested=NestedScale(rounding="binned"))
    assert stored is not None
    theirs = functional.dequantize_blockwise(state.absmax, state.state2).add_(state.offset).view(scale.shape)
    negative = theirs <= 0
    assert bool(negative.any())  # else this tests nothing
    assert stored.values()[~negative].equal(theirs[~negative])
    assert bool((stored.values() > 0).all())
    assert pack_high_first(codes).equal(packed.flatten())


def test_odd_counts_are_padded_with_the_code_of_zero() -> None:
    for quant_type, format in NAMES.items():
        weight = random_weight((1, 63), torch.float32)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
        # A partial block is divided, not multiplied by the reciprocal.
        codes = format.encode(weight / state.absmax, None)
        zero = int(format.encode(torch.zeros(1), None))
        assert pack_high_first(codes, padding=zero).equal(packed.flatten())


@pytest.mark.parametrize("num_scales", [1, 100, 256, 257, 5000])
def test_stored_scales_of_any_number(num_scales: int) -> None:
    scale = random_weight((num_scales, 1), torch.float32).abs() + 0.01
    offset = scale.mean()
    codes, state = functional.quantize_blockwise((scale - offset).flatten(), blocksize=256)
    stored = NestedScale(rounding="binned").store(scale)
    assert isinstance(stored, StoredNestedScale)
    assert stored.scale.flatten().equal(codes)
    assert stored.nested_absmax.equal(state.absmax)
    assert stored.values().flatten().equal(functional.dequantize_blockwise(codes, state) + offset)
