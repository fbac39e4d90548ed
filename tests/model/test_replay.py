"""Replayed outputs are the ones that a new run would give, and only finished parts are replayed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.model.replay import Replay, _Store
from bitwright.model.sites import Site, block_sites
from bitwright.pipeline import quantize
from bitwright.recipe import Recipe

WIDTH, NUM_WINDOWS = 8, 5
ATTENTION, MLP = {"b.attention.q", "b.attention.o"}, {"b.mlp.up", "b.mlp.down"}


class Part(nn.Module):
    """Two products; counts its runs; puts out a tuple as attention modules do, if asked to."""

    def __init__(self, first: str, second: str, *, beside: tuple[Any, ...] | None = None) -> None:
        super().__init__()
        self.names, self.beside, self.num_runs = (first, second), beside, 0
        for name in self.names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Any:
        self.num_runs += 1
        out = self.get_submodule(self.names[1])(self.get_submodule(self.names[0])(x).relu())
        return out if self.beside is None else (out, *self.beside)


class Scaled(Part):
    """Does not put out what its last product does."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2


class Block(nn.Module):
    def __init__(self, beside: tuple[Any, ...] | None, *, twice: bool = False) -> None:
        super().__init__()
        self.attention, self.mlp = Part("q", "o", beside=beside), Part("up", "down")
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if self.twice else 1):
            out = self.attention(x)
            x = x + (out if isinstance(out, Tensor) else out[0])
        return x + self.mlp(x)


def sites_of(block: nn.Module) -> list[Site]:
    return block_sites(block, "b")


def run(block: Block, replay: Replay, x: Tensor, size: int = 2) -> Tensor:
    outputs = []
    for start in range(0, NUM_WINDOWS, size):
        with torch.no_grad(), replay.batch(start):
            outputs.append(block(x[start : start + size]))
    return torch.cat(outputs)


@pytest.mark.parametrize("beside", [None, (), (None,)], ids=["tensor", "tuple of one", "tuple"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_finished_part_runs_once_and_the_block_computes_the_same(
    beside: tuple[Any, ...] | None, twice: bool, tmp_path: Path
) -> None:
    block, x = Block(beside, twice=twice), torch.randn(NUM_WINDOWS, 3, WIDTH)
    replay = Replay(block, "b", sites_of(block), tmp_path, NUM_WINDOWS)
    with torch.no_grad():
        expected = torch.cat([block(part) for part in x.split(2)])
        block.attention.num_runs = block.mlp.num_runs = 0
    assert torch.equal(run(block, replay, x), expected)
    replay.finish(ATTENTION)
    for _ in range(3):
        assert torch.equal(run(block, replay, x), expected)
    # 3 batches without replay and 3 that are kept; a second call within a batch is never replayed.
    assert block.attention.num_runs == (18 if twice else 6)
    assert block.mlp.num_runs == 12
    assert "forward" not in vars(block.attention)


def test_a_part_with_a_weight_that_may_still_change_is_not_replayed(tmp_path: Path) -> None:
    block, x = Block(None), torch.randn(NUM_WINDOWS, 3, WIDTH)
    replay = Replay(block, "b", sites_of(block), tmp_path, NUM_WINDOWS)
    replay.finish([*ATTENTION, "b.mlp.up"])
    run(block, replay, x)
    with torch.no_grad():
        block.mlp.get_submodule("down").weight.mul_(2)
        expected = torch.cat([block(part) for part in x.split(2)])
    assert torch.equal(run(block, replay, x), expected)


def test_an_output_that_is_more_than_a_hidden_state_is_computed_again(tmp_path: Path) -> None:
    block, x = Block((torch.ones(2),)), torch.randn(NUM_WINDOWS, 3, WIDTH)
    replay = Replay(block, "b", sites_of(block), tmp_path, NUM_WINDOWS)
    replay.finish(ATTENTION)
    run(block, replay, x)
    run(block, replay, x)
    assert block.attention.num_runs == 6
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_stopped_leaves_the_block_as_it_was(tmp_path: Path) -> None:
    block = Block(None)
    replay = Replay(block, "b", sites_of(block), tmp_path, NUM_WINDOWS)
    replay.finish(ATTENTION | MLP)
    with pytest.raises(KeyboardInterrupt), replay.batch(0):
        raise KeyboardInterrupt
    assert all("forward" not in vars(module) for module in block.modules())


def test_single_products_are_not_worth_a_file(tmp_path: Path) -> None:
    block = Block(None)
    replay = Replay(block, "b", sites_of(block), tmp_path, NUM_WINDOWS, keep_inputs=False)
    replay.finish(["b.attention.q"])
    run(block, replay, torch.randn(NUM_WINDOWS, 3, WIDTH))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beside", [None, (None,)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("kind", [Part, Scaled])
def test_all_that_is_left_of_a_part_is_its_last_product(kind: type[Part], beside: Any, tmp_path: Path) -> None:
    if kind is Scaled and beside is not None:
        pytest.skip("a tuple times two is another tuple")
    block, x = Block(None), torch.randn(NUM_WINDOWS, 3, WIDTH)
    block.attention = kind("q", "o", beside=beside)
    replay = Replay(block, "b", sites_of(block), tmp_path, NUM_WINDOWS)
    replay.finish(["b.attention.q"])
    run(block, replay, x)  # while o is calibrated
    with torch.no_grad():
        block.attention.get_submodule("o").weight.mul_(3)
        expected = torch.cat([block(part) for part in x.split(2)])
    replay.finish(["b.attention.o"])
    block.attention.num_runs = 0
    assert torch.equal(run(block, replay, x), expected)
    # The first batch shows whether the part ends in o; then o alone runs, unless something follows it.
    assert block.attention.num_runs == (1 if kind is Part else 3)
    assert torch.equal(run(block, replay, x), expected)
    assert block.attention.num_runs == (1 if kind is Part else 3)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_a_run_that_replays_leaves_the_weights_of_one_that_does_not(
    method: str, tiny_llama_dir: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text)
    calibration = {"text": str(text), "num_samples": 40, "seqlen": 64}  # more than a batch
    recipe = Recipe.from_mapping({"scheme": "W3A16-g32", "method": method, "calibration": calibration, "max_kl": 100.0})
    read: set[str] = set()
    monkeypatch.setattr(
        _Store, "read", lambda self, *args, own=_Store.read: (read.add(self._path.name), own(self, *args))[1]
    )
    replayed = quantize(tiny_llama_dir, recipe, tmp_path / "replayed")
    assert any(name.startswith("replay-") for name in read)
    assert any(name.startswith("teacher-replay-") for name in read) == (method == "gptaq")
    monkeypatch.setattr(Replay, "batch", lambda *_: nullcontext())
    plain = quantize(tiny_llama_dir, recipe, tmp_path / "plain")
    assert replayed.results["result_hash"] == plain.results["result_hash"]
