"""Products of chosen weights run on codes, whoever asks for them, and only while their block is in memory."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import StructureError, VerificationError
from bitwright.kernels.reference import linear
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.products import QuantizedProducts
from bitwright.model.sites import Site, block_sites, storage_key, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E4M3
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid

INT8, UINT4 = IntegerFormat(bits=8, symmetric=True, full_range=False), IntegerFormat(bits=4, symmetric=False)
TOKEN, GROUP = Granularity(kind="token"), Granularity(kind="group", group_size=32)
SEQLEN = 16
INT8_INPUTS = InputQuantizer(format=INT8, granularity=TOKEN)
INPUTS = {"int8": INT8_INPUTS, "fp8": InputQuantizer(format=E4M3, granularity=TOKEN)}


def quantized(weight: Tensor, inputs: InputQuantizer | None = INT8_INPUTS) -> QuantizedSite:
    grid = fit_grid(weight, UINT4, GROUP)
    return QuantizedSite(weight=QTensor(codes=grid.quantize(weight), grid=grid), inputs=inputs)


def gpt2_dir(folder: Path) -> Path:
    """A GPT-2, which stores its weights [I, O] and multiplies by `addmm`."""
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> StreamedModel:
    folder = tiny_llama_dir if request.param == "llama" else gpt2_dir(tmp_path)
    return StreamedModel(open_checkpoint(folder))


def hidden_of(model: StreamedModel, num_windows: int = 3) -> Tensor:
    with model.outside():
        return model.enter(torch.randint(3, 97, (num_windows, SEQLEN)))


@contextmanager
def forwards_replaced(block: nn.Module, sites: dict[Site, QuantizedSite], prefix: str) -> Generator[None, None, None]:
    """Let the modules that hold the sites' weights call the reference product instead of their own forward."""
    modules = {site: block.get_submodule(site.name[len(prefix) + 1 :]) for site in sites}
    for site, module in modules.items():
        module.forward = partial(linear, site=sites[site], bias=cast(Any, module).bias)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_block_on_codes_is_one_with_reference_products(model: StreamedModel, inputs: str) -> None:
    hidden = hidden_of(model)
    for index in range(model.num_blocks):
        name = model.block_names[index]
        with model.block(index) as block:
            of_floats = model.run_block(block, index, hidden)
            sites = {
                site: quantized(weight_view(block, site, name).contiguous(), INPUTS[inputs])
                for site in block_sites(block, name)
            }
            assert len(sites) == (7 if "layers" in name else 4)
            with forwards_replaced(block, sites, name):
                expected = model.run_block(block, index, hidden)
            assert torch.equal(model.run_block(block, index, hidden), of_floats)
            for site, each in sites.items():
                model.run_on_codes(block, site, name, each)
            found = model.run_block(block, index, hidden)
            assert torch.equal(found, expected)
            assert not torch.equal(found, of_floats)
        hidden = found


def test_sites_join_one_by_one(model: StreamedModel) -> None:
    """The walk quantizes a block group by group: what is not quantized yet stays a product of floats."""
    hidden, name = hidden_of(model), model.block_names[0]
    done: dict[Site, QuantizedSite] = {}
    outputs: list[Tensor] = []
    with model.block(0) as block:
        for site in block_sites(block, name):
            done[site] = quantized(weight_view(block, site, name).contiguous())
            model.run_on_codes(block, site, name, done[site])
            outputs.append(model.run_block(block, 0, hidden))
        assert all(not torch.equal(a, b) for a, b in pairwise(outputs))
    with model.block(0) as block:
        for count, output in enumerate(outputs, start=1):
            with forwards_replaced(block, dict(list(done.items())[:count]), name):
                assert torch.equal(model.run_block(block, 0, hidden), output)


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
def test_products_end_when_the_block_is_freed(model: StreamedModel, fails: bool) -> None:
    hidden, name = hidden_of(model), model.block_names[0]
    with model.block(0) as block:
        of_floats = model.run_block(block, 0, hidden)

    def run() -> None:
        with model.block(0) as block:
            for site in block_sites(block, name):
                model.run_on_codes(block, site, name, quantized(weight_view(block, site, name).contiguous()))
            assert not torch.equal(model.run_block(block, 0, hidden), of_floats)
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    for _ in range(3):  # The memory of the weights may be given out anew at any time.
        with model.block(0) as block:
            assert torch.equal(model.run_block(block, 0, hidden), of_floats)


def test_products_are_not_left_active(model: StreamedModel) -> None:
    """Outside `run_block` a weight is a tensor like any other."""
    hidden_of(model)
    name = model.block_names[0]
    with model.block(0) as block:
        site = block_sites(block, name)[0]
        weight = weight_view(block, site, name)
        model.run_on_codes(block, site, name, quantized(weight.contiguous()))
        x = torch.randn(4, site.in_features)
        assert torch.equal(x @ weight.T, x @ weight.clone().T)


def test_without_input_quantization_the_weight_in_memory_counts(model: StreamedModel) -> None:
    hidden, name = hidden_of(model), model.block_names[0]
    with model.block(0) as block:
        of_floats = model.run_block(block, 0, hidden)
        for site in block_sites(block, name):
            model.run_on_codes(block, site, name, quantized(weight_view(block, site, name).contiguous(), None))
        assert torch.equal(model.run_block(block, 0, hidden), of_floats)


def test_inputs_that_are_not_finite_are_refused(model: StreamedModel) -> None:
    hidden, name = hidden_of(model), model.block_names[0]
    hidden[1, 2, 3] = float("nan")
    with model.block(0) as block:
        site = block_sites(block, name)[0]
        model.run_on_codes(block, site, name, quantized(weight_view(block, site, name).contiguous()))
        with pytest.raises(VerificationError, match="NaN or Inf"):
            model.run_block(block, 0, hidden)


IN, OUT, TOKENS, EXPERTS = 64, 6, 5, 3


def called_module(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    module = nn.Linear(IN, OUT)
    module.weight, module.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return module(x)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
# x [T, I], weight as stored, what is added [O]; the weight is [O, I] for the first, else [I, O].
STORED_BY_ROWS: dict[str, Product] = {
    "linear": functional.linear,
    "linear by name": lambda x, weight, bias: functional.linear(input=x, weight=weight, bias=bias),
    "module": called_module,
    "matmul of the transposed": lambda x, weight, bias: x @ weight.T + bias,
}
STORED_BY_COLUMNS: dict[str, Product] = {
    "@": lambda x, weight, bias: x @ weight + bias,
    "matmul": lambda x, weight, bias: torch.matmul(x, weight) + bias,
    "matmul by name": lambda x, weight, bias: torch.matmul(input=x, other=weight) + bias,
    "Tensor.matmul": lambda x, weight, bias: x.matmul(weight) + bias,
    "mm": lambda x, weight, bias: torch.mm(x, weight) + bias,
    "mm by name": lambda x, weight, bias: torch.mm(x, mat2=weight) + bias,
    "Tensor.mm": lambda x, weight, bias: x.mm(weight) + bias,
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight),
    "addmm by name": lambda x, weight, bias: torch.addmm(bias, mat1=x, mat2=weight, beta=1, alpha=1),
    "Tensor.addmm": lambda x, weight, bias: bias.addmm(x, weight),
}
STACKED: dict[str, Product] = {
    "bmm": lambda x, stack, _: torch.bmm(x, stack),
    "Tensor.bmm": lambda x, stack, _: x.bmm(stack),
    "@": lambda x, stack, _: x @ stack,
    "one input for all": lambda x, stack, _: x[:1] @ stack,
    "baddbmm": lambda x, stack, added: torch.baddbmm(added, x, stack),
    "Tensor.baddbmm": lambda x, stack, added: added.baddbmm(x, stack),
}


@pytest.mark.parametrize("name", STORED_BY_ROWS)
def test_every_product_with_a_weight_stored_by_rows(name: str) -> None:
    x, weight, bias = torch.randn(TOKENS, IN), torch.randn(OUT, IN), torch.randn(OUT)
    site = quantized(weight)
    with QuantizedProducts({storage_key(weight): site}):
        found = STORED_BY_ROWS[name](x, weight, bias)
    assert torch.equal(found, linear(x, site, bias))
    assert not torch.equal(found, STORED_BY_ROWS[name](x, weight, bias))


@pytest.mark.parametrize("name", STORED_BY_COLUMNS)
def test_every_product_with_a_weight_stored_by_columns(name: str) -> None:
    x, weight, bias = torch.randn(TOKENS, IN), torch.randn(IN, OUT), torch.randn(OUT)
    site = quantized(weight.T.contiguous())
    with QuantizedProducts({storage_key(weight.T): site}):
        found = STORED_BY_COLUMNS[name](x, weight, bias)
    assert torch.equal(found, linear(x, site, bias))


@pytest.mark.parametrize("name", STACKED)
def test_every_product_with_a_stack_of_experts(name: str) -> None:
    """Two of three experts are quantized; the third is multiplied as it is."""
    x, stack = torch.randn(EXPERTS, TOKENS, IN), torch.randn(EXPERTS, IN, OUT)
    added = torch.randn(EXPERTS, TOKENS, OUT)
    sites = {index: quantized(stack[index].T.contiguous()) for index in (0, 2)}
    with QuantizedProducts({storage_key(stack[index]): site for index, site in sites.items()}):
        found = STACKED[name](x, stack, added)
    for index in range(EXPERTS):
        inputs = x[0] if name == "one input for all" else x[index]
        expected = linear(inputs, sites[index]) if index in sites else inputs @ stack[index]
        assert torch.equal(found[index], expected + added[index] if "add" in name else expected)


def test_one_expert_of_a_stack() -> None:
    x, stack = torch.randn(TOKENS, IN), torch.randn(EXPERTS, OUT, IN)
    site = quantized(stack[1])
    with QuantizedProducts({storage_key(stack[1]): site}):
        found = [functional.linear(x, each) for each in stack]
    expected = [functional.linear(x, each) for each in stack]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], linear(x, site))
    assert torch.equal(found[2], expected[2])


def test_other_weights_and_parts_of_a_weight_are_left_alone() -> None:
    x, weight = torch.randn(TOKENS, IN), torch.randn(OUT, IN)
    with QuantizedProducts({storage_key(weight): quantized(weight)}):
        copied, part = functional.linear(x, weight.clone()), functional.linear(x, weight[:3])
        total = weight + weight
    assert torch.equal(copied, functional.linear(x, weight))
    assert torch.equal(part, functional.linear(x, weight[:3]))
    assert torch.equal(total, 2 * weight)


@pytest.mark.parametrize("options", [{"alpha": 2}, {"beta": 0.5}])
def test_scaled_products_are_refused(options: dict[str, Any]) -> None:
    x, weight, bias = torch.randn(TOKENS, IN), torch.randn(IN, OUT), torch.randn(OUT)
    with (
        QuantizedProducts({storage_key(weight): quantized(weight.T.contiguous())}),
        pytest.raises(StructureError, match=r"addmm: a scaled product"),
    ):
        torch.addmm(bias, x, weight, **options)
