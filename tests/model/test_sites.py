"""Sites, their views and the interception of their calls, on small modules of torch alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import StructureError
from bitwright.model.sites import Site, SiteCalls, block_sites, find_blocks, weight_view


class InputsFirst(nn.Module):
    """Stores [I, O] as GPT-2 does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    def __init__(self, shape: tuple[int, int, int], *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, way: str) -> Tensor:
        if way == "linear":
            return functional.linear(x, self.up[torch.tensor(1)])
        if way == "matmul":
            return x @ self.up[1].T
        return torch.bmm(x.expand(len(self.up), *x.shape), self.up)


class Norm(nn.Module):
    """One row per head, as Cohere's query norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))
        self.variance_epsilon = 1e-5


def calls(block: nn.Module, run: object, sites: list[Site]) -> list[tuple[str, tuple[int, ...]]]:
    seen: list[tuple[str, tuple[int, ...]]] = []
    with SiteCalls(block, sites, lambda site, x: seen.append((site.name, tuple(x.shape)))):
        run()
    return seen


def test_blocks_are_the_outermost_list_with_most_weights() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9)), "norm": nn.LayerNorm(4)})

    model = nn.ModuleDict({"tower": nn.ModuleList([nn.Linear(4, 4)]), "layers": nn.ModuleList([block(), block()])})
    assert find_blocks(model) == ("layers", ["layers.0", "layers.1"])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(StructureError, match="Sequential: no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_embeddings_norms_and_convolutions_are_no_sites() -> None:
    parts = {"table": nn.Embedding(8, 4), "norm": nn.LayerNorm(4), "heads": Norm(), "conv": nn.Conv1d(4, 4, 3)}
    block = nn.ModuleDict(parts | {"proj": nn.Linear(4, 6)})
    assert [site.name for site in block_sites(block, "m.0")] == ["m.0.proj"]


@pytest.mark.parametrize("prefix", ["", "m.layers.0"])
def test_view_of_a_transposed_weight_writes_through(prefix: str) -> None:
    block = nn.ModuleDict({"proj": InputsFirst(4, 6)})
    (site,) = block_sites(block, prefix)
    assert (site.out_features, site.in_features, site.transposed) == (6, 4, True)
    weight_view(block, site, prefix)[5, 2] = 7.0
    assert block["proj"].weight[2, 5] == 7.0


def test_sites_need_no_memory() -> None:
    with torch.device("meta"):
        block = nn.ModuleDict({"experts": Experts((4, 32, 8), is_transposed=False), "gate": nn.Linear(8, 4)})
    kinds = [(site.name, site.kind) for site in block_sites(block, "b")]
    assert kinds == [(f"b.experts.up[{i}]", "expert") for i in range(4)] + [("b.gate", "router")]


def test_routers_are_only_found_beside_their_experts() -> None:
    moe = nn.ModuleDict({"experts": Experts((4, 32, 8), is_transposed=False), "shared_gate": nn.Linear(8, 1)})
    block = nn.ModuleDict({"mlp": moe, "attn": nn.ModuleDict({"small": nn.Linear(8, 4)})})
    kinds = {site.name: site.kind for site in block_sites(block, "") if site.index is None}
    assert kinds == {"mlp.shared_gate": "router", "attn.small": "linear"}


@pytest.mark.parametrize("way", ["linear", "matmul"])
def test_expert_slices_are_recognised(way: str) -> None:
    block = nn.ModuleDict({"experts": Experts((3, 6, 4), is_transposed=False)})
    sites = block_sites(block, "b")
    assert calls(block, lambda: block["experts"](torch.randn(5, 4), way), sites) == [("b.experts.up[1]", (5, 4))]


def test_a_batched_product_calls_every_expert_with_its_own_inputs() -> None:
    block = nn.ModuleDict({"experts": Experts((3, 4, 6), is_transposed=True)})
    sites = block_sites(block, "b")
    seen = calls(block, lambda: block["experts"](torch.randn(5, 4), "batched"), sites)
    assert seen == [(f"b.experts.up[{i}]", (5, 4)) for i in range(3)]


def test_an_unexpected_orientation_is_an_error_even_for_square_weights() -> None:
    block = nn.ModuleDict({"experts": Experts((3, 4, 4), is_transposed=False)})
    with pytest.raises(StructureError, match=r"b\.experts\.up: stored \[I, O\] without saying so"):
        calls(block, lambda: block["experts"](torch.randn(5, 4), "batched"), block_sites(block, "b"))


def test_conv1d_and_transposed_views_are_recognised() -> None:
    block = nn.ModuleDict({"first": InputsFirst(4, 4), "second": nn.Linear(4, 4)})
    sites = block_sites(block, "b")
    x = torch.randn(2, 4)
    seen = calls(block, lambda: (block["first"](x), x @ block["second"].weight.T, torch.matmul(x, torch.eye(4))), sites)
    assert seen == [("b.first", (2, 4)), ("b.second", (2, 4))]


def test_sites_of_another_block_are_refused() -> None:
    sites = block_sites(nn.ModuleDict({"other": nn.Linear(4, 4)}), "b")
    with pytest.raises(StructureError, match=r"b\.other\.weight: not a weight of this block"):
        SiteCalls(nn.ModuleDict({"proj": nn.Linear(4, 4)}), sites, lambda _site, _x: None)
