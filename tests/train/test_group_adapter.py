"""Adapters that fold into zero points: their product, their gradients, and that folding loses nothing."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.errors import RecipeError
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.fitting import fit
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import FloatColumns, InputQuantizer, InputTransform, QuantizedSite
from bitwright.numerics.integer import FLOAT_ZERO_DTYPE
from bitwright.numerics.low_rank import LowRank
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import Scheme
from bitwright.train.group_adapter import GroupLoraLinear, add_group_adapters, fold_adapters
from bitwright.train.lora import LoraConfig, adapters_of, merged, remove_adapters
from bitwright.train.target_layers import block_layers

SCHEMES = ("W4A16-g16-floatzero", "W3A16-g20-floatzero", "W4A16-channel-floatzero", "W8A8-g16-floatzero")
OUT, IN = 24, 64
CONFIG = LoraConfig(rank=4, alpha=8)
IDS = torch.arange(12).reshape(1, 12)


def packed_layer(name: str, weight: Tensor, dtype: torch.dtype, **extras: object) -> QuantizedLinear:
    scheme = Scheme.parse(name)
    grid = fit(
        weight.float(), scheme.weights.format, scheme.weights.granularity, method="minmax", importance=None,
        scale=FloatScale(dtype),
    )  # fmt: skip
    acts = scheme.activations
    inputs = None
    if acts is not None:
        inputs = InputQuantizer(format=acts.format, granularity=acts.granularity, scale=own.input_scale(acts))
    site = QuantizedSite(weight=QTensor(codes=grid.quantize(weight), grid=grid), inputs=inputs, **extras)  # pyright: ignore[reportArgumentType]
    stored = {own.GUARD: own.guard(dtype), **own.encode(site)}
    return QuantizedLinear(scheme, *weight.shape, stored, torch.randn(weight.shape[0]).to(dtype))


def adapter_of(name: str, dtype: torch.dtype = torch.float32, **extras: object) -> GroupLoraLinear:
    adapter = GroupLoraLinear(packed_layer(name, torch.randn(OUT, IN), dtype, **extras), CONFIG)
    nn.init.normal_(adapter.lora_b, std=0.3)
    return adapter


def grid_of(site: QuantizedSite) -> Grid:
    assert isinstance(site.weight.grid, Grid)
    return site.weight.grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_trained_is_what_folds_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    adapter = adapter_of(name, dtype)
    x = torch.randn(2, 3, IN).to(dtype)
    folded = adapter.folded_layer()
    assert torch.equal(adapter(x), folded(x))
    before, after = adapter.packed.site(), adapter.fold()
    assert torch.equal(after.weight.codes, before.weight.codes)
    assert torch.equal(grid_of(after).scale, grid_of(before).scale)
    zero = grid_of(after).zero_point
    assert zero is not None
    assert zero.dtype == FLOAT_ZERO_DTYPE
    assert not torch.equal(zero, grid_of(before).zero_point)
    assert {n: t.dtype for n, t in folded.stored().items()} == {n: t.dtype for n, t in adapter.packed.stored().items()}


def test_a_group_that_hardly_varies_keeps_its_zero_points_finite() -> None:
    weight = torch.randn(OUT, IN)
    weight[:, :16] *= 1e-8
    adapter = GroupLoraLinear(packed_layer("W4A16-g16-floatzero", weight, torch.float32), CONFIG)
    nn.init.normal_(adapter.lora_b, std=0.3)
    x = torch.randn(3, IN)
    adapter(x).square().sum().backward()
    zero = grid_of(adapter.fold()).zero_point
    assert zero is not None
    assert bool(zero.isfinite().all())
    assert torch.equal(adapter(x), adapter.folded_layer()(x))
    assert adapter.lora_a.grad is not None
    assert bool((adapter.lora_a.grad[:, 0] == 0).all()), "beyond the end there is no way on"
    assert bool(adapter.lora_a.grad[:, 1:].isfinite().all())
    assert bool(adapter.lora_a.grad[:, 1:].any())


@pytest.mark.parametrize("name", [name for name in SCHEMES if "A16" in name])
def test_the_adapter_sees_means_over_groups(name: str) -> None:
    """y = base + scaling B A mean(x), as far as float16 zero points can say it."""
    adapter = adapter_of(name)
    x = torch.randn(5, IN)
    width = adapter.packed.scheme.weights.granularity.columns_per_group(IN)
    means = torch.stack([part.mean(-1) for part in x.split(width, dim=1)], dim=1)
    expected = adapter.packed(x) + adapter.scaling * means @ adapter.lora_a.T @ adapter.lora_b.T
    grid = grid_of(adapter.fold())
    assert grid.zero_point is not None
    # Half a unit in the last place of float16, times the scale, for every column.
    rounding = grid.scale.abs() * (grid.zero_point.float().abs() * 2.0**-11 + 2.0**-25)
    sums = torch.stack([part.abs().sum(-1) for part in x.split(width, dim=1)], dim=1)
    bound = sums @ rounding.T + 1e-4
    assert bool(((adapter(x) - expected).abs() <= bound).all())
    assert adapter.delta().shape == (OUT, IN)


def test_a_fresh_adapter_changes_no_bit() -> None:
    layer = packed_layer("W4A16-g16-floatzero", torch.randn(OUT, IN), torch.float32)
    x = torch.randn(5, IN)
    before = layer(x)
    adapter = GroupLoraLinear(layer, CONFIG)
    assert torch.equal(adapter(x), before)
    assert adapter.lora_a.shape == (4, IN // 16)
    assert {n for n in adapter.state_dict() if "lora" in n} == {"lora_a", "lora_b"}
    assert not [n for n in adapter.state_dict() if "packed" in n or "widths" in n]


@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"correction": torch.ones(OUT)},
        {"transform": InputTransform(scale=torch.linspace(0.5, 2, IN), hadamard=32)},
        {"columns": FloatColumns(index=torch.tensor([3, 40], dtype=torch.int32), weight=torch.ones(OUT, 2))},
        {"low_rank": LowRank(a=torch.ones(2, IN), b=torch.ones(OUT, 2))},
    ],
    ids=["plain", "correction", "transform", "columns", "low_rank"],
)
def test_gradients_are_those_of_the_weight_with_trained_zero_points(extras: dict[str, object]) -> None:
    """Autograd through scale * (code - zero point), written out, with rounding of zero points ignored."""
    adapter = adapter_of("W4A16-g20-floatzero", **extras)
    x = torch.randn(2, 3, IN, requires_grad=True)
    dy = torch.randn(2, 3, OUT)
    found = torch.autograd.grad(adapter(x), (x, adapter.lora_a, adapter.lora_b), dy)
    site = adapter.packed.site()
    grid = grid_of(site)
    spread = [t.repeat_interleave(20, dim=1)[:, :IN] for t in (grid.scale, adapter.zero_point(grid))]
    weight = spread[0] * (site.weight.codes.float() - spread[1])
    if site.columns is not None:
        keep = torch.ones(IN).index_fill(0, site.columns.index.long(), 0)
        weight = weight * keep + torch.zeros(OUT, IN).index_copy(1, site.columns.index.long(), site.columns.weight)
    if site.low_rank is not None:
        weight = weight + site.low_rank.product()
    inputs = x if site.transform is None else site.transform.apply(x)
    expected = torch.autograd.grad(inputs @ weight.T, (x, adapter.lora_a, adapter.lora_b), dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_inputs_that_need_no_gradient_get_none_and_nothing_dense_is_kept() -> None:
    adapter = adapter_of("W4A16-g16-floatzero")
    x = torch.randn(5, IN)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapter(x)
    assert OUT * IN not in sizes
    y.sum().backward()
    assert adapter.lora_a.grad is not None


def tiny(name: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer_name, layer in block_layers(model).items():
        assert isinstance(layer, nn.Linear)
        model.set_submodule(layer_name, packed_layer(name, layer.weight.detach(), torch.float32))
    return model


def test_a_trained_model_and_its_folded_one_have_equal_logits() -> None:
    model = tiny("W3A16-g16-floatzero")
    adapters = add_group_adapters(model, LoraConfig(rank=4))
    assert len(adapters) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses: list[float] = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(IDS).logits
        sites = fold_adapters(model)
        assert torch.equal(model(IDS).logits, trained)
    assert sites.keys() == adapters.keys()
    assert not adapters_of(model)
    assert all(isinstance(layer, QuantizedLinear) for layer in block_layers(model).values())


def test_adapters_are_removed_and_not_merged() -> None:
    model = tiny("W4A16-g16-floatzero")
    with torch.no_grad():
        before = model(IDS).logits
        for adapter in add_group_adapters(model, LoraConfig(rank=4, targets=("*.q_proj",))).values():
            nn.init.normal_(adapter.lora_b)
        with pytest.raises(RecipeError, match="fold them"):
            merged(model)
        assert torch.equal(remove_adapters(model)(IDS).logits, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("W4A16-g16-asym", "scheme W4A16-g16-asym has no float zero points to fold into. Use W4A16-g64-floatzero"),
        ("W4A16-g16", "has no float zero points"),
        ("W4A16-tensor-floatzero", r"shares zero points between rows \(tensor\)"),
        ("W4A16-block8x16-floatzero", r"shares zero points between rows \(block\)"),
    ],
)
def test_bases_that_cannot_take_an_adapter_in(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GroupLoraLinear(packed_layer(name, torch.randn(OUT, IN), torch.float32), CONFIG)


def test_dense_bases_and_dropout_are_refused() -> None:
    with pytest.raises(RecipeError, match="this layer is dense"):
        GroupLoraLinear(nn.Linear(8, 8), CONFIG)
    model = tiny("W4A16-g16-floatzero")
    with pytest.raises(RecipeError, match=r"^model\.layers\.0\.self_attn\.q_proj: group adapter: dropout 0\.1"):
        add_group_adapters(model, LoraConfig(dropout=0.1))
    assert not adapters_of(model)
