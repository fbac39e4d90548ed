"""Memory of training: the exact parts of the prediction are what a live model holds; activations are near it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.fitting import fit
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import MODEL_SCALE, Scheme
from bitwright.search.model_shape import ModelShape, shape_of_config
from bitwright.train.group_adapter import add_group_adapters
from bitwright.train.lora import LoraConfig, add_adapters
from bitwright.train.memory_ledger import (
    Batch,
    KeptActivations,
    MemoryLedger,
    measure_memory,
    predict_memory,
)
from bitwright.train.target_layers import block_layers

CONFIG = LoraConfig(rank=4, targets=("*.q_proj", "*.down_proj"))
BATCH = Batch(num_sequences=2, seqlen=16)


def config(dtype: torch.dtype, *, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, dtype=dtype, attention_bias=True,
    )  # fmt: skip


def shape_and_model(tmp_path: Path, dtype: torch.dtype, *, tied: bool = False) -> tuple[ModelShape, LlamaForCausalLM]:
    config(dtype, tied=tied).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config(dtype, tied=tied), dtype=dtype)
    assert isinstance(model, LlamaForCausalLM)
    return shape_of_config(tmp_path), model


def pack(model: nn.Module, schemes: Mapping[str, Scheme | None], dtype: torch.dtype) -> None:
    for name, layer in block_layers(model).items():
        scheme = schemes.get(name)
        if scheme is None or not isinstance(layer, nn.Linear):
            continue
        weights, weight = scheme.weights, layer.weight.detach().float()
        scale = FloatScale(dtype) if weights.scale == MODEL_SCALE else SCALE_FORMATS[weights.scale]
        grid = fit(weight, weights.format, weights.granularity, method="minmax", importance=None, scale=scale)
        codes = grid.quantize(weight)
        if isinstance(grid, Grid) and scale.stored_afterwards:
            grid = store_scale(grid, scale)
        site = QuantizedSite(weight=QTensor(codes=codes, grid=grid))
        stored = {own.GUARD: own.guard(dtype), **own.encode(site)}
        bias = None if layer.bias is None else layer.bias.detach()
        model.set_submodule(name, QuantizedLinear(scheme, *weight.shape, stored, bias))


def step(model: LlamaForCausalLM, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> MemoryLedger:
    optimizer = kind([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(32).reshape(2, 16)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return measure_memory(model, optimizer)


def exact(ledger: MemoryLedger) -> tuple[int, ...]:
    return ledger.weights, ledger.scales, ledger.adapters, ledger.gradients, ledger.optimizer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, "W4A16-g32", "W3A16-g16-asym", "W4A16-g32-floatzero", "nf4-b64-dq"])
def test_the_exact_parts_are_exact(name: str | None, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    shape, model = shape_and_model(tmp_path, dtype, tied=tied)
    schemes = {} if name is None else shape.uniform(Scheme.parse(name))
    pack(model, schemes, dtype)
    add_adapters(model, CONFIG)
    predicted, found = predict_memory(shape, schemes, CONFIG, BATCH), step(model)
    assert exact(predicted) == exact(found)
    assert predicted.total == sum(exact(predicted)) + predicted.activations
    assert predicted.adapters == 4 * 3 * 4 * (64 + 64 + 96 + 64)
    assert predicted.optimizer == 2 * predicted.adapters + 4 * 12


def test_group_adapters_are_smaller(tmp_path: Path) -> None:
    shape, model = shape_and_model(tmp_path, torch.float32)
    schemes = shape.uniform(Scheme.parse("W4A16-g32-floatzero"))
    pack(model, schemes, torch.float32)
    add_group_adapters(model, CONFIG)
    assert exact(predict_memory(shape, schemes, CONFIG, BATCH, by_group=True)) == exact(step(model))


def test_a_model_that_is_packed_in_part(tmp_path: Path) -> None:
    shape, model = shape_and_model(tmp_path, torch.bfloat16)
    whole = shape.uniform(Scheme.parse("W4A16-g32"))
    schemes = {name: scheme for name, scheme in whole.items() if "mlp" in name}
    pack(model, schemes, torch.bfloat16)
    add_adapters(model, CONFIG)
    assert exact(predict_memory(shape, schemes, CONFIG, BATCH)) == exact(step(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_trained(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    shape, model = shape_and_model(tmp_path, dtype, tied=tied)
    predicted = predict_memory(shape, {}, None, BATCH)
    assert exact(predicted) == exact(step(model))
    assert predicted.gradients == predicted.weights


def test_everything_trained_with_states_in_8_bits(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shape, model = shape_and_model(tmp_path, torch.float32)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert min(sizes) < 4096 < max(sizes), "both kinds of states"
    predicted = predict_memory(shape, {}, None, BATCH, optimizer="adamw8bit")
    assert exact(predicted) == exact(step(model, bitsandbytes.optim.AdamW8bit))


def activations_of(model: nn.Module, ids: Tensor) -> int:
    with KeptActivations(model) as kept:
        model(ids, labels=ids, use_cache=False)
    return kept.num_bytes


@pytest.mark.parametrize("name", [None, "W4A16-g32"])
def test_activations_are_near_the_estimate(name: str | None, tmp_path: Path) -> None:
    """Within a factor of two: the estimate does not know which attention runs, nor what activation functions keep."""
    shape, model = shape_and_model(tmp_path, torch.float32)
    schemes = {} if name is None else shape.uniform(Scheme.parse(name))
    pack(model, schemes, torch.float32)
    add_adapters(model, LoraConfig(rank=4))
    model.train()
    ids = torch.arange(32).reshape(2, 16)
    found = activations_of(model, ids)
    predicted = predict_memory(shape, schemes, LoraConfig(rank=4), BATCH).activations
    assert found / 2 < predicted < found * 2
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    assert activations_of(model, ids) < found


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(tmp_path: Path) -> None:
    shape, _ = shape_and_model(tmp_path, torch.float32)
    full = predict_memory(shape, {}, CONFIG, BATCH)
    less = predict_memory(shape, {}, CONFIG, Batch(num_sequences=2, seqlen=16, checkpointing=True))
    assert exact(full) == exact(less)
    tokens, logits = 32, 32 * 40 * 12
    block = (full.activations - logits) // 3
    assert less.activations == tokens * 3 * 64 * 4 + block + logits


def test_an_untrained_model_without_optimizer(tmp_path: Path) -> None:
    shape, model = shape_and_model(tmp_path, torch.bfloat16)
    found = measure_memory(model, activations=7)
    assert exact(found) == (2 * shape.num_parameters, 0, 0, 0, 0)
    assert found.total == found.weights + 7
