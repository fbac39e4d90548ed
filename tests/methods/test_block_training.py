"""Methods that train a block: the loss never rises, what is measured is what is stored, and every model is served."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitwright import pipeline
from bitwright.errors import RecipeError
from bitwright.methods.block_training import Training, squared_error
from bitwright.methods.gptq import gptq
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.qtensor import QTensor
from bitwright.recipe import Recipe

METHODS = pytest.mark.parametrize("method", ["signround", "block_ap"])
QUICK = {
    "signround": {"iterations": 40, "batch": 2},
    "block_ap": {"epochs": 6, "weight_travel": 0.2, "scale_travel": 0.02},
}
NONE: dict[str, dict[str, object]] = {"signround": {"iterations": 0}, "block_ap": {"epochs": 0}}
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """Training of one block: what came out, and hidden states [2, T, D] before and after the block with it."""

    training: Training[Any]
    results: dict[str, QTensor]
    hidden: Tensor
    output: Tensor


def tiny_model(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a random model of two blocks: `opt` (biases, no gate), `qwen2` (biases of q, k, v), `mixtral`."""
    torch.manual_seed(0)
    build: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=64, **SIZES)),
        "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SIZES)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(intermediate_size=64, num_key_value_heads=1, **SIZES)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                intermediate_size=48, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **SIZES
            )
        ),
    }
    build[kind]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_recipe(text: Path, scheme: str, method: str, **changes: Any) -> Recipe:
    calibration = {"text": str(text), "num_samples": 6, "seqlen": 32}
    return Recipe.from_mapping(
        {"scheme": scheme, "method": method, "calibration": calibration, "max_kl": 50, **changes}
    )


def run_and_look(monkeypatch: pytest.MonkeyPatch, model: Path, recipe: Recipe, out: Path) -> list[Finished]:
    """Quantize, and return the training of every block with its results."""
    finished: list[Finished] = []
    finish = Training[Any].finish

    def recorded(self: Training[Any], method: str) -> dict[str, QTensor]:
        results = finish(self, method)
        weights = {name: result.dequantize() for name, result in results.items()}
        assert self.block.loss(weights) == min(self.losses)
        hidden = self.block.stage.hidden(0, 2)
        finished.append(Finished(self, results, hidden, self.block.forward(hidden, weights)))
        return results

    monkeypatch.setattr(Training, "finish", recorded)
    pipeline.quantize(model, recipe, out, fresh=True)
    return finished


def require_valid(result: QTensor, start: Grid) -> None:
    """Codes of the format, on a finite grid of the same kind."""
    grid = result.grid
    assert isinstance(grid, Grid)
    assert isinstance(grid.format, IntegerFormat)
    assert (grid.format, grid.granularity) == (start.format, start.granularity)
    assert grid.scale.dtype == start.scale.dtype
    assert int(result.codes.min()) >= grid.format.qmin
    assert int(result.codes.max()) <= grid.format.qmax
    assert bool(torch.isfinite(result.dequantize()).all())
    if grid.zero_point is not None:
        assert float(grid.zero_point.min()) >= grid.format.qmin
        assert float(grid.zero_point.max()) <= grid.format.qmax


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text)
    return file


def test_the_largest_errors_do_not_count() -> None:
    target, output = torch.zeros(2, 10, 50), torch.ones(2, 10, 50)
    output[0, 0, 0] = 1e6
    assert float(squared_error(output, target, drop=0.001)) == 1.0
    assert float(squared_error(output, target)) > 1e6


@pytest.mark.parametrize(
    ("method", "kind", "scheme", "rest"),
    [
        ("signround", "llama", "W2A16-g16", {}),
        ("signround", "llama", "W3A16-channel-asym", {}),
        ("signround", "llama", "W4A16-g16", {"transforms": ["hadamard"]}),
        ("signround", "opt", "W8A8-static", {}),
        ("signround", "qwen2", "W3A8-g16", {}),
        ("signround", "mixtral", "W3A16-g16", {}),
        ("block_ap", "llama", "W3A16-channel-asym", {}),
        ("block_ap", "qwen2", "W4A4-g16", {}),
        ("block_ap", "mixtral", "W3A16-g16", {}),
    ],
)
def test_the_loss_never_rises_whatever_the_model(
    method: str,
    kind: str,
    scheme: str,
    rest: dict[str, object],
    text: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(kind, tmp_path / "model", tiny_tokenizer)
    recipe = trained_recipe(text, scheme, method, **{method: QUICK[method]}, **rest)
    finished = run_and_look(monkeypatch, model, recipe, tmp_path / "run")
    assert len(finished) == 2
    for each in finished:
        assert min(each.training.losses) <= each.training.losses[0]
        for name, result in each.results.items():
            start = each.training.block.tasks[name].grid
            assert isinstance(start, Grid)
            require_valid(result, start)
    assert any(min(each.training.losses) < each.training.losses[0] for each in finished), "it learns something"
    difference = finished[0].output - finished[1].hidden
    # Sums of floats here and of integers there differ in their last digits, which may flip the code of an input or two.
    assert float(difference.norm()) < 1e-3 * float(finished[1].hidden.norm()), "trained on what inference computes"


@METHODS
def test_bfloat16_speeds_up_steps_but_judges_nothing(
    method: str, text: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path / "model", tiny_tokenizer)
    seen: set[torch.dtype] = set()
    silu = functional.silu

    def watched(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if x.requires_grad:
            seen.add(x.dtype)
        return silu(x, *rest, **named)

    monkeypatch.setattr(functional, "silu", watched)
    found: dict[bool, list[Finished]] = {}
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        recipe = trained_recipe(text, "W3A16-g16", method, **{method: {**QUICK[method], "autocast": autocast}})
        with monkeypatch.context() as patch:
            found[autocast] = run_and_look(patch, model, recipe, tmp_path / f"run-{autocast}")
        assert seen == {dtype}
    for plain, fast in zip(found[False], found[True], strict=True):
        assert fast.training.losses[0] == pytest.approx(plain.training.losses[0], rel=0.2)  # of the quantized prefix
        assert min(fast.training.losses) == pytest.approx(min(plain.training.losses), rel=0.2)
        assert fast.output.dtype == torch.float32
    assert found[True][0].training.losses[0] == found[False][0].training.losses[0]


@pytest.mark.parametrize(("method", "start"), [("signround", "rtn"), ("signround", "gptq"), ("block_ap", "gptq")])
def test_without_iterations_the_start_is_the_result(
    method: str,
    start: str,
    text: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", tmp_path / "model", tiny_tokenizer)
    recipe = trained_recipe(text, "W3A16-g16-asym", method, **{method: {**NONE[method], "start": start}})
    for each in run_and_look(monkeypatch, model, recipe, tmp_path / "run"):
        for name, result in each.results.items():
            task = each.training.block.tasks[name]
            assert isinstance(task.grid, Grid)
            expected = task.grid.quantize(task.weight)
            if start == "gptq":
                assert task.stats.hessian is not None
                expected = gptq(task.weight, task.stats.hessian, task.grid).codes
            assert torch.equal(result.codes, expected)
            assert isinstance(result.grid, Grid)
            assert torch.equal(result.grid.scale, task.grid.scale)


class Killed(BaseException):
    """Stands for a kill: nothing in bitwright catches it."""


@METHODS
def test_a_killed_run_ends_with_the_same_codes(
    method: str, text: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("llama", tmp_path / "model", tiny_tokenizer)
    recipe = trained_recipe(text, "W2A16-g16", method, **{method: QUICK[method]})
    whole = pipeline.quantize(model, recipe, tmp_path / "whole")

    def kill(what: str, done: int, _total: int) -> None:
        if (what, done) == ("model.layers.1", 5):
            raise Killed

    with pytest.raises(Killed):
        pipeline.quantize(model, recipe, tmp_path / "killed", progress=kill)
    resumed = pipeline.quantize(model, recipe, tmp_path / "killed")
    assert resumed.resumed_blocks == 1
    assert resumed.results["result_hash"] == whole.results["result_hash"]


@pytest.mark.parametrize("scheme", ["kmeans4", "nf4", "mxfp4-a16"])
@METHODS
def test_other_grids_are_refused(method: str, scheme: str, text: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    recipe = trained_recipe(text, scheme, method)
    with pytest.raises(RecipeError, match=f"{method} does not work on"):
        pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "run")
