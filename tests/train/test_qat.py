from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from bitwright.errors import RecipeError, StructureError
from bitwright.kernels.reference import linear
from bitwright.numerics.grid import Grid
from bitwright.schemes import Scheme
from bitwright.train.fake_weights import fit_start
from bitwright.train.qat import QatLinear, QatOptions, convert, freeze_grids, grid_parameters, prepare, remove

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SCHEME = Scheme.parse("W4A16-g32")


def tiny(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).train()


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = torch.arange(32).view(1, 32)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["W4A16-g32", "W8A8", "W8A8-static", "mxfp4", "nvfp4", "kmeans3-channel-o0.45"])
def test_training_improves_the_loss_and_converts_to_what_was_trained(name: str, tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir)
    scheme = Scheme.parse(name)
    prepared = prepare(model, {QUERY: scheme, DOWN: scheme}, dtype=torch.bfloat16)
    ids = torch.arange(32).view(1, 32)
    first = model(input_ids=ids, labels=ids).loss.item()
    train(model)
    model.eval()
    inputs = {site: torch.randn(4, module.in_features) for site, module in prepared.items()}
    outputs = {site: module(inputs[site]) for site, module in prepared.items()}

    sites = convert(model)

    assert sites.keys() == {QUERY, DOWN}
    assert model(input_ids=ids, labels=ids).loss.item() < first
    for site, quantized in sites.items():
        module = prepared[site]
        assert torch.equal(quantized.weight.dequantize(), module.fake_weight(module.weight))
        # Both sum the same products, in float32 here and exactly there: 128 terms, each rounded once.
        terms = (inputs[site].abs() @ quantized.weight.dequantize().abs().T).max()
        expected = linear(inputs[site], quantized, module.bias)
        torch.testing.assert_close(outputs[site], expected, rtol=0, atol=terms.item() * 128 * 2**-24)


def test_a_16_bit_model_keeps_float32_masters_and_stores_scales_in_its_own_dtype(tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir, torch.bfloat16)
    module = prepare(model, {QUERY: SCHEME})[QUERY]
    model.to(torch.float16).to(torch.bfloat16)

    assert module.weight.dtype == torch.float32
    assert module.fake_weight.get_parameter("scale").dtype == torch.float32
    grid = convert(model)[QUERY].weight.grid
    assert isinstance(grid, Grid)
    assert grid.scale.dtype == torch.bfloat16
    x = torch.randn(3, module.in_features, dtype=torch.bfloat16)
    assert torch.equal(module(x), linear(x, convert(model)[QUERY]))


def test_without_training_nothing_but_rounding_happens(tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir)
    weight = model.get_submodule(QUERY).weight.detach().clone()
    grid = fit_start(weight, SCHEME, torch.float32)
    prepare(model, {QUERY: SCHEME})
    site = convert(model)[QUERY]
    assert torch.equal(site.weight.codes, grid.quantize(weight))

    remove(model)

    dense = model.get_submodule(QUERY)
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, grid.fake_quantize(weight))
    assert convert(model) == {}


def test_a_given_start_is_used_and_a_stray_one_refused(tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir)
    weight = model.get_submodule(QUERY).weight.detach()
    start = fit_start(weight * 0.5, SCHEME, torch.float32)
    assert isinstance(start, Grid)
    with pytest.raises(RecipeError, match="has a start but no scheme"):
        prepare(model, {QUERY: SCHEME}, {DOWN: start})
    with pytest.raises(RecipeError, match="does not fit"):
        prepare(model, {QUERY: Scheme.parse("W3A16-g32")}, {QUERY: start})
    module = prepare(model, {QUERY: SCHEME}, {QUERY: start})[QUERY]
    assert torch.equal(module.fake_weight.get_parameter("scale"), start.scale)


def test_mixed_precision_does_not_round_quantized_inputs_again() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(64, 8)})
    module = prepare(model, {"proj": Scheme.parse("W8A8")})["proj"]
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    assert torch.equal(mixed, module(x))


def test_biases_are_kept_and_trained() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(32, 8)})
    bias = model["proj"].bias
    module = prepare(model, {"proj": Scheme.parse("W8A8")})["proj"]
    assert module.bias is bias
    module(torch.randn(2, 32)).sum().backward()
    assert bias.grad is not None
    remove(model)
    assert model["proj"].bias is bias


def test_frozen_grids_stay_while_weights_move(tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir)
    module = prepare(model, {QUERY: Scheme.parse("W8A8-static")})[QUERY]
    train(model, steps=1)
    assert len(grid_parameters(model)) == 2
    freeze_grids(model)
    grid, weight, scale = module.fake_weight.grid(module.weight), module.weight.detach().clone(), module.site().inputs
    train(model, steps=2)
    kept = module.fake_weight.grid(module.weight)
    assert isinstance(grid, Grid)
    assert isinstance(kept, Grid)
    assert torch.equal(kept.scale, grid.scale)
    after = module.site().inputs
    assert scale is not None
    assert after is not None
    assert scale.static is not None
    assert after.static is not None
    assert torch.equal(scale.static.scale, after.static.scale)
    assert not torch.equal(module.weight, weight)
    assert grid_parameters(model) == []


def test_scales_mode_trains_scales_alone(tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir)
    module = prepare(model, {QUERY: SCHEME}, options=QatOptions(mode="scales"))[QUERY]
    before = module.site().weight
    train(model)
    after = module.site().weight
    assert torch.equal(before.codes, after.codes)
    assert not torch.equal(before.dequantize(), after.dequantize())
    assert not module.weight.requires_grad


def test_a_state_resumes_bit_for_bit(tiny_llama_dir: Path) -> None:
    options = QatOptions(mode="minmax")
    schemes = {QUERY: Scheme.parse("mxfp4-a16"), DOWN: Scheme.parse("W8A8-static")}
    model, again = tiny(tiny_llama_dir), tiny(tiny_llama_dir)
    prepare(model, schemes, options=options)
    prepare(again, schemes, options=options)
    train(model, steps=2)
    freeze_grids(model)
    train(model, steps=1)

    again.load_state_dict(model.state_dict())

    ids = torch.arange(16).view(1, 16)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_auto_learns_what_can_be_learned(tiny_llama_dir: Path) -> None:
    prepared = prepare(tiny(tiny_llama_dir), {QUERY: SCHEME, DOWN: Scheme.parse("mxfp4")})
    assert [prepared[name].fake_weight.mode for name in (QUERY, DOWN)] == ["learned", "fixed"]


def test_what_cannot_be_prepared_is_refused_before_anything_changes(tiny_llama_dir: Path) -> None:
    model = tiny(tiny_llama_dir)
    with pytest.raises(StructureError, match="no module"):
        prepare(model, {QUERY: SCHEME, "model.layers.0.self_attn.qproj": SCHEME})
    with pytest.raises(StructureError, match="Leave this site out"):
        prepare(model, {"model.embed_tokens": SCHEME})
    assert not any(isinstance(module, QatLinear) for module in model.modules())
    for wrong in ({"mode": "lsq"}, {"inputs": "off"}, {"freeze_after": 0.0}):
        with pytest.raises(RecipeError, match="qat"):
            QatOptions(**wrong)  # type: ignore[arg-type]
