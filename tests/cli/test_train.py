"""`bitwright train`: what a user sees, and that wrong requests leave nothing behind.

This file is also what several processes run, started by torchrun: the command line, which may be killed after a step.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from bitwright.records import read_jsonl

Refuse = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]
STOP_AT = "TEST_STOP_AT"
QUICK = ("--steps", 2, "--batch", 2, "--seqlen", 16, "--save-every", 1)


def test_an_adapter_is_trained_and_described_as_json(cli: Cli, tiny_llama_dir: Path, text: Path, out: Path) -> None:
    asked = ("train", "lora", tiny_llama_dir, "--data", text, "--out", out, "--rank", 2, *QUICK)
    status, printed, err = cli(*asked, "--json")
    assert status == 0, err
    found = json.loads(printed)
    assert found["kind"] == "lora"
    assert len(found["losses"]) == 2
    assert (out / "4-adapter" / "adapter_model.safetensors").is_file()
    status, printed, _ = cli(*asked)  # finished: told again
    assert status == 0
    assert "perplexity before" in printed


def test_the_schedule_of_the_rate_is_chosen(cli: Cli, tiny_llama_dir: Path, text: Path, out: Path) -> None:
    asked = ("train", "lora", tiny_llama_dir, "--data", text, "--out", out, "--rank", 2, *QUICK, "--lr", 0.01)
    status, _, err = cli(*asked, "--warmup", 0, "--schedule", "linear", "--max-grad-norm", 0.5, "--quiet")
    assert status == 0, err
    steps = [record for record in read_jsonl(out / "5-records.jsonl") if record["kind"] == "training_step"]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.01, 0.005])


def test_without_a_verb_there_is_help_alone(cli: Cli) -> None:
    for asked in ((), ("train",)):
        status, printed, err = cli(*asked)
        assert (status, err) == (2, "")
        assert "Usage" in printed


def test_the_trained_codes_evaluate_like_any_run(cli: Cli, tiny_llama_dir: Path, text: Path, out: Path) -> None:
    asked = ("train", "qat", tiny_llama_dir, "--data", text, "--out", out, "--scheme", "W4A16-g16", "--method", "rtn")
    status, _, err = cli(*asked, *QUICK, "--quiet")
    assert status == 0, err
    status, _, err = cli("export", out / "4-quantized", "--to", "compressed-tensors", "--out", out.parent / "export")
    assert status == 0, err


def test_a_gate_fails_with_the_reason(cli: Cli, tiny_llama_dir: Path, text: Path, out: Path) -> None:
    asked = ("train", "qat", tiny_llama_dir, "--data", text, "--out", out, "--scheme", "W2A16-g16", "--method", "rtn")
    status, _, err = cli(*asked, *QUICK, "--max-kl", 1e-7, "--quiet")
    assert status == 1
    assert "above the gate of 1e-07" in err


@pytest.mark.parametrize("command", [("lora",), ("distill", "--labels", 0.5, "--teacher")], ids=lambda c: c[0])
def test_a_training_whose_last_step_diverged_fails_and_says_so(
    cli: Cli, tiny_llama_dir: Path, text: Path, out: Path, command: tuple[object, ...]
) -> None:
    name, *rest = command
    given = (*rest, tiny_llama_dir) if rest else ()
    # Warmup leaves the first step at rate 0: only the second, which no loss follows, breaks the weights.
    asked = ("train", name, tiny_llama_dir, *given, "--data", text, "--out", out, *QUICK, "--lr", 1e30, "--quiet")
    for _ in range(2):  # told again where it is asked again
        status, _, err = cli(*asked)
        assert status == 1, err
        assert "Traceback" not in err
        assert "training ended worse than it began on held-out text (perplexity" in err
        assert "-> inf" in err
    assert "ended worse" in json.loads((out / "run.json").read_text())["failure"]


@pytest.mark.parametrize("steps", [2, 4])
def test_codes_that_diverge_say_at_which_step(
    cli: Cli, tiny_llama_dir: Path, text: Path, out: Path, steps: int
) -> None:
    quick = ("--steps", steps, "--batch", 2, "--seqlen", 16, "--lr", 1e30)
    scheme = ("--scheme", "W8A8", "--method", "rtn")
    status, _, err = cli("train", "qat", tiny_llama_dir, "--data", text, "--out", out, *scheme, *quick, "--quiet")
    assert status == 1
    assert f"step {min(steps, 3)}" in err
    assert "Repair" not in err
    assert "to quantize" in json.loads((out / "run.json").read_text())["failure"]


def together(*asked: object, stop_at: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes; killed after a step of training where one is given."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, *map(str, asked), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if stop_at is not None:
        environment[STOP_AT] = str(stop_at)
    return subprocess.run([sys.executable, *run], capture_output=True, text=True, env=environment, check=False)


def results_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("lora",), ("qat", "--scheme", "W4A16-g16", "--method", "rtn")], ids=lambda c: c[0]
)
def test_two_processes_train_one_model_with_quantized_gradients(
    tiny_llama_dir: Path, text: Path, out: Path, command: tuple[str, ...]
) -> None:
    name, *rest = command
    asked = ("train", name, tiny_llama_dir, "--data", text, "--out", out, *rest, *QUICK, "--gradient-bits", 8)
    found = results_of(together(*asked))
    assert len(found["losses"]) == 2
    assert 0.25 < found["gradient_share"] < 0.3


@pytest.mark.slow
def test_what_rounding_has_not_sent_survives_a_kill(tiny_llama_dir: Path, text: Path, out: Path) -> None:
    options = ("--steps", 4, "--batch", 2, "--seqlen", 16, "--save-every", 2, "--gradient-bits", 1, "--lr", 0.01)
    asked = ("train", "lora", tiny_llama_dir, "--data", text, *options, "--out")
    whole = results_of(together(*asked, out))
    killed = out.parent / "killed"
    assert together(*asked, killed, stop_at=3).returncode != 0
    checkpoint = killed / "work" / "training" / "checkpoints" / "checkpoint-2"
    assert {"gradients-0.safetensors", "gradients-1.safetensors"} <= {file.name for file in checkpoint.iterdir()}
    found = results_of(together(*asked, killed))
    assert found["losses"] == whole["losses"]
    adapters = [folder / "4-adapter" / "adapter_model.safetensors" for folder in (out, killed)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def another(model: Path, folder: Path) -> Path:
    """A model like another, with other weights."""
    shutil.copytree(model, folder)
    loaded = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    loaded.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "distill"])
def test_two_processes_share_one_model(tiny_llama_dir: Path, text: Path, out: Path, name: str) -> None:
    options: tuple[object, ...] = ("--steps", 4, "--batch", 2, "--seqlen", 16, "--save-every", 2, "--lr", 0.001)
    if name == "distill":
        options += ("--teacher", another(tiny_llama_dir, out.parent / "teacher"))
    asked = ("train", name, tiny_llama_dir, "--data", text, *options, "--out")
    copies = results_of(together(*asked, out.parent / "copies"))
    shared = results_of(together(*asked, out, "--shard"))
    # Gradients are summed in another order, which AdamW carries on: a few float32 roundings of losses of a few nats.
    assert shared["losses"] == pytest.approx(copies["losses"], rel=1e-4, abs=1e-6)
    assert shared["perplexity"] == pytest.approx(copies["perplexity"], rel=1e-4)
    for part in ("weights", "gradients", "optimizer"):
        assert shared["memory"][part] < 0.55 * copies["memory"][part], part
    killed = out.parent / "killed"
    assert together(*asked, killed, "--shard", stop_at=3).returncode != 0
    assert results_of(together(*asked, killed, "--shard"))["losses"] == shared["losses"]


WRONG = [
    (("lora", "--targets", "*.qproj"), ("*.qproj", "Did you mean '*.q_proj'")),
    (("lora", "--rank", 0), ("rank", "at least 1")),
    (("lora", "--steps", 0), ("steps", "at least 1")),
    (("lora", "--lr", "-1"), ("learning_rate", "above 0")),
    (("lora", "--schedule", "sine"), ("--schedule sine", "Did you mean 'cosine'")),
    (("qlora", "--warmup", 1), ("warmup", "below 1")),
    (("qat", "--scheme", "W4A16-g16", "--max-grad-norm", 0), ("max_grad_norm", "above 0")),
    (("lora", "--weight-decay", "-1"), ("weight_decay", "at least 0")),
    (("lora", "--weight-decay", "nan"), ("weight_decay", "finite")),
    (("lora", "--device", "nowhere"), ("--device nowhere", "Use cpu")),
    (("qat", "--scheme", "W4A16-g16", "--device", "nowhere"), ("--device nowhere", "Use cpu")),
    (("lora", "--precision", "float8"), ("--precision float8", "bfloat16")),
    (("lora", "--optimizer", "adam"), ("--optimizer adam", "adamw8bit")),
    (("lora", "--gradient-bits", 8), ("one process sends no gradients", "torchrun")),
    (("lora", "--shard"), ("nobody to share", "torchrun")),
    (("lora", "--shard", "--optimizer", "adamw8bit"), ("--optimizer adamw",)),
    (("lora", "--seqlen", 4096), ("--seqlen 4096", "128 positions")),
    (("qlora", "--scheme", "nf5"), ("nf5",)),
    (("qlora", "--by-group"), ("no float zero points", "W4A16-g64-floatzero")),
    (("qlora", "--scheme", "W4A16-g16-floatzero", "--by-group", "--start-at-error"), ("Leave one",)),
    (("qat", "--scheme", "W4A16-g16", "--mode", "learn"), ("--mode learn", "learned")),
    (("qat", "--scheme", "W4A16-g16", "--start", "zero"), ("--start zero", "original")),
    (("qat", "--scheme", "W4A16-g16", "--freeze-after", 2), ("freeze_after",)),
    (("qat", "--scheme", "W4A16-g16", "--method", "gptqq"), ("gptqq", "Did you mean")),
    (("qat", "--scheme", "W4A16-g16", "--cache-bits", 99), ("2 to 8 bits", "not 99")),
    (("qat", "--scheme", "nf4-b16", "--mode", "learned"), ("nf4", "Use mode fixed")),
    (("distill", "--teacher", "nowhere"), ("nowhere",)),
]


@pytest.mark.parametrize(("options", "says"), WRONG, ids=[" ".join(map(str, options)) for options, _ in WRONG])
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    refuse: Refuse, tiny_llama_dir: Path, text: Path, out: Path, options: tuple[object, ...], says: tuple[str, ...]
) -> None:
    command, *rest = options
    refuse("train", command, tiny_llama_dir, "--data", text, "--out", out, *QUICK, *rest, says=says)


def test_text_that_is_missing_or_too_short(refuse: Refuse, tiny_llama_dir: Path, tmp_path: Path, out: Path) -> None:
    asked = ("train", "lora", tiny_llama_dir, "--out", out, "--data")
    refuse(*asked, tmp_path / "none.txt", *QUICK, says=("none.txt",))
    (tmp_path / "short.txt").write_text("too short")
    refuse(*asked, tmp_path / "short.txt", *QUICK, says=("short.txt", "held out"))


def test_more_logits_than_tokens_are_refused(refuse: Refuse, tiny_llama_dir: Path, text: Path, out: Path) -> None:
    asked = ("train", "distill", tiny_llama_dir, "--teacher", tiny_llama_dir, "--data", text, "--out", out, *QUICK)
    refuse(*asked, "--top-k", 321, says=("--top-k 321", "320 or less"))


def command_line() -> None:
    """Run what is asked for; every process ends after the step at which it is to be killed."""
    from bitwright.cli.app import main
    from bitwright.train.trainer import Recorder

    on_step_end = Recorder.on_step_end

    def stop(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        on_step_end(self, args, state, control, **given)
        if state.global_step == int(os.environ[STOP_AT]):
            os._exit(9)

    if STOP_AT in os.environ:
        Recorder.on_step_end = stop
    main()


if __name__ == "__main__":
    command_line()
