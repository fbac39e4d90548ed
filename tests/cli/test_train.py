"""`bitwright train`: what a user sees, and that wrong requests leave nothing behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Refuse = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("lora",), ("qat", "--scheme", "W4A16-g16", "--method", "rtn")], ids=lambda c: c[0]
)
def test_two_processes_train_one_model_with_quantized_gradients(
    tiny_llama_dir: Path, text: Path, out: Path, command: tuple[str, ...]
) -> None:
    name, *rest = command
    asked = ["train", name, tiny_llama_dir, "--data", text, "--out", out, *rest, *QUICK, "--gradient-bits", 8, "--json"]
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bitwright.cli.app", *map(str, asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert len(found["losses"]) == 2
    assert 0.25 < found["gradient_share"] < 0.3


WRONG = [
    (("lora", "--targets", "*.qproj"), ("*.qproj", "Did you mean '*.q_proj'")),
    (("lora", "--rank", 0), ("rank", "at least 1")),
    (("lora", "--steps", 0), ("steps", "at least 1")),
    (("lora", "--lr", "-1"), ("learning_rate", "above 0")),
    (("lora", "--precision", "float8"), ("--precision float8", "bfloat16")),
    (("lora", "--gradient-bits", 8), ("one process sends no gradients", "torchrun")),
    (("lora", "--seqlen", 4096), ("--seqlen 4096", "128 positions")),
    (("qlora", "--scheme", "nf5"), ("nf5",)),
    (("qlora", "--by-group"), ("no float zero points", "W4A16-g64-floatzero")),
    (("qlora", "--scheme", "W4A16-g16-floatzero", "--by-group", "--start-at-error"), ("Leave one",)),
    (("qat", "--scheme", "W4A16-g16", "--mode", "learn"), ("--mode learn", "learned")),
    (("qat", "--scheme", "W4A16-g16", "--start", "zero"), ("--start zero", "original")),
    (("qat", "--scheme", "W4A16-g16", "--freeze-after", 2), ("freeze_after",)),
    (("qat", "--scheme", "W4A16-g16", "--method", "gptqq"), ("gptqq", "Did you mean")),
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
