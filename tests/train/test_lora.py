"""LoRA around dense and packed layers, the ledger of what is trained, and starts at the error of quantization."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bitwright.errors import RecipeError, ShapeError, StructureError
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.fitting import fit
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.low_rank import nearest_low_rank, output_error
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import Scheme
from bitwright.train.lora import (
    LoraConfig,
    LoraLinear,
    ParameterCount,
    adapters_of,
    add_adapters,
    merged,
    remove_adapters,
    trainable_ledger,
)
from bitwright.train.low_rank_start import start_at_error
from bitwright.train.target_layers import block_layers, stacked_experts

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(12).reshape(1, 12)


def tiny(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def packed_layer(linear: nn.Linear, name: str) -> QuantizedLinear:
    scheme, weight = Scheme.parse(name), linear.weight.detach().float()
    scale = FloatScale(linear.weight.dtype)
    grid = fit(weight, scheme.weights.format, scheme.weights.granularity, method="minmax", importance=None, scale=scale)
    site = QuantizedSite(weight=QTensor(codes=grid.quantize(weight), grid=grid))
    stored = {own.GUARD: own.guard(linear.weight.dtype), **own.encode(site)}
    return QuantizedLinear(scheme, linear.out_features, linear.in_features, stored, None)


def packed(name: str = "W4A16-g16", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = tiny(dtype)
    for layer_name, layer in block_layers(model).items():
        assert isinstance(layer, nn.Linear)
        model.set_submodule(layer_name, packed_layer(layer, name))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def perturb(model: nn.Module) -> None:
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.lora_b, std=0.1)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_no_bit_of_the_logits(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    before = logits(model)
    adapters = add_adapters(model, LoraConfig(rank=4))
    assert [name.rpartition(".")[2] for name in adapters][: len(PROJECTIONS)] == list(PROJECTIONS)
    assert len(adapters) == 2 * len(PROJECTIONS)
    assert torch.equal(logits(model), before)
    assert all(adapter.lora_a.dtype == torch.float32 for adapter in adapters.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_is_that_of_the_changed_weight(rslora: bool) -> None:
    linear = nn.Linear(32, 24)
    adapter = LoraLinear(linear, LoraConfig(rank=4, alpha=8, rslora=rslora))
    nn.init.normal_(adapter.lora_b)
    assert adapter.scaling == pytest.approx(8 / (2 if rslora else 4))
    x = torch.randn(5, 32)
    changed = linear.weight + adapter.scaling * adapter.lora_b @ adapter.lora_a
    expected = functional.linear(x, changed, linear.bias)
    torch.testing.assert_close(adapter(x), expected)
    torch.testing.assert_close(adapter.delta(), changed - linear.weight, atol=1e-6, rtol=1e-5)
    assert float(adapter.lora_a.detach().abs().max()) <= 1 / math.sqrt(32), "kaiming with a = sqrt(5)"


def test_the_sum_is_rounded_once() -> None:
    linear = nn.Linear(32, 24, bias=False).bfloat16()
    adapter = LoraLinear(linear, LoraConfig(rank=4))
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(5, 32).bfloat16()
    inner = x.float() @ adapter.lora_a.T @ adapter.lora_b.T * adapter.scaling
    assert torch.equal(adapter(x), (linear(x).float() + inner).bfloat16())


@pytest.mark.parametrize("build", [tiny, packed], ids=["dense", "packed"])
def test_only_adapters_learn(build: object) -> None:
    model = build()  # pyright: ignore[reportCallIssue]
    add_adapters(model, LoraConfig(rank=4))
    kept = {name: value for name, value in bits(model).items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name: value for name, value in bits(model).items() if "lora_" not in name} == kept
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_packed_and_dequantized_bases_give_adapters_the_same_gradient() -> None:
    model, dense = packed(), packed()
    for name, layer in block_layers(dense).items():
        assert isinstance(layer, QuantizedLinear)
        dense.set_submodule(name, layer.dequantized())
    for each in (model, dense):
        torch.manual_seed(3)
        add_adapters(each, LoraConfig(rank=4))
        perturb(each)
        each(IDS, labels=IDS).loss.backward()
    for name, adapter in adapters_of(model).items():
        other = adapters_of(dense)[name]
        assert adapter.lora_b.grad is not None
        torch.testing.assert_close(adapter.lora_a.grad, other.lora_a.grad)
        torch.testing.assert_close(adapter.lora_b.grad, other.lora_b.grad)


def test_dropout_is_on_the_inputs_of_the_adapter_and_in_training_only() -> None:
    adapter = LoraLinear(nn.Linear(32, 24), LoraConfig(rank=4, dropout=0.5))
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(5, 32)
    torch.manual_seed(0)
    found = adapter(x)
    torch.manual_seed(0)
    dropped = functional.dropout(x, 0.5)
    assert torch.equal(found, adapter.base(x) + dropped @ adapter.lora_a.T @ adapter.lora_b.T * adapter.scaling)
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_merging_is_undone_bit_for_bit() -> None:
    model = tiny(torch.bfloat16)
    add_adapters(model, LoraConfig(rank=4))
    perturb(model)
    before, state = logits(model), bits(model)
    adapters = adapters_of(model)
    for adapter in adapters.values():
        assert isinstance(adapter, LoraLinear)
        expected = (adapter.weight.float() + adapter.delta()).bfloat16()
        adapter.merge()
        assert adapter.is_merged
        assert torch.equal(adapter.weight, expected)
    assert bits(model).keys() == state.keys(), "the original weight is no part of the state"
    for adapter in adapters.values():
        assert isinstance(adapter, LoraLinear)
        adapter.unmerge()
    assert bits(model) == state
    assert torch.equal(logits(model), before)


def test_a_merged_model_is_plain_and_computes_the_same() -> None:
    model = tiny()
    add_adapters(model, LoraConfig(rank=4))
    perturb(model)
    before = logits(model)
    assert merged(model) is model
    assert not adapters_of(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(model), before)
    assert bits(model).keys() == bits(tiny()).keys()


def test_removing_adapters_gives_the_original_back() -> None:
    model = tiny()
    state = bits(model)
    add_adapters(model, LoraConfig(rank=4))
    perturb(model)
    for adapter in list(adapters_of(model).values())[::2]:
        assert isinstance(adapter, LoraLinear)
        adapter.merge()
    assert bits(remove_adapters(model)) == state


def test_a_packed_weight_takes_no_adapter_in() -> None:
    model = packed()
    adapters = add_adapters(model, LoraConfig(rank=4))
    with pytest.raises(RecipeError, match=r"a weight packed in W4A16-g16 cannot take an adapter in"):
        next(iter(adapters.values())).merge()
    with pytest.raises(RecipeError, match=r"^model\.layers\.0\.self_attn\.q_proj: its weight is packed"):
        merged(model)
    assert adapters_of(model).keys() == adapters.keys()
    assert all(isinstance(layer, QuantizedLinear) for layer in block_layers(remove_adapters(model)).values())


def test_merging_twice_and_unmerging_nothing_are_refused() -> None:
    adapter = LoraLinear(nn.Linear(8, 8), LoraConfig(rank=2))
    with pytest.raises(RecipeError, match="not merged"):
        adapter.unmerge()
    adapter.merge()
    with pytest.raises(RecipeError, match="merged already"):
        adapter.merge()


def test_targets_are_patterns() -> None:
    model = tiny()
    adapters = add_adapters(model, LoraConfig(rank=4, targets=("*.v_proj", r"re:model\.layers\.1\..*q_proj")))
    layers = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    assert tuple(adapters) == layers
    with pytest.raises(RecipeError, match="has an adapter already"):
        add_adapters(model, LoraConfig())


def test_a_pattern_without_layers_is_refused_and_the_model_left_alone() -> None:
    model = tiny()
    with pytest.raises(
        RecipeError, match=r"'\*\.q_prj' matches no linear layer .* Did you mean '\*\.q_proj'\? Known: "
    ):
        add_adapters(model, LoraConfig(targets=("*.v_proj", "*.q_prj")))
    with pytest.raises(RecipeError, match="'lm_head'"):
        add_adapters(model, LoraConfig(targets=("lm_head",)))
    assert not adapters_of(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(StructureError):
        add_adapters(nn.Linear(4, 4), LoraConfig())


def test_experts_in_one_parameter_and_routers_get_no_adapter() -> None:
    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    adapters = add_adapters(MixtralForCausalLM(config), LoraConfig(rank=4))
    assert [name.rpartition(".")[2] for name in adapters] == list(PROJECTIONS[:4])


def test_patterns_that_mean_experts_in_one_parameter_are_refused() -> None:
    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    assert len(stacked_experts(model)) == 2 * 4
    for pattern in ("*.experts.*", "*.down_proj", "*.down_proj[[]2[]]"):
        with pytest.raises(RecipeError, match=r"down_proj\[\d\], a slice|gate_up_proj\[0\], a slice"):
            add_adapters(model, LoraConfig(targets=("*.q_proj", pattern)))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_layers_that_store_inputs_first_are_adapted_and_merged() -> None:
    model = gpt2()
    adapters = add_adapters(model, LoraConfig(rank=4, dropout=0.0))
    names = [name.removeprefix("transformer.h.0.") for name in adapters]
    assert names[:4] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    fused = adapters["transformer.h.0.attn.c_attn"]
    assert (fused.out_features, fused.in_features) == (96, 32)
    assert fused.base_weight().shape == fused.delta().shape == (96, 32)
    perturb(model)
    before, original = logits(model), bits(model)
    ledger = trainable_ledger(model)
    assert ledger.kinds["adapter"].num_trainable == 4 * 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    for adapter in adapters.values():
        adapter.merge()
    # A merged weight and the two products round differently, by a few float32 steps of logits of about 1.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for adapter in adapters.values():
        adapter.unmerge()
    assert bits(model) == original


class Stacked(nn.Module):
    """A block whose only weights are experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))


class StackedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Stacked(), Stacked()])


def test_blocks_without_linear_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match="StackedModel hold their weights in other modules"):
        add_adapters(StackedModel(), LoraConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ({"alpha": math.inf}, "alpha must be a finite number above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"targets": ()}, "targets must be one pattern or more"),
        ({"targets": ("re:(",)}, "is not a regular expression"),
    ],
)
def test_impossible_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoraConfig(**changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("build", [tiny, packed], ids=["dense", "packed"])
def test_the_ledger_counts_what_is_trained(build: object) -> None:
    model = build()  # pyright: ignore[reportCallIssue]
    add_adapters(model, LoraConfig(rank=4, targets=("*.q_proj",)))
    ledger = trainable_ledger(model)
    in_blocks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    head = 40 * 32
    assert ledger.kinds["adapter"] == ParameterCount(num_trainable=2 * 4 * 64, num_total=2 * 4 * 64)
    assert ledger.kinds["embedding"] == ParameterCount(num_trainable=0, num_total=head)
    assert ledger.kinds["other"] == ParameterCount(num_trainable=0, num_total=5 * 32)
    if build is packed:
        assert ledger.kinds["packed"] == ParameterCount(num_trainable=0, num_total=in_blocks)
        in_blocks = 0
    assert ledger.kinds["linear"] == ParameterCount(num_trainable=0, num_total=in_blocks + head)
    assert ledger.total.num_trainable == 512
    assert ledger.total.share == 512 / ledger.total.num_total


def test_the_ledger_counts_tied_weights_once() -> None:
    tied = trainable_ledger(tiny(tied=True)).total
    assert trainable_ledger(tiny()).total.num_total - tied.num_total == 40 * 32
    assert tied.share == 1


def moments_of_inputs(size: int) -> Tensor:
    x = torch.randn(4 * size, size) * torch.logspace(-1, 1, size)
    return x.T @ x / len(x)


@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_a_start_takes_the_most_of_the_error(rank: int, kind: str) -> None:
    weight = torch.randn(24, 32)
    layer = packed_layer(_linear(weight), "W2A16-g16")
    moments = moments_of_inputs(32)
    used = {"none": None, "diagonal": moments.diagonal(), "full": moments}[kind]
    error = weight - layer.site().dense()
    adapter = LoraLinear(layer, LoraConfig(rank=rank, alpha=3))
    start_at_error(adapter, weight, moments=used)
    left = error - adapter.delta().detach()
    assert output_error(left, used) < output_error(error, used)
    if kind != "none" and rank < 24:
        plain = nearest_low_rank(error, rank).product()
        assert output_error(left, used) < output_error(error - plain, used)
    if rank >= 24:
        assert float(left.norm()) < 1e-3 * float(error.norm())


def test_a_base_without_error_starts_as_lora_does() -> None:
    linear = nn.Linear(32, 24)
    adapter = LoraLinear(linear, LoraConfig(rank=4))
    before = adapter.lora_a.detach().clone()
    start_at_error(adapter, linear.weight.detach())
    assert torch.equal(adapter.lora_a, before)
    assert not adapter.lora_b.any()


def test_starts_of_other_shapes_are_refused() -> None:
    adapter = LoraLinear(nn.Linear(32, 24), LoraConfig(rank=4))
    with pytest.raises(ShapeError, match=r"weight \[24, 16\] and base \[24, 32\]"):
        start_at_error(adapter, torch.zeros(24, 16))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    return linear
