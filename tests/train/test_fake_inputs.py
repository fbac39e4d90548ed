import pytest
import torch
from torch import nn

from bitwright.errors import RecipeError, StructureError, VerificationError
from bitwright.model.layouts import own
from bitwright.numerics.grid import Grid
from bitwright.schemes import ActivationScheme, Scheme
from bitwright.train.fake_inputs import FakeInputs, FakeKeyValue, add_fake_cache

COLUMNS = 64
DTYPE = torch.bfloat16
DYNAMIC = ("W8A8", "W8A8-acttensor", "W4A4-actg64", "fp8", "mxfp4", "mxfp8", "W4A8-actasym")
STATIC = ("W8A8-static-entropy", "W8A8-static-actasym", "W8A8-static-actg32", "fp8-static")
LEVEL = ("nvfp4",)


def acts(name: str) -> ActivationScheme:
    found = Scheme.parse(name).activations
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
@pytest.mark.parametrize("name", [*DYNAMIC, *STATIC, *LEVEL])
def test_the_value_is_what_the_kernel_multiplies(name: str, dtype: torch.dtype) -> None:
    fake = FakeInputs(acts(name), COLUMNS, DTYPE)
    x = torch.randn(2, 5, COLUMNS).to(dtype)

    value = fake(x)

    quantizer = fake.quantizer()
    assert value.dtype == torch.float32
    assert torch.equal(value.view(-1, COLUMNS), quantizer.quantize(x.view(-1, COLUMNS)).dequantize())
    decoded = own.decode_inputs(acts(name), own.encode_inputs(quantizer), COLUMNS)
    assert torch.equal(decoded.quantize(x.view(-1, COLUMNS)).dequantize(), value.view(-1, COLUMNS))


@pytest.mark.parametrize("name", ["W8A8", "W8A8-acttensor", "W4A4-actg64", "fp8", "W4A8-actasym"])
def test_dynamic_ranges_clip_nothing(name: str) -> None:
    x = torch.randn(7, COLUMNS, requires_grad=True)
    pull = torch.randn(7, COLUMNS)
    (FakeInputs(acts(name), COLUMNS, DTYPE)(x) * pull).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, pull)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_dynamic_scales_that_clip_stop_gradients_there_alone(name: str) -> None:
    x = torch.randn(64, COLUMNS, requires_grad=True)
    fake = FakeInputs(acts(name), COLUMNS, DTYPE)
    fake(x).sum().backward()
    grid = fake.quantizer().quantize(x.detach()).grid
    assert isinstance(grid, Grid)
    scaled = grid.granularity.split(x.detach()) / grid.scale.unsqueeze(-1)
    inside = grid.granularity.join((scaled.abs() <= grid.format.max_value).float(), 64, COLUMNS)
    assert x.grad is not None
    assert torch.equal(x.grad, inside)
    assert 0.9 < float(inside.mean()) < 1


def test_a_static_scale_has_the_papers_gradient_and_clipped_inputs_none() -> None:
    fake = FakeInputs(acts("W8A8-static"), COLUMNS, torch.float32)
    fake(torch.randn(32, COLUMNS))
    x = (torch.randn(7, COLUMNS) * 2).requires_grad_()
    pull = torch.randn(7, COLUMNS)
    (fake(x) * pull).sum().backward()

    v = x.detach() / fake.scale.detach()
    slope = torch.where(v <= -127, -127.0, torch.where(v >= 127, 127.0, torch.round(v) - v))
    expected = (slope * pull).sum() / (COLUMNS * 127) ** 0.5
    assert fake.scale.grad is not None
    torch.testing.assert_close(fake.scale.grad.reshape(()), expected, rtol=1e-4, atol=1e-4)
    assert x.grad is not None
    assert torch.equal(x.grad, pull * (v.abs() <= 127))
    assert (v.abs() > 127).any()


def test_static_scales_start_once_and_from_training_alone() -> None:
    fake = FakeInputs(acts("W8A8-static"), COLUMNS, DTYPE).eval()
    with pytest.raises(VerificationError, match="no token has gone through"):
        fake(torch.randn(3, COLUMNS))
    fake.train()(torch.randn(3, COLUMNS))
    before = fake.scale.detach().clone()
    fake(torch.randn(3, COLUMNS) * 9)
    assert torch.equal(fake.scale, before)


@pytest.mark.parametrize("name", [*STATIC, *LEVEL])
def test_calibrated_scales_are_taken_over(name: str) -> None:
    first = FakeInputs(acts(name), COLUMNS, DTYPE)
    x = torch.randn(9, COLUMNS)
    value = first(x)

    second = FakeInputs(acts(name), COLUMNS, DTYPE, start=first.quantizer(), learned=False).eval()

    # The level above NVFP4's scales passes through two reciprocals, which may move it by float32's last digit.
    torch.testing.assert_close(second(x), value, rtol=1e-5, atol=0.0)
    with pytest.raises(RecipeError, match="Calibrate"):
        FakeInputs(acts(name), COLUMNS, DTYPE, start=FakeInputs(acts("W8A8"), COLUMNS, DTYPE).quantizer())


def test_the_level_above_dynamic_scales_follows_the_largest_input_until_it_is_frozen() -> None:
    fake = FakeInputs(acts("nvfp4"), COLUMNS, DTYPE)
    for factor, largest in ((1.0, 1.0), (3.0, 3.0), (2.0, 3.0)):
        fake(torch.ones(2, COLUMNS) * factor)
        assert float(fake.get_buffer("amax")) == largest
    fake.freeze()
    fake(torch.ones(2, COLUMNS) * 9)
    assert float(fake.get_buffer("amax")) == 3.0


def test_cached_keys_share_scales_within_a_channel_and_values_within_a_token() -> None:
    cache = FakeKeyValue(bits=4, group=8)
    keys = torch.randn(2, 16, 24)
    keys[..., 3] *= 100  # an outlying channel, as keys have them
    step = keys.view(2, 2, 8, 24)
    step = (step.amax(2).clamp(min=0) - step.amin(2).clamp(max=0)) / 15
    error = (cache.keys(keys) - keys).abs().view(2, 2, 8, 24).amax(2)
    assert (error <= step * 0.5001).all()  # half a step, and float32's rounding

    values = keys.transpose(1, 2).contiguous()
    assert torch.equal(cache.values(values), cache.keys(keys).transpose(1, 2))
    leaf = torch.randn(1, 5, 24, requires_grad=True)
    (cache.keys(leaf) + cache.values(leaf)).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


def test_the_cache_is_hooked_and_unhooked() -> None:
    model = nn.ModuleDict({"k_proj": nn.Linear(8, 16), "v_proj": nn.Linear(8, 16), "o_proj": nn.Linear(8, 16)})
    x = torch.randn(1, 32, 8)
    before = {name: module(x) for name, module in model.items()}

    handles = add_fake_cache(model, 2, 16)

    assert len(handles) == 2
    assert torch.equal(model["k_proj"](x), FakeKeyValue(bits=2, group=16).keys(before["k_proj"]))
    assert torch.equal(model["v_proj"](x), FakeKeyValue(bits=2, group=16).values(before["v_proj"]))
    assert torch.equal(model["o_proj"](x), before["o_proj"])
    for handle in handles:
        handle.remove()
    assert torch.equal(model["k_proj"](x), before["k_proj"])
    with pytest.raises(StructureError, match="k_proj and v_proj"):
        add_fake_cache(nn.Linear(4, 4), 4, 16)
