"""Edits along proven edges: the function stays, what flows along the edge grows, and nothing else changes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitwright.errors import ShapeError, StructureError, VerificationError
from bitwright.model.edits import named_tensors, num_channels, replace_tensors, scale_edge, scale_edges
from bitwright.model.probe import probe_model
from bitwright.model.sites import Site, SiteCalls
from bitwright.model.structure import BlockStructure, Edge

VOCABULARY = 96
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "llama_biases": ("LlamaConfig", BASE | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", BASE),
    "gemma2": ("Gemma2Config", BASE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi3": ("Phi3Config", BASE),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
             | {"bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", MHA | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
KINDS = {
    "llama": {"norm", "linear"},
    "llama_biases": {"norm", "linear"},
    "qwen2": {"norm", "linear"},
    "gemma2": {"norm_plus_one", "linear"},
    "phi3": {"norm", "linear"},
    "gpt2": {"norm", "linear"},
    "opt": {"norm", "linear"},
    "mixtral": {"norm", "linear"},
}
IDS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


class Subject:
    """A tiny random model, its proven structure and its logits."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        class_name, settings = ARCHITECTURES[name]
        config = getattr(transformers, class_name)(**settings)
        self.model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
                else:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        self.structure = probe_model(self.model, IDS, torch.Generator().manual_seed(0))
        self.logits = self.run()

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=IDS, use_cache=False).logits

    def inputs_of(self, block: BlockStructure, edge: Edge) -> Tensor:
        seen: list[Tensor] = []
        sites = [site for site in block.sites if site.name == edge.consumers[0]]
        with SiteCalls(self.block(block), sites, lambda _, x: seen.append(x.clone())):
            self.run()
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])

    def block(self, block: BlockStructure) -> nn.Module:
        return self.model.get_submodule(block.name)

    def tensors(self, block: BlockStructure) -> dict[str, Tensor]:
        return named_tensors(self.block(block), block.name)

    def put(self, block: BlockStructure, tensors: dict[str, Tensor]) -> None:
        replace_tensors(self.block(block), block.name, tensors)


SUBJECTS: dict[str, Subject] = {}


def subject(name: str) -> Subject:
    """Built once; every test leaves the model as it was."""
    if name not in SUBJECTS:
        SUBJECTS[name] = Subject(name)
    return SUBJECTS[name]


def powers(edge: Edge, sites: Sequence[Site], seed: int = 0) -> Tensor:
    """Powers of two, none of them 1."""
    exponents = torch.tensor([-5, -2, 1, 6])
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(exponents[torch.randint(4, (num_channels(edge, sites),), generator=generator)].float())


def rounding_bound(logits: Tensor) -> float:
    """Two blocks with some ten roundings in sequence, each of a unit in the last place of what it rounds."""
    return 64 * torch.finfo(torch.float32).eps * float(logits.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_edge_keeps_the_function_and_scales_what_flows_along_it(name: str) -> None:
    s = subject(name)
    kinds = set()
    for block in s.structure.blocks:
        before = s.tensors(block)
        originals = {key: value.clone() for key, value in before.items()}
        for edge in block.edges:
            kinds.add(edge.kind)
            scale = powers(edge, block.sites)
            inputs = s.inputs_of(block, edge)
            changed = scale_edge(before, block.sites, edge, scale)
            s.put(block, changed)
            moved = float((s.run() - s.logits).abs().max())
            grown = s.inputs_of(block, edge)
            s.put(block, {key: originals[key] for key in changed})
            # 1 + weight is not exact in floating point; everything else is a power of two.
            assert moved <= (rounding_bound(s.logits) if edge.kind == "norm_plus_one" else 0.0), edge
            expected = inputs * scale[edge.channels(inputs.shape[1])]
            if edge.kind == "norm_plus_one":
                # Half a unit of w' near -1 is 2^-25; of 1 + w', down to a quarter of 2^-5 here, that is 2^-18.
                torch.testing.assert_close(grown, expected, rtol=2.0**-17, atol=0.0)
            else:
                assert torch.equal(grown, expected)
        assert all(torch.equal(before[key], originals[key]) for key in originals), "the tensors given were changed"
    assert kinds == KINDS[name]
    assert torch.equal(s.run(), s.logits)


@pytest.mark.parametrize("name", ["llama_biases", "qwen2", "phi3"])
def test_all_edges_of_a_block_at_once(name: str) -> None:
    """One weight is consumer of one edge and producer of the next; each parameter is copied once."""
    s = subject(name)
    block = s.structure.blocks[0]
    originals = {key: value.clone() for key, value in s.tensors(block).items()}
    scales = [(edge, powers(edge, block.sites, seed)) for seed, edge in enumerate(block.edges)]
    changed = scale_edges(originals, block.sites, scales)
    one_by_one: dict[str, Tensor] = {}
    for edge, scale in scales:
        one_by_one.update(scale_edge({**originals, **one_by_one}, block.sites, edge, scale))
    assert changed.keys() == one_by_one.keys()
    assert all(torch.equal(changed[key], one_by_one[key]) for key in changed)
    s.put(block, changed)
    found = s.run()
    s.put(block, originals)
    assert torch.equal(found, s.logits)


@settings(max_examples=25)
@given(name=st.sampled_from(["llama_biases", "gemma2"]), data=st.data())
def test_any_positive_scale_keeps_the_function_within_rounding(name: str, data: st.DataObject) -> None:
    s = subject(name)
    block = s.structure.blocks[data.draw(st.integers(0, 1))]
    edge = data.draw(st.sampled_from(block.edges))
    width = num_channels(edge, block.sites)
    exponents = data.draw(st.lists(st.floats(-6, 6), min_size=width, max_size=width))
    originals = s.tensors(block)
    changed = scale_edge(originals, block.sites, edge, torch.tensor(exponents).exp2())
    kept = {key: originals[key].clone() for key in changed}
    s.put(block, changed)
    found = s.run()
    s.put(block, kept)
    assert float((found - s.logits).abs().max()) <= rounding_bound(s.logits)


@pytest.mark.parametrize("part", ["producer", "bias", "consumer"])
def test_leaving_out_a_part_moves_the_logits(part: str) -> None:
    """Control: the comparison above sees a part that was forgotten."""
    s = subject("llama_biases")
    block = s.structure.blocks[0]
    edge = next(edge for edge in block.edges if edge.producer.endswith("v_proj"))
    originals = {key: value.clone() for key, value in s.tensors(block).items()}
    changed = scale_edge(originals, block.sites, edge, powers(edge, block.sites))
    names = {"producer": f"{edge.producer}.weight", "bias": f"{edge.producer}.bias"}
    forgotten = names.get(part, f"{edge.consumers[0]}.weight")
    assert changed.keys() == {*names.values(), f"{edge.consumers[0]}.weight"}
    del changed[forgotten]
    s.put(block, changed)
    moved = float((s.run() - s.logits).abs().max())
    s.put(block, originals)
    assert moved > 100 * rounding_bound(s.logits)


SITES = (
    Site(name="b.up[1]", parameter="b.up", index=1, out_features=4, in_features=3, transposed=False, kind="expert"),
    Site(name="b.down", parameter="b.down.weight", index=None, out_features=3, in_features=4, transposed=True,
         kind="linear"),
)  # fmt: skip
EDGE = Edge(producer="b.up[1]", kind="linear", rows=(2, 4), repeat=2, head_dim=1, consumers=("b.down",))


def by_hand() -> dict[str, Tensor]:
    return {"b.up": torch.ones(2, 4, 3), "b.up_bias": torch.ones(2, 4), "b.down.weight": torch.ones(4, 3)}


def test_rows_of_an_expert_repeated_heads_and_transposed_columns() -> None:
    changed = scale_edge(by_hand(), SITES, EDGE, torch.tensor([2.0, 8.0]))
    assert changed["b.up"][0].eq(1).all()
    assert changed["b.up"][1, :, 0].tolist() == [1, 1, 2, 8]
    assert changed["b.up_bias"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 8]]
    assert changed["b.down.weight"].tolist() == [[0.5] * 3, [0.5] * 3, [0.125] * 3, [0.125] * 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    site = Site(
        name="b.fc", parameter="b.fc.weight", index=None, out_features=5, in_features=6, transposed=False, kind="linear"
    )
    edge = Edge(producer="b.norm", kind="norm_plus_one", rows=None, repeat=1, head_dim=None, consumers=("b.fc",))
    tensors = {"b.norm.weight": torch.randn(6).to(dtype), "b.fc.weight": torch.randn(5, 6).to(dtype)}
    scale = torch.rand(6) + 0.5
    changed = scale_edge(tensors, (site,), edge, scale)
    wide = {key: value.double() for key, value in tensors.items()}
    assert torch.equal(changed["b.norm.weight"], ((1 + wide["b.norm.weight"]) * scale.double() - 1).to(dtype))
    # Through float32: at most one unit of the last place, where float32 itself lies half way between two values.
    expected = wide["b.fc.weight"] / scale.double()
    assert ((changed["b.fc.weight"].double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps * 0.501).all()


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(3), ShapeError, r"^b\.up\[1\]: a scale \[3\] must be \[2\]"),
        (torch.tensor([1.0, 0.0]), VerificationError, "positive and finite"),
        (torch.tensor([1.0, -2.0]), VerificationError, "positive and finite"),
        (torch.tensor([1.0, torch.nan]), VerificationError, "positive and finite"),
        (torch.tensor([1.0, torch.inf]), VerificationError, "positive and finite"),
    ],
)
def test_scales_that_no_proof_covers_are_refused(scale: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scale_edge(by_hand(), SITES, EDGE, scale)


def test_overflow_is_refused() -> None:
    tensors = {key: value.half() for key, value in by_hand().items()}
    with pytest.raises(VerificationError, match=r"^b\.up: scaling leaves the range of torch\.float16"):
        scale_edge(tensors, SITES, EDGE, torch.tensor([1.0, 2.0**17]))


def test_a_missing_parameter_is_named() -> None:
    tensors = by_hand()
    del tensors["b.down.weight"]
    with pytest.raises(StructureError, match=r"^b\.down\.weight: not among the tensors"):
        scale_edge(tensors, SITES, EDGE, torch.ones(2))
