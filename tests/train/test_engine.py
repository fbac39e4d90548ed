"""The training loop: its curve, resuming from any checkpoint, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from bitwright.errors import (
    CheckpointError,
    DataError,
    MissingDependency,
    RecipeError,
    TrainingDiverged,
    VerificationError,
)
from bitwright.train import engine
from bitwright.train.engine import fit, next_token_loss
from bitwright.train.options import TrainingOptions

STEPS = 6


def options(**other: object) -> TrainingOptions:
    given = {"steps": STEPS, "batch": 2, "save_every": 2, "learning_rate": 1e-2, **other}
    return TrainingOptions(**given)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def load(tiny_llama_dir: Path) -> Callable[[], nn.Module]:
    return lambda: LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 320, (10, 16), generator=torch.Generator().manual_seed(1))


def stop_at(step: int) -> Callable[[int], None]:
    def after_step(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return after_step


def test_training_lowers_the_loss_and_leaves_a_curve(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path
) -> None:
    curve = fit(load(), windows, options(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert tuple(line["loss"] for line in lines) == curve.losses
    assert curve.losses[-1] < curve.losses[0]


@pytest.mark.parametrize(("killed_at", "optimizer"), [(1, "adamw"), (3, "adamw"), (5, "adamw"), (3, "adamw8bit")])
def test_a_killed_training_goes_on_bit_for_bit(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path, killed_at: int, optimizer: str
) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole, resumed, asked = load(), load(), options(optimizer=optimizer)
    expected = fit(whole, windows, asked, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(load(), windows, asked, tmp_path / "killed", after_step=stop_at(killed_at))
    found = fit(resumed, windows, asked, tmp_path / "killed")
    assert found.resumed_at == killed_at // 2 * 2 - (killed_at % 2 == 0) * 2
    assert found.losses == expected.losses
    for (name, wanted), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(wanted, got), name


def test_a_library_that_is_missing_is_named(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(MissingDependency, match=r"needs bitsandbytes. Install bitwright\[bitsandbytes\]"):
        fit(load(), windows, options(optimizer="adamw8bit"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_training_is_only_read(load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path) -> None:
    first, second = load(), load()
    expected = fit(first, windows, options(), tmp_path)
    found = fit(second, windows, options(), tmp_path)
    assert (found.losses, found.resumed_at) == (expected.losses, STEPS)
    assert torch.equal(first.get_parameter("lm_head.weight"), second.get_parameter("lm_head.weight"))


def test_accumulated_batches_are_one_batch(load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path) -> None:
    models = load(), load()
    fit(models[0], windows[:4], options(steps=1, batch=4, save_every=1), tmp_path / "whole")
    fit(models[1], windows[:4], options(steps=1, batch=1, accumulation=4, save_every=1), tmp_path / "parts")
    for (name, whole), (_, parts) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        # The first step of Adam is the sign of the gradient times the rate: only gradients near 0 may differ.
        assert float(((whole - parts).abs() > 1e-4).float().mean()) < 0.01, name


def test_what_is_frozen_stays_and_is_not_saved(load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path) -> None:
    model, before = load(), load()
    model.requires_grad_(False)
    model.get_parameter("lm_head.weight").requires_grad_(True)
    fit(model, windows, options(), tmp_path)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed == ["lm_head.weight"]
    from safetensors.torch import load_file

    assert list(load_file(next(tmp_path.glob("checkpoints/*-6/trainable.safetensors")))) == ["lm_head.weight"]


def test_a_rate_of_its_own(load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path) -> None:
    model, before = load(), load()
    fit(model, windows, options(), tmp_path, rate=lambda name: 0.0 if "mlp" in name else 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) == ("mlp" in name), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path
) -> None:
    steps = []

    def objective(model: nn.Module, ids: Tensor, index: Tensor) -> Tensor:
        steps.append(1)
        return next_token_loss(model, ids, index) * (float("nan") if len(steps) > 4 else 1.0)

    with pytest.raises(TrainingDiverged, match=r"step 5: .* not finite.*checkpoint-4.*lower learning rate"):
        fit(load(), windows, options(), tmp_path, objective=objective)
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "trainable.safetensors").is_file()
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_of_a_loss_that_ran_away_is_not_called_good(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path
) -> None:
    factors = iter([1.0, 1.0, 1.0, 1000.0, float("nan")])

    def objective(model: nn.Module, ids: Tensor, index: Tensor) -> Tensor:
        return next_token_loss(model, ids, index) * next(factors)

    with pytest.raises(TrainingDiverged, match=r"step 5: .*The last good checkpoint is \S*checkpoint-2\."):
        fit(load(), windows, options(), tmp_path, objective=objective)
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "trainable.safetensors").is_file()


def test_a_checkpoint_that_is_not_finite_is_not_called_good(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path
) -> None:
    model = load()

    def after_step(done: int) -> None:
        if done == 2:
            model.get_parameter("lm_head.weight").data[0, 0] = float("inf")

    with pytest.raises(TrainingDiverged, match=r"step 3: .*There is no good checkpoint\."):
        fit(model, windows, options(), tmp_path, after_step=after_step)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "trainable.safetensors").is_file()


def test_what_a_quantizer_refuses_is_a_divergence(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path
) -> None:
    steps = []

    def objective(model: nn.Module, ids: Tensor, index: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) > 3:
            raise VerificationError("fit_grid: the weight holds NaN or Inf. Repair the checkpoint.")
        return next_token_loss(model, ids, index)

    with pytest.raises(TrainingDiverged, match=r"step 4: weights or inputs to quantize are not finite.*checkpoint-2"):
        fit(load(), windows, options(), tmp_path, objective=objective)


def test_a_checkpoint_of_another_model_is_refused(
    load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path
) -> None:
    fit(load(), windows, options(steps=2), tmp_path)
    other = load()
    other.get_parameter("lm_head.weight").requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"not the model's, first lm_head.weight"):
        fit(other, windows, options(), tmp_path)


def test_half_a_checkpoint_does_not_count(load: Callable[[], nn.Module], windows: Tensor, tmp_path: Path) -> None:
    fit(load(), windows, options(steps=4), tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    assert fit(load(), windows, options(steps=4), tmp_path).resumed_at == 2


def test_no_text_and_impossible_options_are_refused(load: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one window"):
        fit(load(), torch.empty(0, 16, dtype=torch.int64), options(), tmp_path)
    for name, value in {
        "optimizer": "adam",
        "steps": 0,
        "batch": 0,
        "learning_rate": float("inf"),
        "warmup": 1.0,
        "seed": -1,
    }.items():
        with pytest.raises(RecipeError, match=name):
            options(**{name: value})
