"""The pure parts of benchmarks/peers: no peer is installed and none is run."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitwright.demo import demo_model
from bitwright.schemes import Scheme

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(PEERS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(PEERS))


common, run, judging, llamacpp, autoround = (
    load(name) for name in ("common", "run", "judge", "llamacpp_adapter", "autoround_adapter")
)


@pytest.mark.parametrize("peer", run.PEERS)
def test_every_cell_of_a_peer_is_a_scheme_of_ours_and_its_environment_is_pinned(peer: str) -> None:
    cells = run.all_cells([peer])
    assert len(cells) == len(set(cells)) > 0
    for cell in cells:
        ours = Scheme.parse(cell.scheme)
        theirs = common.Scheme.parse(cell.scheme)
        assert (ours.activations is not None) == (theirs.input_bits == 8)
        assert ours.weights.granularity.group_size == theirs.group
    lines = run.requirements(peer).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins), pins


def test_adapters_import_nothing_of_this_project() -> None:
    for path in [PEERS / "common.py", *PEERS.glob("*_adapter.py")]:
        assert not re.search(r"^\s*(from|import) bitwright", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def test_cells_are_chosen_by_scheme_and_method() -> None:
    chosen = run.all_cells(["hqq", "llmcompressor"], schemes=["W3A16-g128"], methods=["hqq", "gptq"])
    assert [str(cell) for cell in chosen] == ["hqq hqq W3A16-g128", "llmcompressor gptq W3A16-g128"]


def test_a_cell_has_another_key_if_anything_it_depends_on_changes() -> None:
    facts = {"model": "a", "tokens": "b", "adapter": "c", "options": "d"}
    cells = [run.Cell(peer="hqq", method="hqq", scheme=scheme) for scheme in ("W4A16-g128", "W4A16-g32")]
    keys = [run.cell_key(cell, **facts) for cell in cells]
    keys += [run.cell_key(cells[0], **{**facts, name: "other"}) for name in facts]
    assert len(set(keys)) == len(keys)
    assert run.cell_key(cells[0], **facts) == keys[0]


def test_a_finished_cell_is_not_repeated_and_a_failed_one_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked: list[str] = []

    def run_cell(cell: Any, *_: Any) -> dict[str, Any]:
        asked.append(cell.method)
        base = {"peer": cell.peer, "method": cell.method, "scheme": cell.scheme}
        return {**base, "error": "no"} if cell.method == "rtn" else {**base, "seconds": 1.0, "bits_per_weight": 4.0}

    monkeypatch.setattr(run, "run_cell", run_cell)
    cells = run.all_cells(["llmcompressor"], schemes=["W4A16-g128"], methods=["rtn", "gptq"])
    tokens = torch.arange(8).view(2, 4)
    first = run.run_peers(model, tokens, tmp_path / "work", cells, 1)
    assert run.run_peers(model, tokens, tmp_path / "work", cells, 1) == first
    assert asked == ["rtn", "gptq"]
    run.run_peers(model, tokens, tmp_path / "work", cells, 1, retry=True)
    assert asked == ["rtn", "gptq", "rtn"]
    run.run_peers(model, tokens + 1, tmp_path / "work", cells, 1)
    assert asked[3:] == ["rtn", "gptq"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2))
        self.lm_head = nn.Linear(4, 4, bias=False)
        self.saved: Path | None = None

    def save_pretrained(self, folder: Path) -> None:
        self.saved = folder


def weights_of(model: Model, change: float) -> dict[str, Tensor]:
    return {f"{name}.weight": each.weight.detach() + change for name, each in common.decoder_linears(model).items()}


def test_only_the_linears_of_decoder_blocks_are_asked_for() -> None:
    assert list(common.decoder_linears(Model())) == ["layers.0.up", "layers.1.up"]


def test_decoded_weights_replace_the_original_ones(tmp_path: Path) -> None:
    """However far they are from them, if a norm has changed as well."""
    model = Model()
    weights = weights_of(model, 9.0)
    norm = torch.full((4,), 3.0)
    made = common.Quantized(weights=weights, bits=1, others={"layers.0.norm.weight": norm})
    assert common.write_result(made, model, tmp_path) == 32
    assert model.saved == tmp_path
    assert torch.equal(model.layers[1]["up"].weight, weights["layers.1.up.weight"])
    assert torch.equal(model.layers[0]["norm"].weight, norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("layers.0.up.weight"), "1 of 2 Linears"),
        (lambda weights: weights.update({"layers.0.up.weight": torch.zeros(4, 2)}), "instead of"),
        (lambda weights: weights["layers.0.up.weight"].fill_(torch.nan), "NaN"),
        (lambda weights: weights["layers.0.up.weight"].sub_(0.25), "exactly what it was"),
        (lambda weights: weights["layers.0.up.weight"].neg_(), "further from the original"),
    ],
)
def test_what_a_peer_left_out_or_broke_is_no_result(change: Any, message: str, tmp_path: Path) -> None:
    model = Model()
    with torch.no_grad():
        model.layers[0]["up"].weight.fill_(0.5)
    weights = weights_of(model, 0.25)
    change(weights)
    with pytest.raises(common.PeerError, match=message):
        common.write_result(common.Quantized(weights=weights, bits=1), model, tmp_path)


def test_bits_are_those_of_the_stored_tensors() -> None:
    codes, scales = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.float16)
    assert common.tensor_bits(codes, scales, None) == 4 * 8 * 8 + 4 * 16


def test_query_rows_come_back_from_the_order_of_llama_cpp() -> None:
    rows = torch.arange(2 * 8 * 3).view(16, 3)
    there = llamacpp.to_pairs(rows, 2)
    assert torch.equal(llamacpp.to_halves(there, 2), rows)
    assert there[:4, 0].tolist() == [0, 12, 3, 15]  # rows 0, 4, 1, 5: the halves of head 0 side by side


def test_autorounds_codes_are_found_in_what_it_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 2, 8), generator=generator).float()
    scale = torch.rand(4, 2, generator=generator) + 0.5
    layer = nn.Linear(16, 4)
    layer.weight.data = ((codes - 8) * scale[..., None]).reshape(4, 16).bfloat16()
    layer.scale, layer.zp = scale, torch.tensor(8.0)
    job = common.Job(
        model=Path(), tokens=torch.zeros(1, 1), scheme=common.Scheme.parse("W4A16-g8"), method="signround", seed=0,
        dtype="auto", clock=common.Clock(), scratch=Path(),
    )  # fmt: skip
    value, num_groups = autoround.decode("name", layer, job)
    assert num_groups == 8
    assert torch.equal(value, ((codes - 8) * scale.half().float()[..., None]).reshape(4, 16))
    layer.scale = scale * 1.1
    with pytest.raises(common.PeerError):
        autoround.decode("name", layer, job)


def cell_directory(folder: Path, inputs: str | None) -> Path:
    """The demo model as an adapter would leave it, with exactly its own weights."""
    folder.mkdir()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).save_pretrained(folder)
    (folder / "peer.json").write_text(json.dumps({"inputs": inputs}))
    return folder


def test_the_judge_finds_no_divergence_in_unchanged_weights_and_some_in_8_bit_inputs(tmp_path: Path) -> None:
    windows = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(0))
    judge = judging.Judge(demo_model(), windows, tmp_path)
    plain = judge.score(cell_directory(tmp_path / "plain", None)).result()
    assert plain.kl_mean == 0.0
    inputs = judge.score(cell_directory(tmp_path / "int8", "int8-per-token")).result()
    assert inputs.kl_mean > 0.0
    assert inputs.num_tokens == plain.num_tokens == 62


def test_the_judges_inputs_are_those_of_our_own_w8a8(tmp_path: Path) -> None:
    """The products that the judge runs are what `x` per token in 8 bits, symmetric, makes of them."""
    folder = cell_directory(tmp_path / "int8", "int8-per-token")
    model = judging.QuantizedInputsModel(folder, "W8A8")
    x, weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.eye(16)
    with judging.QuantizedInputs(model.quantizer):
        got = nn.functional.linear(x, weight)
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((got / step) - (got / step).round()).abs().max() < 1e-4
    assert ((got - x).abs() <= step / 2 * (1 + 1e-5)).all()


def test_calibration_windows_arrive_as_they_are(tmp_path: Path) -> None:
    tokens = torch.randint(0, 2048, (3, 8))
    path = tmp_path / "tokens.safetensors"
    save_file({"input_ids": tokens}, path)
    job = common.Job(
        model=demo_model(), tokens=tokens, scheme=common.Scheme.parse("W8A8"), method="rtn", seed=0, dtype="auto",
        clock=common.Clock(), scratch=tmp_path,
    )  # fmt: skip
    samples = job.samples()
    assert [sample["input_ids"].shape for sample in samples] == [(1, 8)] * 3
    assert torch.equal(torch.cat([sample["input_ids"] for sample in samples]), tokens)
