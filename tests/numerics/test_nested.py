import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.nested import NestedScale, Rounding, StoredNestedScale, dynamic_map

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
# Half the widest gap of the map, and of the 65536 values that `binned` rounds to first.
HALF_GAP = 0.9 / 64 / 2
HALF_BIN = 1 / 65535

roundings = pytest.mark.parametrize("rounding", ["nearest", "binned"])


def random_scales(*shape: int, spread: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(spread).exp()


def raw_values(scale: torch.Tensor, block: int) -> torch.Tensor:
    """What nearest codes alone give, in float64 and by brute force, without a care for the sign."""
    flat = scale.flatten().double()
    offset = flat.mean()
    table = torch.tensor(dynamic_map(), dtype=torch.float64)
    parts = []
    for part in (flat - offset).split(block):
        absmax = part.abs().max()
        parts.append(table[(part[:, None] / absmax - table).abs().argmin(1)] * absmax + offset)
    return torch.cat(parts).view(scale.shape)


def test_the_map_has_seven_decades() -> None:
    values = torch.tensor(dynamic_map(), dtype=torch.float64)
    assert values.shape == (256,)
    assert values.equal(values.sort().values)
    assert values[127] == 0
    assert values[255] == 1
    assert values[:127].equal(-values[128:255].flip(0))
    for decade in range(7):
        top = 10.0 ** (decade - 6)
        inside = values[(values > top / 10) & (values < top)]
        step = 0.9 * top / 2**decade
        expected = top / 10 + step * (torch.arange(2**decade, dtype=torch.float64) + 0.5)
        assert torch.allclose(inside, expected, rtol=4 * EPS, atol=0)


@roundings
@settings(deadline=None)
@given(
    scales=st.lists(st.floats(0.5, 1, width=32), min_size=1, max_size=60),
    block=st.integers(1, 70),
    power=st.integers(-60, 60),
)
def test_the_error_is_bounded_and_scales_stay_positive(
    rounding: Rounding, scales: list[float], block: int, power: int
) -> None:
    scale = torch.tensor([scales]) * 2.0**power
    stored = NestedScale(block=block, rounding=rounding).store(scale)
    values = stored.values()
    assert values.dtype == torch.float32
    assert values.shape == scale.shape
    assert bool((values > 0).all())
    step = HALF_GAP + (HALF_BIN if rounding == "binned" else 0)
    absmax = (scale - stored.nested_offset).abs().flatten()
    bound = torch.cat([part.max().expand(part.numel()) for part in absmax.split(block)]) * step
    assert bool(((values - scale).abs() <= bound + 4 * EPS * scale.max()).all())


@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (1, 257), (64, 16), (7, 111)])
def test_the_nearest_value_is_taken(shape: tuple[int, int]) -> None:
    scale = random_scales(*shape)
    stored = NestedScale().store(scale)
    values, nearest = stored.values().double(), raw_values(scale, 256) if scale.numel() > 1 else scale.double()
    # Rounding of the deviation and of the sum, which moves a tie as well.
    slack = 8 * EPS * scale.max()
    assert bool(((values - scale).abs() <= (nearest - scale).abs() + slack).all())


def test_layout_and_size() -> None:
    scale = random_scales(64, 17)
    stored = NestedScale().store(scale)
    assert stored.scale.dtype == torch.uint8
    assert stored.scale.shape == (64, 17)
    assert stored.nested_absmax.shape == (5,)
    assert stored.nested_offset.equal(scale.flatten().mean().reshape(1))
    blocks = (scale - stored.nested_offset).abs().flatten().split(256)
    assert stored.nested_absmax.tolist() == [float(part.max()) for part in blocks]
    assert stored.num_bits == sum(8 * tensor.numel() * tensor.element_size() for tensor in stored.tensors().values())
    position = 3 * 17 + 5
    expected = torch.tensor(dynamic_map())[int(stored.scale[3, 5])] * stored.nested_absmax[position // 256]
    assert stored.values()[3, 5] == expected + stored.nested_offset[0]


def test_blocks_of_64_cost_an_eighth_of_a_bit() -> None:
    out_features, in_features = 1024, 4096
    stored = NestedScale().store(random_scales(out_features, in_features // 64))
    num_bits = 32 / (out_features * in_features)  # the offset
    assert stored.num_bits / (out_features * in_features) == pytest.approx(8 / 64 + 32 / (64 * 256) + num_bits)


@roundings
def test_scales_that_would_come_out_negative_get_the_lowest_positive_value(rounding: Rounding) -> None:
    scale = random_scales(16, 16)
    scale[3, 5] = 100
    scale[:, 7] = 1e-3
    raw = raw_values(scale, 256)
    assert bool((raw[:, 7] <= 0).any())  # else this tests nothing
    stored = NestedScale(rounding=rounding).store(scale)
    values = stored.values()
    assert bool((values > 0).all())
    bad = raw <= 0
    below = StoredNestedScale(
        scale=stored.scale - bad.byte(),
        nested_absmax=stored.nested_absmax,
        nested_offset=stored.nested_offset,
        block=256,
    ).values()
    assert bool((below[bad] <= 0).all())
    # Rounding to a bin first costs its half twice: once to get there, once in what is nearest from there.
    slack = 2 * HALF_BIN * 100 if rounding == "binned" else 8 * EPS * 100
    assert bool(((values - scale).abs() <= (raw - scale).abs() + slack)[~bad].all())


@roundings
def test_equal_scales_are_exact(rounding: Rounding) -> None:
    scale = torch.full((4, 100), 0.75)
    stored = NestedScale(rounding=rounding).store(scale)
    assert stored.values().equal(scale)
    assert not stored.scale.any()  # as bitsandbytes


def test_binned_differs_only_near_borders() -> None:
    scale = random_scales(512, 256, spread=1.0)
    nearest, binned = NestedScale().store(scale), NestedScale(rounding="binned").store(scale)
    assert nearest.nested_absmax.equal(binned.nested_absmax)
    differs = nearest.scale != binned.scale
    assert 0 < differs.float().mean() < 0.01
    deviation = (scale - nearest.nested_offset).view(-1, 256) / nearest.nested_absmax[:, None]
    table = torch.tensor(dynamic_map())
    borders = (table[1:] + table[:-1]) / 2
    distance = (deviation.view_as(scale)[differs][:, None] - borders).abs().amin(1)
    assert bool((distance <= HALF_BIN + 4 * EPS).all())


def test_rounding_steps_only_replaces_zeros() -> None:
    step = torch.tensor([[0.0, 1e-45, 0.3, 5.0]], dtype=torch.float64)
    scale = NestedScale().bind(step.max()).round(step)
    assert scale.dtype == torch.float32
    assert scale.equal(torch.tensor([[TINY, TINY, 0.3, 5.0]]))


def test_zero_groups_do_not_move_the_others() -> None:
    step = random_scales(8, 8)
    step[2] = 0
    scale = NestedScale().round(step)
    stored = NestedScale().store(scale)
    assert stored.nested_offset[0] == step.flatten().mean()
    assert bool((NestedScale().store(NestedScale().round(torch.zeros(4, 4))).values() > 0).all())


def test_cannot_be_cut() -> None:
    stored = NestedScale().store(random_scales(8, 4))
    assert stored.rows(0, 8) is stored
    assert stored.columns(0, 4) is stored
    with pytest.raises(ShapeError, match=r"rows 0\.\.4 of 8 cannot be taken alone"):
        stored.rows(0, 4)
    with pytest.raises(ShapeError, match=r"groups 1\.\.4 of 4 cannot be taken alone"):
        stored.columns(1, 4)


def test_moves_to_a_device() -> None:
    stored = NestedScale().store(random_scales(8, 4)).to("meta")
    assert {tensor.device.type for tensor in stored.tensors().values()} == {"meta"}


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_no_scales_are_refused(value: float) -> None:
    with pytest.raises(VerificationError, match="a scale is not positive and finite"):
        NestedScale().store(torch.tensor([[1.0, value]]))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(RecipeError, match="block must be at least 1, not 0"):
        NestedScale(block=0)
    with pytest.raises(RecipeError, match="rounding is nearest or binned, not 'up'"):
        NestedScale(rounding="up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match=r"must be \[R, G\] and not empty, not \[4\]"):
        NestedScale().store(torch.ones(4))
    with pytest.raises(ShapeError, match=r"expected uint8 \[R, G\] and float32 \[1\], not torch.uint8 \[2, 3\]"):
        StoredNestedScale(
            scale=torch.zeros(2, 3, dtype=torch.uint8),
            nested_absmax=torch.ones(2),
            nested_offset=torch.ones(1),
            block=256,
        )
