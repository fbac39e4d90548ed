"""Proposing and proving on blocks whose true structure is known because they are written here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import StructureError
from bitwright.model.probe import propose, prove
from bitwright.model.proof import NO_EFFECT, NOT_EQUIVALENT, NOT_HEADS, UNREACHED
from bitwright.model.structure import BlockStructure, Edge, collection_passes

WIDTH = 8


class Mlp(nn.Module):
    """1.5 x + gain · fc2(act(fc1(norm(x)))), with the ways in which an edge may fail as options."""

    def __init__(self, act: Callable[[Tensor], Tensor], *, leak: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 12)
        self.fc2 = nn.Linear(12, WIDTH)
        self.act, self.leak, self.gain = act, leak, gain
        randomise(self)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        normed = self.norm(hidden_states)
        out = self.gain * self.fc2(self.act(self.fc1(normed)))
        return 1.5 * hidden_states + out + (normed if self.leak else 0.0), None


class Attention(nn.Module):
    """Grouped values read by `heads` heads each; `interleave` repeats channels where heads should be repeated."""

    def __init__(self, *, interleave: bool) -> None:
        super().__init__()
        self.v = nn.Linear(WIDTH, 4, bias=False)
        self.o = nn.Linear(8, WIDTH, bias=False)
        self.interleave = interleave

    def forward(self, x: Tensor) -> Tensor:
        value = self.v(x).unflatten(-1, (2, 2))
        repeated = torch.cat([value[..., 0, :]] * 2 + [value[..., 1, :]] * 2, dim=-1)
        mixed = repeated[..., [0, 1, 4, 2, 3, 5, 6, 7]] if self.interleave else repeated
        return x + self.o(mixed.cumsum(-2))


class Moe(nn.Module):
    """Experts 0 … 2 of three-dimensional weights; only those listed are run."""

    def __init__(self, reached: list[int]) -> None:
        super().__init__()
        self.reached = reached
        self.up = nn.Parameter(torch.randn(3, 6, WIDTH))
        self.up_bias = nn.Parameter(torch.randn(3, 6))
        self.down = nn.Parameter(torch.randn(3, WIDTH, 6))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for expert in self.reached:
            inner = nn.functional.linear(x[:, expert:], self.up[expert], self.up_bias[expert])
            out = out + nn.functional.linear(inner.relu(), self.down[expert]).mean()
        return out


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)


def probe(block: nn.Module, x: Tensor | None = None) -> BlockStructure:
    x = torch.randn(2, 6, WIDTH) if x is None else x

    def call() -> object:
        return block(x)

    return prove(block, "b", call, propose(block, "b", call), torch.Generator().manual_seed(0))


def reasons(structure: BlockStructure) -> dict[str, str]:
    return {edge.producer: edge.reason for edge in structure.rejected}


def test_relu_carries_a_scale_and_gelu_does_not() -> None:
    relu, gelu = probe(Mlp(torch.relu)), probe(Mlp(nn.functional.gelu))
    assert [(edge.producer, edge.kind) for edge in relu.edges] == [("b.norm", "norm"), ("b.fc1", "linear")]
    assert relu.rejected == ()
    assert [edge.producer for edge in gelu.edges] == ["b.norm"]
    assert reasons(gelu) == {"b.fc1": NOT_EQUIVALENT}


def test_a_second_reader_of_the_norm_refuses_the_edge() -> None:
    assert reasons(probe(Mlp(torch.relu, leak=True))) == {"b.norm": NOT_EQUIVALENT}


@pytest.mark.parametrize("gain", [0.0, 1e-6])
def test_an_edge_without_measurable_effect_is_refused(gain: float) -> None:
    assert reasons(probe(Mlp(torch.relu, gain=gain))) == {"b.norm": NO_EFFECT, "b.fc1": NO_EFFECT}


def test_repeated_heads_are_resolved() -> None:
    (edge,) = probe(Attention(interleave=False)).edges
    assert (edge.repeat, edge.head_dim, edge.channels(8)) == (2, 2, [0, 1, 0, 1, 2, 3, 2, 3])


def test_irregular_repetition_is_refused() -> None:
    assert probe(Attention(interleave=True)).edges == ()


def test_a_producer_that_reaches_every_column_has_no_heads() -> None:
    block = Attention(interleave=False)
    block.forward = lambda x: x + block.o(block.v(x).softmax(-1).repeat(1, 1, 2))  # type: ignore[method-assign]
    assert reasons(probe(block)) == {"b.v": NOT_HEADS}


def test_weights_return_bit_for_bit_even_when_the_call_fails() -> None:
    block = Mlp(torch.relu)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    runs = iter(range(100))

    def call() -> object:
        if next(runs) == 4:
            raise KeyboardInterrupt
        return block(torch.ones(2, 6, WIDTH).cumsum(1))

    with pytest.raises(KeyboardInterrupt):
        prove(block, "b", call, propose(block, "b", call), torch.Generator().manual_seed(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def test_a_bfloat16_block_is_probed_in_float32_and_returned_as_it_was() -> None:
    block = Mlp(torch.relu).bfloat16()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    structure = probe(block, torch.randn(2, 6, WIDTH).bfloat16())
    assert [edge.producer for edge in structure.edges] == ["b.norm", "b.fc1"]
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_a_block_that_changes_between_runs_is_an_error() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)).train()
    with pytest.raises(StructureError, match="another output on each run"):
        probe(block)


def test_a_call_of_something_else_is_an_error() -> None:
    with pytest.raises(StructureError, match="b: the call did not run it"):
        propose(Mlp(torch.relu), "b", lambda: None)


def test_experts_that_no_token_reached_are_listed_and_never_proven() -> None:
    structure = probe(Moe(reached=[0, 2]))
    assert structure.uncalled == ("b.up[1]", "b.down[1]")
    assert [edge.producer for edge in structure.edges] == ["b.up[0]", "b.up[2]"]
    assert reasons(structure) == {"b.up[1]": UNREACHED}
    steps = [("b.up[0]",), ("b.up[1]",), ("b.up[2]",), ("b.down[0]",), ("b.down[1]",), ("b.down[2]",)]
    assert [group.sites for group in structure.groups] == steps
    assert collection_passes(structure) == [tuple(steps[:3]), tuple(steps[3:])]


def test_every_site_is_in_exactly_one_group() -> None:
    block = Mlp(torch.relu)
    block.unused = nn.Linear(3, 3)
    structure = probe(block)
    assert structure.uncalled == ("b.unused",)
    assert sorted(n for group in structure.groups for n in group.sites) == sorted(s.name for s in structure.sites)


def test_a_proof_moves_to_an_equal_block_only() -> None:
    first, other = probe(Mlp(torch.relu)), probe(Moe(reached=[0]))
    block = Mlp(torch.relu)
    second = propose(block, "c", lambda: block(torch.randn(1, 3, WIDTH)))
    expected = Edge(producer="c.norm", kind="norm", rows=None, repeat=1, head_dim=None, consumers=("c.fc1",))
    assert second.with_proof_of(first).edges[0] == expected
    assert first.renamed("c").edges[0] == expected
    with pytest.raises(ValueError, match="differ in parameters"):
        second.with_proof_of(other)
