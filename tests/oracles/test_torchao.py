"""torchao as the oracle of affine integers: ranges, codes and dequantized numbers.

It finds scales in float32 where we use float64, and multiplies by the reciprocal of the scale where we divide. So
scales may differ in the last bits, and a weight within rounding of a border between two codes may get either.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.ranges import fit_grid

primitives: Any = pytest.importorskip("torchao.quantization.quant_primitives")

SHAPE = (48, 192)
GRANULARITIES = {
    "tensor": (Granularity(kind="tensor"), SHAPE),
    "channel": (Granularity(kind="channel"), (1, SHAPE[1])),
    "group": (Granularity(kind="group", group_size=32), (1, 32)),
    "block": (Granularity(kind="block", group_size=64, block_rows=16), (16, 64)),
}

every_case = pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [(bits, symmetric, kind) for bits in range(2, 9) for symmetric in (True, False) for kind in GRANULARITIES],
)


EPS = torch.finfo(torch.float32).eps


def clear_of_borders(steps: Tensor, bits: int) -> Tensor:
    """Where a few roundings of numbers as large as the codes cannot change which integer is nearest."""
    return (steps - steps.floor() - 0.5).abs() > 4 * 2.0**bits * EPS


def case(bits: int, symmetric: bool, kind: str) -> tuple[Tensor, Grid, dict[str, Any]]:
    """A weight, our min-max grid of it, and what torchao calls the same granularity and range."""
    weight = torch.randn(SHAPE) * torch.exp(torch.randn(SHAPE[0], 1)) * 0.02
    # Symmetric ranges of the two agree where both sides are alike.
    format = IntegerFormat(bits=bits, symmetric=symmetric, full_range=not symmetric)
    granularity, block = GRANULARITIES[kind]
    theirs = {"block_size": block, "quant_min": format.qmin, "quant_max": format.qmax}
    return weight, fit_grid(weight, format, granularity), theirs


def points(grid: Grid) -> dict[str, Tensor]:
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    return {"scale": grid.scale, "zero_point": zero_point}


@every_case
def test_ranges(bits: int, symmetric: bool, kind: str) -> None:
    weight, grid, theirs = case(bits, symmetric, kind)
    mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    scale, zero_point = primitives.choose_qparams_affine(
        weight, mapping, target_dtype=grid.format.code_dtype, eps=1e-12, keepdim=True, **theirs
    )
    scale, zero_point = scale.view(grid.scale.shape), zero_point.view(grid.scale.shape)
    # Three roundings there, one here, each of half of EPS.
    assert bool(((scale - grid.scale).abs() <= 2 * EPS * grid.scale).all())
    if grid.zero_point is None:
        assert not bool(zero_point.any())
        return
    lowest = grid.granularity.split(weight).amin(-1).clamp(max=0)
    clear = clear_of_borders(lowest / grid.scale, bits)
    assert bool(clear.any())
    assert zero_point[clear].equal(grid.zero_point[clear])
    assert bool(((zero_point - grid.zero_point).abs() <= 1).all())


@every_case
def test_codes(bits: int, symmetric: bool, kind: str) -> None:
    weight, grid, theirs = case(bits, symmetric, kind)
    for x in (weight, 3 * weight):  # the second one beyond the range
        codes = primitives.quantize_affine(x, output_dtype=grid.format.code_dtype, **points(grid), **theirs)
        ours = grid.quantize(x)
        steps = grid.granularity.split(x) / grid.scale.unsqueeze(-1)
        clear = grid.granularity.join(clear_of_borders(steps, bits), *SHAPE)
        assert bool(clear.any())
        assert codes[clear].equal(ours[clear])
        assert bool(((codes.int() - ours.int()).abs() <= 1).all())


@every_case
def test_dequantized_numbers(bits: int, symmetric: bool, kind: str) -> None:
    _, grid, theirs = case(bits, symmetric, kind)
    number = grid.format
    assert isinstance(number, IntegerFormat)
    codes = torch.randint(number.qmin, number.qmax + 1, SHAPE).to(number.code_dtype)
    for dtype in (torch.float32, torch.bfloat16):
        found = primitives.dequantize_affine(
            codes, input_dtype=codes.dtype, output_dtype=dtype, **points(grid), **theirs
        )
        assert found.equal(grid.dequantize(codes, dtype))
