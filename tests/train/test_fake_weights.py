import pytest
import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.kernels.reference import linear
from bitwright.model.layouts import own
from bitwright.numerics.codebook_grid import CodebookGrid
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.ternary import TernaryFormat
from bitwright.schemes import FAMILIES, MODEL_SCALE, Scheme, group
from bitwright.train.fake_weights import (
    FakeWeight,
    Mode,
    can_learn,
    fake_quantize,
    fit_start,
    gradient_factor,
    inside_cells,
    mean_step,
)

ROWS, COLUMNS = 8, 64
EVERY_SCHEME = (
    *FAMILIES, "W8A16", "W4A16", "W4A16-asym", "W3A16", "W2A16", "W7A16", "W6A16", "W5A16", "W4A16-g32", "W4A16-tensor",
    "W4A16-block32", "W4A16-g64-floatzero", "nf4-b64-dq", "kmeans4-g128", "nvfp4-a16", "fp8-block128", "fp8-tensor-a16",
    "fp4-bnb-dq", "lut4-g64-dq", "kmeans4-channel-o0.45", "kmeans3-tensor", "ternary-channel", "binary-tensor",
    "mxfp4-a16",
)  # fmt: skip
MODES: tuple[Mode, ...] = ("minmax", "learned", "fixed", "scales")
DTYPE = torch.bfloat16


def scheme_of(name: str) -> Scheme:
    """The scheme for weights alone, with groups that fit 64 columns."""
    scheme = Scheme.parse(name)
    scheme = Scheme(base=scheme.base, weights=scheme.weights)
    granularity = scheme.weights.granularity
    small = granularity.kind == "group" and (granularity.group_size or 0) > COLUMNS // 2
    return scheme.with_granularity(group(COLUMNS // 2)) if small else scheme


def quantizer(name: str, mode: Mode, weight: Tensor) -> FakeWeight:
    scheme = scheme_of(name)
    return FakeWeight(scheme, weight, fit_start(weight, scheme, DTYPE), DTYPE, mode)


def trained(fake: FakeWeight, weight: torch.nn.Parameter) -> None:
    """A few steps that move everything that may move."""
    optimizer = torch.optim.SGD([weight, *fake.parameters()], lr=0.05)
    target = torch.randn(ROWS, COLUMNS)
    for _ in range(3):
        optimizer.zero_grad()
        (fake(weight) - target).square().mean().backward()
        optimizer.step()


def modes_of(name: str) -> list[Mode]:
    """The modes that the format can have, by the table in the module's docstring."""
    weights = Scheme.parse(name).weights
    format, plain = weights.format, weights.scale in (MODEL_SCALE, "float32")
    if name.startswith("kmeans"):
        return ["fixed"]
    stepped = isinstance(format, IntegerFormat | MinifloatFormat | TernaryFormat)
    with_scales: list[Mode] = ["learned", "scales"] if stepped else ["scales"]
    return ["fixed", "minmax", *(with_scales if plain else [])]


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in EVERY_SCHEME for mode in modes_of(name)])
def test_what_is_trained_is_what_is_stored_bit_for_bit(name: str, mode: Mode) -> None:
    weight = torch.nn.Parameter(torch.randn(ROWS, COLUMNS))
    fake = quantizer(name, mode, weight.detach())
    trained(fake, weight)

    forward = fake(weight).detach()
    site = QuantizedSite(weight=fake.qtensor(weight))
    stored = own.encode(site)
    decoded = own.decode(scheme_of(name), stored)

    assert torch.equal(forward, site.weight.dequantize())
    assert torch.equal(decoded.weight.codes, site.weight.codes)
    assert torch.equal(decoded.weight.dequantize(), forward)
    x = torch.randn(3, COLUMNS)
    assert torch.equal(linear(x, decoded), torch.nn.functional.linear(x, forward))
    seen = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in stored.items()}
    own.check_stored("site", scheme_of(name), ROWS, COLUMNS, seen | {"weight": ((0,), DTYPE)})


@pytest.mark.parametrize("name", ["W4A16-g32", "W2A16-g32", "W3A16-asym", "W4A16-g32-floatzero", "fp8", "ternary"])
def test_learned_scales_move_and_are_rounded_to_the_checkpoints_dtype(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(ROWS, COLUMNS))
    fake = quantizer(name, "learned", weight.detach())
    before = fake.get_parameter("scale").detach().clone()

    trained(fake, weight)

    grid = fake.grid(weight)
    assert isinstance(grid, Grid)
    assert grid.scale.dtype == DTYPE
    assert not torch.equal(fake.get_parameter("scale"), before)


@pytest.mark.parametrize("name", EVERY_SCHEME)
def test_a_start_keeps_the_codes_and_comes_nearer_to_the_weight(name: str) -> None:
    weight = torch.randn(ROWS, COLUMNS)
    fake = quantizer(name, "fixed", weight)
    found = fake.qtensor(weight + torch.randn(ROWS, COLUMNS) * 0.1)
    start = inside_cells(weight, found, 0.9)
    level, kept = found.dequantize(), fake.qtensor(start)
    inside = torch.ones_like(weight, dtype=torch.bool)
    if found.outliers is not None:
        inside.view(-1)[found.outliers.index.long()] = False
    assert torch.equal(kept.codes[inside], found.codes[inside])
    assert bool(((start - weight).abs() <= (level - weight).abs()).all())
    assert float((start - weight).square().mean()) < float((level - weight).square().mean())
    own_codes = fake.qtensor(weight)
    if own_codes.outliers is None:
        assert torch.allclose(inside_cells(weight, own_codes, 1.0), weight, atol=1e-6)
        assert torch.equal(inside_cells(weight, own_codes, 0.0), own_codes.dequantize())


def test_the_step_of_an_integer_grid_is_its_scale() -> None:
    weight = torch.randn(ROWS, COLUMNS)
    for name in ("W4A16-g32", "W2A16-asym", "ternary"):
        grid = fit_start(weight, scheme_of(name), DTYPE)
        assert isinstance(grid, Grid)
        assert mean_step(grid, ROWS) == pytest.approx(float(grid.scale.float().abs().mean()), rel=1e-6)
    assert 0.05 < mean_step(fit_start(weight, scheme_of("nf4"), DTYPE), ROWS) < 1


def clipped_grid(name: str, weight: Tensor) -> Grid:
    """A grid of which some weights lie outside."""
    grid = fit_start(weight * 0.4, scheme_of(name), torch.float32)
    assert isinstance(grid, Grid)
    return grid


@pytest.mark.parametrize(
    "name", ["W4A16-g32", "W3A16-asym", "W4A16-g32-floatzero", "fp4-e2m1", "fp8", "ternary", "binary", "nf4", "mxfp4"]
)
def test_gradients_are_those_of_the_smooth_surrogate(name: str) -> None:
    # The surrogate: rounding adds a constant, and the ends clip: s · (clamp(w/s + z, lo, hi) - z + residual).
    weight = torch.randn(ROWS, COLUMNS)
    grid = clipped_grid(name, weight)
    split, join = grid.granularity.split, grid.granularity.join
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    low, high = grid.format.min_value, grid.format.max_value
    zero, start = zero.double().unsqueeze(-1), grid.scale.double().unsqueeze(-1)
    clamped = (split(weight.double()) / start + zero).clamp(low, high) - zero
    residual = split(grid.fake_quantize(weight).double()) / start - clamped

    def surrogate(w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return join(s * ((split(w) / s + z).clamp(low, high) - z + residual), ROWS, COLUMNS)

    pull = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    master, scale = weight.clone().requires_grad_(), grid.scale.clone().requires_grad_()
    zero_point = None if grid.zero_point is None else grid.zero_point.float().requires_grad_()
    (fake_quantize(master, grid, scale=scale, zero_point=zero_point) * pull).sum().backward()

    step = 1e-6
    directions = (torch.randn(ROWS, COLUMNS).double(), torch.randn_like(start) * start, torch.randn_like(start))
    at = (weight.double(), start, zero)
    gradients = (master.grad, scale.grad, None if zero_point is None else zero_point.grad)
    for position, (direction, gradient) in enumerate(zip(directions, gradients, strict=True)):
        if gradient is None:
            continue
        ends = []
        for sign in (1, -1):
            moved = list(at)
            moved[position] = moved[position] + sign * step * direction
            ends.append((surrogate(*moved) * pull).sum())
        numeric = (ends[0] - ends[1]) / (2 * step)
        analytic = (gradient.double() * direction.view(gradient.shape)).sum()
        # Rounding of float32 sums over all weights, and the differences' own error.
        magnitude = float(gradient.double().norm() * direction.norm())
        assert abs(float(numeric - analytic)) < 1e-4 * max(1.0, magnitude)
    shifted = split(weight) / grid.scale.unsqueeze(-1).float() + zero.float()
    outside = join((shifted < low) | (shifted > high), ROWS, COLUMNS)
    assert outside.any()
    assert master.grad is not None
    assert (master.grad[outside] == 0).all()
    assert torch.equal(master.grad[~outside], pull.float()[~outside])


def test_weights_outside_a_codebook_have_no_gradient() -> None:
    weight = torch.randn(ROWS, COLUMNS)
    grid = fit_start(weight * 0.4, scheme_of("kmeans3"), torch.float32)
    assert isinstance(grid, CodebookGrid)
    weight.requires_grad_()

    fake_quantize(weight, grid).sum().backward()

    inside = (weight >= grid.codebook[:, 0, :1]) & (weight <= grid.codebook[:, 0, -1:])
    assert weight.grad is not None
    assert torch.equal(weight.grad, inside.float())
    assert not inside.all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gradient_of_a_scale_is_the_papers_formula(sign: float) -> None:
    weight = torch.randn(ROWS, COLUMNS)
    start = clipped_grid("W4A16-g32", weight)
    grid = Grid(
        format=start.format, granularity=start.granularity, in_features=COLUMNS,
        scale=start.scale.abs().to(DTYPE) * sign, zero_point=None,
    )  # fmt: skip
    fake = FakeWeight(scheme_of("W4A16-g32"), weight, grid, DTYPE, "learned")
    pull = torch.randn(ROWS, COLUMNS)
    (fake(weight) * pull).sum().backward()

    s = grid.scale.float().unsqueeze(-1)
    v = weight.view(ROWS, 2, 32) / s
    slope = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, torch.round(v) - v))
    expected = (slope * pull.view(ROWS, 2, 32)).sum(-1) / (32 * 7) ** 0.5
    found = fake.get_parameter("scale").grad
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_factor_counts_no_padding() -> None:
    scheme = scheme_of("W4A16-g32")
    grid = fit_start(torch.randn(4, 40), scheme, DTYPE)
    assert isinstance(grid, Grid)
    expected = torch.tensor([[32.0, 8.0]] * 4).mul(7).rsqrt()
    torch.testing.assert_close(gradient_factor(grid, 4), expected)


@pytest.mark.parametrize("name", ["W4A16-g32", "W2A16-g32", "fp8", "ternary"])
def test_a_scale_never_crosses_zero(name: str) -> None:
    weight = torch.randn(ROWS, COLUMNS)
    fake = quantizer(name, "learned", weight)
    before = fake.grid(weight)
    assert isinstance(before, Grid)
    with torch.no_grad():
        fake.get_parameter("scale").mul_(-3)

    after = fake.grid(weight)
    assert isinstance(after, Grid)
    assert torch.equal(after.scale.sign(), before.scale.sign())
    assert torch.equal(fake(weight), fake.qtensor(weight).dequantize())


def test_minmax_follows_the_weight_until_it_is_frozen_and_clips_nothing() -> None:
    weight = torch.randn(ROWS, COLUMNS).requires_grad_()
    fake = quantizer("W4A16-g32", "minmax", weight.detach())
    fake(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))
    grid, doubled = fake.grid(weight.detach()), fake.grid(weight.detach() * 2)
    assert isinstance(grid, Grid)
    assert isinstance(doubled, Grid)
    assert torch.equal(doubled.scale, grid.scale * 2)

    fake.freeze(weight)

    kept = fake.grid(weight.detach() * 2)
    assert isinstance(kept, Grid)
    assert torch.equal(kept.scale, grid.scale)


@pytest.mark.parametrize("name", ["W4A16-g32", "mxfp4", "nvfp4", "nf4-b64-dq"])
def test_a_frozen_quantizer_comes_back_from_its_state(name: str) -> None:
    weight = torch.randn(ROWS, COLUMNS)
    fake, again = quantizer(name, "minmax", weight), quantizer(name, "minmax", weight)
    fake.freeze(weight * 1.7)

    again.load_state_dict(fake.state_dict())

    assert torch.equal(again(weight), fake(weight))


def test_scales_mode_keeps_the_codes_and_has_the_true_gradient() -> None:
    weight = torch.randn(ROWS, COLUMNS)
    fake = quantizer("W4A16-asym", "scales", weight)
    codes = fake.qtensor(weight).codes.clone()
    pull = torch.randn(ROWS, COLUMNS)
    (fake(weight) * pull).sum().backward()
    scale, grid = fake.get_parameter("scale"), fake.grid(weight)
    assert isinstance(grid, Grid)
    assert grid.zero_point is not None
    levels = grid.granularity.split(codes.float()) - grid.zero_point.unsqueeze(-1)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (levels * grid.granularity.split(pull)).sum(-1), rtol=1e-5, atol=1e-4)

    torch.optim.SGD([scale], lr=1e-3).step()

    assert torch.equal(fake.qtensor(weight).codes, codes)
    assert torch.equal(fake(weight), fake.qtensor(weight).dequantize())


@pytest.mark.parametrize("name", EVERY_SCHEME)
def test_modes_that_a_format_cannot_have_are_refused(name: str) -> None:
    weight = torch.randn(ROWS, COLUMNS)
    for mode in set(MODES) - set(modes_of(name)):
        with pytest.raises(RecipeError, match="Use mode fixed"):
            quantizer(name, mode, weight)
    assert can_learn(fit_start(weight, scheme_of(name), DTYPE)) == ("learned" in modes_of(name))
