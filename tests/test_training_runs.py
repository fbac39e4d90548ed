"""Trainings as runs: what they leave is what was trained, a killed one goes on, and bad input is refused."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitwright import adapter_run, qat_run
from bitwright.adapter_run import AdapterTask, train_adapter
from bitwright.cli import train_command
from bitwright.distill_run import DistillTask, distill_model
from bitwright.errors import CheckpointError, DataError, RecipeError, RunError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.pipeline import export, quantize
from bitwright.progress import no_progress
from bitwright.qat_run import QatTask, train_quantized
from bitwright.recipe import Calibration, Recipe
from bitwright.records import read_jsonl
from bitwright.runs import RunDirectory
from bitwright.schemes import Scheme
from bitwright.train.lora import LoraConfig
from bitwright.train.options import TrainingOptions
from bitwright.training_text import TrainingText

SEQLEN = 16


@pytest.fixture
def text(tiny_text: str, tmp_path: Path) -> TrainingText:
    file = tmp_path / "text.txt"
    # The gate's 128 windows of 16 tokens must be a small part of it.
    file.write_text(tiny_text)
    return TrainingText(data=str(file), seqlen=SEQLEN)


def options(**other: Any) -> TrainingOptions:
    return TrainingOptions(**{"steps": 4, "batch": 4, "learning_rate": 5e-3, "save_every": 2, **other})


def lora(text: TrainingText, **other: Any) -> AdapterTask:
    return AdapterTask(text=text, training=options(), lora=LoraConfig(rank=4), **other)


def qat(text: TrainingText, scheme: str, **other: Any) -> QatTask:
    recipe = Recipe(scheme=Scheme.parse(scheme), method="rtn", max_kl=100.0)
    return QatTask(recipe=recipe, text=text, training=options(), **other)


def killed(work: Callable[[Any], object], step: int) -> None:
    """Interrupt a run after a step of its training."""

    def progress(what: str, done: int, _total: int) -> None:
        if (what, done) == ("train", step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(progress)


@pytest.mark.parametrize("scheme", [None, pytest.param("nf4-b16-dq", marks=pytest.mark.slow)])
def test_a_killed_adapter_run_goes_on_to_the_same_adapter(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path, scheme: str | None
) -> None:
    task = lora(text, scheme=None if scheme is None else Scheme.parse(scheme), start_at_error=scheme is not None)
    whole = train_adapter(tiny_llama_dir, task, tmp_path / "whole")
    killed(lambda progress: train_adapter(tiny_llama_dir, task, tmp_path / "killed", progress=progress), 3)
    found = train_adapter(tiny_llama_dir, task, tmp_path / "killed")
    assert found.losses == whole.losses
    assert len(whole.losses) == 4
    files = [folder / adapter_run.ADAPTER / "adapter_model.safetensors" for folder in (whole.run, found.run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    kinds = [record["kind"] for record in read_jsonl(whole.run / "5-records.jsonl")]
    assert kinds == ["environment", "training", *["training_step"] * 4]
    assert train_adapter(tiny_llama_dir, task, tmp_path / "whole").results == whole.results


SLOW_SCHEMES = ["W2A16-g16-asym", "ternary-g16", "nf4-b16", "fp8"]


@pytest.mark.parametrize(
    "scheme", ["W3A16-g16", "W4A8-g16", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in SLOW_SCHEMES)]
)
def test_the_codes_of_the_last_step_are_what_is_written(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Any] = {}
    convert = qat_run.convert

    def spy(model: Any) -> Any:
        trained.update(convert(model))
        return trained

    monkeypatch.setattr(qat_run, "convert", spy)
    found = train_quantized(tiny_llama_dir, qat(text, scheme), tmp_path / "run")
    written = open_checkpoint(found.quantized / "4-model")
    assert len(trained) == len(written.packed_names()) > 0
    for name, site in trained.items():
        packed = written.read_packed(f"{name}.weight")
        assert torch.equal(packed.weight.codes, site.weight.codes), name
        assert torch.equal(packed.weight.dequantize(), site.weight.dequantize()), name
    assert found.failure is None
    assert (found.run / "5-records.jsonl").is_file()


def test_training_towards_the_original_comes_closer_to_it(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    recipe = Recipe(scheme=Scheme.parse("W2A16-g16"), method="rtn", max_kl=100.0)
    task = QatTask(recipe=recipe, text=text, training=options(steps=20, learning_rate=1e-2), start="original")
    found = train_quantized(tiny_llama_dir, task, tmp_path / "run")
    assert found.results["kl_mean"] < found.results["kl_before"]


def test_a_cache_that_was_quantized_in_training_is_told(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    task = replace(qat(text, "W8A16-g16", cache_bits=2), training=options(steps=1))
    results = train_quantized(tiny_llama_dir, task, tmp_path / "run").results
    assert results["cache_bits"] == 2
    assert results["gate_kl"] < results["kl_mean"], "the gate sees no quantized cache"


def test_a_training_that_makes_it_worse_fails_its_gate(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    recipe = Recipe(scheme=Scheme.parse("W8A16-g16"), method="rtn", max_kl=100.0)
    task = QatTask(recipe=recipe, text=text, training=options(steps=4, learning_rate=20.0))
    found = train_quantized(tiny_llama_dir, task, tmp_path / "run")
    assert found.results["kl_mean"] > found.results["kl_before"]
    assert found.failure is not None
    assert "training ended worse than it began" in found.failure


def test_a_killed_qat_run_goes_on_to_the_same_codes(tiny_llama_dir: Path, text: TrainingText, tmp_path: Path) -> None:
    task = qat(text, "W3A16-g16", train_rest=True)
    whole = train_quantized(tiny_llama_dir, task, tmp_path / "whole")
    killed(lambda progress: train_quantized(tiny_llama_dir, task, tmp_path / "killed", progress=progress), 3)
    found = train_quantized(tiny_llama_dir, task, tmp_path / "killed")
    assert found.losses == whole.losses
    for shard in sorted((whole.quantized / "4-model").glob("*.safetensors")):
        same = load_file(found.quantized / "4-model" / shard.name)
        assert all(torch.equal(tensor, same[name]) for name, tensor in load_file(shard).items())
    original = open_checkpoint(tiny_llama_dir).read(["model.norm.weight"])["model.norm.weight"]
    trained = open_checkpoint(whole.quantized / "4-model").read(["model.norm.weight"])["model.norm.weight"]
    assert not torch.equal(original, trained), "the rest was to be trained as well"


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 8}, {"features": 0.5}, {"labels": 0.25}, {"labels": 0.25, "top_k": 8}], ids=str
)
def test_a_distilled_model_is_a_model_directory(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path, how: dict[str, Any]
) -> None:
    task = DistillTask(teacher=str(tiny_llama_dir), text=text, training=options(), **how)
    found = distill_model(tiny_llama_dir, task, tmp_path / "run")
    assert set(open_checkpoint(found.run / "4-model").names) == set(open_checkpoint(tiny_llama_dir).names)
    assert found.results["kl_before"] == pytest.approx(0.0, abs=1e-6)
    # The student starts as its teacher: all that the first step loses is of the text.
    of_the_text = how.get("labels", 0.0) * math.log(found.results["perplexity_before"])
    assert found.losses[0] == pytest.approx(of_the_text, rel=0.1, abs=1e-4)


def test_a_teacher_whose_logits_are_kept_reads_only_what_is_trained_on(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    read: set[int] = set()
    task = DistillTask(teacher=str(tiny_llama_dir), text=text, training=options(accumulation=2), top_k=8)
    notice = lambda what, _done, total: read.add(total) if what == "teacher" else None
    found = distill_model(tiny_llama_dir, task, tmp_path / "run", progress=notice)
    assert read == {4 * 4 * 2}
    assert len(found.losses) == 4


def test_what_is_held_out_is_neither_trained_nor_calibrated_on(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text(" ".join(str(number * 7919) for number in range(2000)))
    text = TrainingText(data=str(tmp_path / "numbers.txt"), seqlen=32)
    drawn = text.draw(tiny_llama_dir, trust_remote_code=False)
    windows, heldout = drawn.read(tmp_path, "cpu", no_progress)
    rows = {tuple(row.tolist()) for row in windows}
    assert not rows & {tuple(row.tolist()) for row in heldout}
    assert drawn.calibration.num_samples <= len(windows)


@pytest.mark.parametrize("by_another", [False, True])
def test_a_model_is_trained_on_what_it_writes(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path, by_another: bool
) -> None:
    own = TrainingText(data="self", heldout=text.data if by_another else None, seqlen=SEQLEN, windows=8)
    task = DistillTask(teacher=str(tiny_llama_dir), text=own, training=options(), top_k=8)
    killed(lambda progress: distill_model(tiny_llama_dir, task, tmp_path / "run", progress=progress), 3)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "0-text").iterdir()}
    found = distill_model(tiny_llama_dir, task, tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "0-text").iterdir()} == written
    assert len(found.losses) == 4
    assert next(r for r in read_jsonl(found.run / "5-records.jsonl") if r["kind"] == "training")["data"] == "self"
    windows, heldout = own.draw(tiny_llama_dir, trust_remote_code=False).read(found.run, "cpu", no_progress)
    assert len(windows) == 8
    assert found.results["heldout_tokens"] == heldout[:, 1:].numel()
    same = {tuple(row.tolist()) for row in windows} & {tuple(row.tolist()) for row in heldout}
    assert not same


@pytest.mark.slow
def test_codes_are_trained_on_what_the_model_writes(tiny_llama_dir: Path, text: TrainingText, tmp_path: Path) -> None:
    own = TrainingText(data="self", heldout=text.data, seqlen=SEQLEN, windows=8)
    recipe = Recipe(scheme=Scheme.parse("W3A16-g16"), method="gptq", max_kl=100.0)
    found = train_quantized(tiny_llama_dir, QatTask(recipe=recipe, text=own, training=options()), tmp_path / "run")
    asked = RunDirectory(found.quantized).info
    assert asked is not None
    assert asked["asked"]["recipe"]["calibration"]["text"] == "self", "methods calibrate on the model's own text too"
    assert found.results["data"] == "self"


def test_another_configuration_does_not_go_on_with_a_run(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    killed(lambda progress: train_adapter(tiny_llama_dir, lora(text), tmp_path / "run", progress=progress), 1)
    other = AdapterTask(text=text, training=options(learning_rate=1e-4), lora=LoraConfig(rank=4))
    with pytest.raises(RunError, match="another recipe"):
        train_adapter(tiny_llama_dir, other, tmp_path / "run")


@pytest.mark.parametrize(("scheme", "optimizer"), [(None, "adamw"), ("nf4-b16-dq", "adamw"), (None, "adamw8bit")])
def test_memory_is_predicted_and_measured(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path, scheme: str | None, optimizer: str
) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    # At rank 40 some matrices are above the size from which states are kept in 8 bit, and some below.
    task = AdapterTask(
        text=text, training=options(steps=2, optimizer=optimizer), lora=LoraConfig(rank=40),
        scheme=None if scheme is None else Scheme.parse(scheme),
    )  # fmt: skip
    results = train_adapter(tiny_llama_dir, task, tmp_path / "run").results
    predicted, measured = results["predicted_memory"], results["memory"]
    if optimizer == "adamw8bit":
        assert measured["optimizer"] < measured["gradients"] * 2
    for part in ("weights", "scales", "adapters", "gradients", "optimizer"):
        assert predicted[part] == measured[part], part
    assert measured["activations"] / 2 < predicted["activations"] < measured["activations"] * 2


@pytest.mark.parametrize(("layout", "dtype"), [("bitwright", "bfloat16"), ("bitsandbytes", "float32")])
def test_memory_of_adapters_over_a_packed_model_is_predicted(
    tiny_llama_dir: Path, text: TrainingText, tmp_path: Path, layout: str, dtype: str
) -> None:
    recipe = Recipe(
        scheme=Scheme.parse("nf4-g64-dq"), method="rtn", layout="bitwright", max_kl=100.0,
        calibration=Calibration(text=text.data, num_samples=1, seqlen=SEQLEN),
    )  # fmt: skip
    base = quantize(tiny_llama_dir, recipe, tmp_path / "base").run
    if layout == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        export(base, layout, tmp_path / "packed", verify=False)
        base = tmp_path / "packed"
    task = replace(lora(text, dtype=dtype), training=options(steps=1))
    results = train_adapter(base, task, tmp_path / "run").results
    for part in ("weights", "scales", "adapters", "gradients", "optimizer"):
        assert results["predicted_memory"][part] == results["memory"][part], part


def test_a_command_trains_as_long_and_as_fast_as_its_task() -> None:
    for name, task in {"lora": AdapterTask, "qlora": AdapterTask, "qat": QatTask, "distill": DistillTask}.items():
        given = inspect.signature(getattr(train_command, name)).parameters
        default = next(each.default for each in fields(task) if each.name == "training")
        for option in (each.name for each in fields(TrainingOptions) if each.name in given):
            assert given[option].default == getattr(default, option), (name, option)


def test_codes_of_stacked_experts_are_refused_before_any_work(
    tiny_moe_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"gate_up_proj\[0\]: a slice.*'\*\.experts\.gate_up_proj\*'") as refused:
        train_quantized(tiny_moe_dir, qat(text, "W4A16-g16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    patterns = tuple(re.findall(r"'(.+?)'", str(refused.value)))
    recipe = Recipe(scheme=Scheme.parse("W4A16-g16"), method="rtn", max_kl=100.0, ignore=("lm_head", *patterns))
    task = QatTask(recipe=recipe, text=text, training=options(steps=1), start="original")
    assert len(train_quantized(tiny_moe_dir, task, tmp_path / "run").losses) == 1


def test_adapters_stand_beside_stacked_experts_in_16_bit(
    tiny_moe_dir: Path, text: TrainingText, tmp_path: Path
) -> None:
    task = replace(lora(text, scheme=Scheme.parse("nf4-b16-dq")), training=options(steps=1))
    results = train_adapter(tiny_moe_dir, task, tmp_path / "run").results
    assert results["experts_without_adapter"] == 2 * 2 * 2
    packed = open_checkpoint(tmp_path / "run" / "0-base" / "4-model").packed_names()
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in packed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for part in ("weights", "scales", "adapters"):
        assert results["predicted_memory"][part] == results["memory"][part], part


def test_impossible_requests_are_refused(tiny_llama_dir: Path, text: TrainingText, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match="needs a --scheme"):
        lora(text, by_group=True)
    with pytest.raises(RecipeError, match="Name a solver alone"):
        QatTask(recipe=Recipe(transforms=("smoothquant",)), text=text)
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES"):
        train_adapter(tiny_llama_dir, lora(text, device="cuda:1"), out)
    for wrong in (
        {"temperature": 0.0},
        {"top_k": 0},
        {"features": -1.0},
        {"features": 1.0, "top_k": 4},
        {"labels": 1.0},
    ):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            DistillTask(teacher="x", text=text, **wrong)
    for wrong in ({"labels": 1.0}, {"labels": 0.5, "loss": "cross_entropy"}, {"rest_rate": 0.0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            QatTask(recipe=Recipe(), text=text, **wrong)
    with pytest.raises(RecipeError, match="one process sends no gradients"):
        train_adapter(tiny_llama_dir, lora(text, gradient_bits=8), out)
    with pytest.raises(RecipeError, match="bitwright train qat"):
        quantize(tiny_llama_dir, Recipe(method="trained"), tmp_path / "other")
    (tmp_path / "short.txt").write_text("a few words " * 20)
    with pytest.raises(DataError, match="are held out"):
        train_adapter(tiny_llama_dir, lora(TrainingText(data=str(tmp_path / "short.txt"), seqlen=SEQLEN)), out)
    packed = quantize(
        tiny_llama_dir, Recipe(scheme=Scheme.parse("W4A16-g16"), method="rtn", calibration=Calibration(seqlen=64)),
        tmp_path / "packed",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="quantized"):
        distill_model(packed.run / "4-model", DistillTask(teacher=str(tiny_llama_dir), text=text), out)
