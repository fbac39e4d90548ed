"""Every row of bad input: one line on stderr (what, where, what to do), the right exit code, nothing left behind."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bitwright import walk
from bitwright.cli.app import main
from bitwright.cli.console import ProgressBars
from bitwright.errors import VerificationError
from bitwright.exporters import transformers_directory
from bitwright.model import tensor_file
from bitwright.runs import RunDirectory

Refuse = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]
SMALL = ("--samples", "4", "--seqlen", "64")
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def finished_run(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good result; read only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(tiny_text)
    arguments = ["quantize", tiny_llama_dir, "--out", folder / "run", *rtn(folder / "text.txt"), "--quiet"]
    before, sys.argv = sys.argv, ["bitwright", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
    finally:
        sys.argv = before
    return folder / "run"


@pytest.fixture
def good_run(finished_run: Path, out: Path) -> Path:
    """A copy of a good result in `--out`."""
    return Path(shutil.copytree(finished_run, out))


def rtn(text: Path) -> list[object]:
    return ["--scheme", "W4A16-g32", "--method", "rtn", "--calibration", text, *SMALL]


def edit_config(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def shard(model: Path) -> None:
    """Split the weights into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# the model


def test_missing_model_directory(refuse: Refuse, tmp_path: Path, out: Path, text: Path) -> None:
    missing = tmp_path / "no" / "such" / "model"
    says = (str(missing), "no such directory", "Give a model directory")
    refuse("quantize", missing, "--out", out, *rtn(text), says=says)
    refuse("inspect", missing, says=(str(missing), "no such directory"))
    refuse("evaluate", missing, "--text", text, says=(str(missing), "no such directory"))


def test_no_config(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    (model / "config.json").unlink()
    refuse("quantize", model, "--out", out, *rtn(text), says=(str(model), "no config.json", "Give the directory"))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", ""])
def test_config_that_is_not_a_json_object(refuse: Refuse, model: Path, out: Path, text: Path, content: str) -> None:
    (model / "config.json").write_bytes(content.encode("latin-1"))
    refuse("quantize", model, "--out", out, *rtn(text), says=("config.json", "JSON"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no-such-architecture"},
        {"model_type": 3},
        {"hidden_size": "wide"},
        {"hidden_size": -64},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
    ],
)
def test_config_that_transformers_refuses(
    refuse: Refuse, model: Path, out: Path, text: Path, changes: dict[str, object]
) -> None:
    edit_config(model, **changes)
    refuse("quantize", model, "--out", out, *rtn(text), says=(str(model), "transformers cannot build this model"))


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sentinel),))


def test_pickled_weights_are_refused_and_never_unpickled(
    refuse: Refuse, model: Path, out: Path, text: Path, tmp_path: Path
) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "exploded")}, model / "pytorch_model.bin")
    commands = (["quantize", model, "--out", out, *rtn(text)], ["inspect", model], ["evaluate", model, "--text", text])
    for command in commands:
        refuse(*command, says=("pytorch_model.bin", "can run code", "Convert them to safetensors"))
    assert not (tmp_path / "exploded").exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "exploded").is_dir(), "the bomb is a dud, so the test proves nothing"


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(refuse: Refuse, model: Path, out: Path, text: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse("quantize", model, "--out", out, *rtn(text), says=(str(file), "truncated or corrupt"))


@pytest.mark.parametrize("header", [b"{not json", b"[]", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'])
def test_corrupt_header(refuse: Refuse, model: Path, out: Path, text: Path, header: bytes) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refuse("quantize", model, "--out", out, *rtn(text), says=(str(file), "truncated or corrupt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "lm_head.weight"])
def test_weight_that_is_not_finite(refuse: Refuse, model: Path, out: Path, text: Path, value: float, name: str) -> None:
    edit_weights(model, lambda tensors: tensors[name].view(-1)[5:7].fill_(value))
    says = (name, "2 values", "NaN or Inf", "damaged", "obtain it again")
    refuse("quantize", model, "--out", out, *rtn(text), says=says)


def test_missing_shard(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    says = ("1 of 2 weight shards missing", "model-00002-of-00002.safetensors")
    refuse("quantize", model, "--out", out, *rtn(text), says=says)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_broken_index(refuse: Refuse, model: Path, out: Path, text: Path, content: str) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text(content)
    says = ("model.safetensors.index.json", "not a valid index")
    refuse("quantize", model, "--out", out, *rtn(text), says=says)


def test_shards_without_index(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").unlink()
    refuse("quantize", model, "--out", out, *rtn(text), says=("2 safetensors files", "Download the index"))


def test_missing_tensors(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop(WEIGHT))
    refuse("quantize", model, "--out", out, *rtn(text), says=("1 tensors", "missing", WEIGHT, "incomplete"))


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight"])
def test_shape_that_the_configuration_does_not_have(
    refuse: Refuse, model: Path, out: Path, text: Path, name: str
) -> None:
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refuse("quantize", model, "--out", out, *rtn(text), says=(name, "shape", "do not belong together"))


def test_missing_tokenizer(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    refuse("quantize", model, "--out", out, *rtn(text), says=(str(model), "no usable tokenizer"))
    refuse("evaluate", model, "--text", text, says=(str(model), "no usable tokenizer"))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer(refuse: Refuse, model: Path, out: Path, text: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    refuse("quantize", model, "--out", out, *rtn(text), says=(str(model), "no usable tokenizer"))


def test_tokenizer_of_another_model(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    edit_config(model, vocab_size=300)
    edit_weights(
        model,
        lambda tensors: tensors.update(
            {name: tensors[name][:300].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )
    says = ("tokenizer makes token", "the model knows 300", "do not belong together")
    refuse("quantize", model, "--out", out, *rtn(text), says=says)
    refuse("evaluate", model, "--text", text, says=says)


def test_quantized_model_as_input(refuse: Refuse, finished_run: Path, out: Path, text: Path) -> None:
    for source in (finished_run, finished_run / "4-model"):
        refuse("quantize", source, "--out", out, *rtn(text), says=("already quantized", "Give the original"))


def test_other_quantization_as_input(refuse: Refuse, model: Path, out: Path, text: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "awq", "bits": 4})
    refuse("quantize", model, "--out", out, *rtn(text), says=("already quantized", "awq", "give the original"))


def test_conv1d_weights(
    refuse: Refuse, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, out: Path, text: Path
) -> None:
    config = GPT2Config(vocab_size=320, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    says = ("transformer.h.0.attn.c_attn", "Conv1D", "no layout holds", "Ignore it")
    refuse("quantize", tmp_path / "gpt2", "--out", out, *rtn(text), says=says)


# the options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "gptg"], ("unknown method 'gptg'", "Did you mean 'gptq'?")),
        (["--scheme", "W4A16-128"], ("unknown scheme 'W4A16-128'", "Did you mean 'W4A16-g128'?")),
        (["--scheme", "W4A16-g0"], ("unknown scheme 'W4A16-g0'",)),
        (["--scheme", ""], ("unknown scheme ''",)),
        (["--dtype", "float31"], ("float31", "Use float32, bfloat16, float16")),
        (["--device", "gpu"], ("--device gpu", "not available", "Use cpu")),
        (["--device", "meta"], ("--device meta", "not available", "Use cpu")),
        (["--scheme", "W4A9"], ("9 activation bits are out of range", "Use 2 to 8, or A16")),
        (["--scheme", "W1A16-g32"], ("1 weight bits are out of range", "Use 2 to 8")),
        (["--scheme", "W9A16-g32"], ("9 weight bits are out of range", "Use 2 to 8")),
        (["--scheme", "W4A16-g48"], ("0.self_attn.q_proj", "64 is not divisible by group_size 48", "Use 16, 32 or 64")),
        (["--scheme", "W4A16-g256"], ("64 is smaller than group_size 256", "channel")),
        (["--ignore", "*.down_prj"], ("'*.down_prj' matches no site", "Did you mean '*.down_proj'?")),
        (["--ignore", "re:("], ("'re:('", "not a regular expression", "Correct it")),
        (["--ignore", "*"], ("quantizes nothing", "Loosen its ignore patterns")),
        (["--samples", "0"], ("num_samples", "at least 1", "got 0")),
        (["--samples", "many"], ("--samples", "valid integer")),
        (["--seqlen", "1"], ("seqlen", "at least 2", "got 1")),
        (["--seqlen", "129"], ("--seqlen 129", "the model has 128 positions", "Use 128 or less")),
        (["--samples", "100000"], ("100032 are needed", "Use a longer text, or ask for at most")),
        (["--seed", "-1"], ("seed", "at least 0", "got -1")),
        (["--ragged", "sometimes"], ("ragged", "'sometimes'", "Known: auto, divisor, refuse")),
        (["--max-kl", "0"], ("max_kl", "above 0")),
        (["--max-kl", "nan"], ("max_kl", "finite number above 0")),
        (["--no-such-option"], ("--no-such-option",)),
    ],
)
def test_bad_option(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, options: list[str], says: tuple[str, ...]
) -> None:
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), *options, says=says)


def test_device_that_is_not_there(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refuse(
        "quantize", tiny_llama_dir, "--out", out, *rtn(text), "--device", "cuda",
        says=("--device cuda", "not available", "Use cpu"),
    )  # fmt: skip


def test_missing_option(refuse: Refuse, tiny_llama_dir: Path) -> None:
    refuse("quantize", tiny_llama_dir, says=("Missing option", "--out"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("metod: rtn\n", ("unknown key 'metod'", "Did you mean 'method'?")),
        ("calibration: {sample: 3}\n", ("calibration: unknown key 'sample'", "num_samples")),
        ("method: [rtn\n", ("malformed YAML", "Correct the file")),
        ("- rtn\n", ("must hold keys and values",)),
        ("method: rtn\nmethod: gptq\n", ("'method' appears twice",)),
        ("scheme: 4\n", ("scheme", "must be text")),
        ("rules: [{pattern: '*.q_prj', scheme: W8A16}]\n", ("'*.q_prj' matches no site", "Did you mean '*.q_proj'?")),
        ("rules: [{pattern: '*.q_proj', scheme: W8A16, method: rtm}]\n", ("unknown method 'rtm'", "'rtn'?")),
    ],
)
def test_bad_recipe_file(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, tmp_path: Path, content: str, says: tuple[str, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    arguments = ["--recipe", recipe, "--calibration", text, *SMALL]
    if "scheme" not in content.split(":")[0]:
        arguments += ["--scheme", "W4A16-g32"]
    refuse("quantize", tiny_llama_dir, "--out", out, *arguments, says=says)


def test_missing_recipe_file(refuse: Refuse, tiny_llama_dir: Path, out: Path, tmp_path: Path) -> None:
    says = ("no.yaml", "no such file", "Check the path")
    refuse("quantize", tiny_llama_dir, "--out", out, "--recipe", tmp_path / "no.yaml", says=says)


# the texts


def test_gptq_without_calibration(refuse: Refuse, tiny_llama_dir: Path, out: Path) -> None:
    says = ("method gptq needs calibration text", "Give --calibration", "--method rtn")
    refuse("quantize", tiny_llama_dir, "--out", out, "--scheme", "W4A16-g32", "--method", "gptq", *SMALL, says=says)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", ("holds no text", "Give a source with text")),
        ("blank.txt", b" \n\n\t", ("holds no text",)),
        ("short.txt", b"One sentence.", ("tokens make 0 windows of 64", "Use a longer text")),
        ("latin.txt", b"caf\xe9 " * 999, ("not UTF-8 at byte 3", "Convert it to UTF-8")),
        ("bad.jsonl", b'{"text": "one"}\n{"text": \n', ("bad.jsonl:2", "not JSON", "one JSON object per line")),
        ("list.jsonl", b'["one"]\n', ("list.jsonl:1", "not a JSON object")),
        ("field.jsonl", b'{"txt": "one"}\n', ("field.jsonl:1", "no field 'text'", "Did you mean 'txt'?")),
        ("number.jsonl", b'{"text": 3}\n', ("number.jsonl:1", "is not text")),
    ],
)
def test_bad_calibration(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, tmp_path: Path, name: str, content: bytes, says: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(tmp_path / name), says=(name, *says))
    refuse("evaluate", tiny_llama_dir, "--text", tmp_path / name, "--seqlen", 64, says=(name,))


def test_missing_calibration(refuse: Refuse, tiny_llama_dir: Path, out: Path, tmp_path: Path) -> None:
    says = ("no.txt", "no such file", "Give a text file")
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(tmp_path / "no.txt"), says=says)
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(tmp_path), says=("cannot be read",))


def test_evaluation_text_that_was_calibrated_on(refuse: Refuse, good_run: Path, text: Path) -> None:
    says = ("text.txt", "share", "of their 32-token spans", "Evaluate on text that was not calibrated on")
    refuse("evaluate", good_run, "--text", text, "--seqlen", 64, says=says)
    refuse("evaluate", good_run / "4-model", "--text", text, "--seqlen", 64, says=says)


@pytest.mark.parametrize("seqlen", [1000, 1, 0, -5])
def test_bad_evaluation_length(refuse: Refuse, tiny_llama_dir: Path, text: Path, seqlen: int) -> None:
    refuse("evaluate", tiny_llama_dir, "--text", text, "--seqlen", seqlen, says=(f"--seqlen {seqlen}", "Use"))


def test_reference_with_another_vocabulary(refuse: Refuse, tiny_llama_dir: Path, model: Path, text: Path) -> None:
    edit_config(model, vocab_size=330)
    pad = torch.zeros(10, 64)
    edit_weights(
        model,
        lambda tensors: tensors.update(
            {name: torch.cat([tensors[name], pad]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )
    says = ("knows 330 tokens", "knows 320", "reference with the same tokenizer")
    refuse("evaluate", tiny_llama_dir, "--text", text, "--reference", model, "--seqlen", 64, says=says)


# the place


@pytest.fixture
def holder(out: Path) -> Iterator[None]:
    """Another process that holds the lock of `--out`."""
    code = "import fcntl,sys; f=open(sys.argv[1],'a'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); input()"
    out.mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.communicate(b"\n")


def test_output_in_use(refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, holder: None) -> None:
    says = (str(out), "in use by another run", "choose another --out")
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), says=says)
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), "--fresh", says=says)


def test_output_taken_by_another_process_after_the_checks(
    refuse: Refuse, tiny_llama_dir: Path, good_run: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the checks and the lock another process may start a run of its own: checked again under the lock."""
    info = (good_run / "run.json").read_text()
    other = json.dumps({**json.loads(info), "fingerprint": "another"})
    check = RunDirectory.check
    monkeypatch.setattr(RunDirectory, "is_complete", False)
    monkeypatch.setattr(
        RunDirectory, "check", lambda self, fingerprint, *, fresh: self._lock and check(self, fingerprint, fresh=fresh)
    )
    (good_run / "run.json").write_text(other)
    refuse("quantize", tiny_llama_dir, "--out", good_run, *rtn(text), says=("belongs to a run with another recipe",))


def test_output_of_another_recipe(cli: Cli, refuse: Refuse, tiny_llama_dir: Path, good_run: Path, text: Path) -> None:
    other = ["quantize", tiny_llama_dir, "--out", good_run, *rtn(text), "--scheme", "W8A16-channel"]
    refuse(*other, says=(str(good_run), "another recipe", "Choose another --out, or --fresh to replace it"))
    (good_run / "7-report.html").write_text("of the earlier result")
    assert cli(*other, "--fresh", "--quiet") == (0, "", "")
    assert "W8A16-channel" in (good_run / "3-plan.yaml").read_text()
    assert not (good_run / "7-report.html").exists()


def test_output_with_foreign_files(refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("ten years of work")
    for fresh in ([], ["--fresh"]):
        says = (str(out), "not empty and not a run directory", "Choose another --out")
        refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), *fresh, says=says)


@pytest.mark.parametrize("content", ['{"complete": true}', "[]", "{"])
def test_output_with_a_foreign_run_file(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, content: str
) -> None:
    out.mkdir()
    (out / "run.json").write_text(content)
    (out / "thesis.tex").write_text("ten years of work")
    for fresh in ([], ["--fresh"]):
        refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), *fresh, says=("run.json", "Choose another"))
    refuse("evaluate", out, "--text", text, says=("run.json",))


def test_output_is_a_file(refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path) -> None:
    out.write_text("precious")
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), says=(str(out), "is a file", "Give a directory"))
    refuse("quantize", tiny_llama_dir, "--out", out / "run", *rtn(text), says=(str(out), "cannot be written"))


def test_read_only_parent(
    refuse: Refuse, tiny_llama_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "read-only"
    parent.mkdir()
    if os.geteuid() == 0:  # access bits do not bind root
        monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != parent)
    else:
        parent.chmod(0o500)
    says = (str(parent), "cannot be written", "Choose another --out")
    refuse("quantize", tiny_llama_dir, "--out", parent / "run", *rtn(text), says=says)


def test_place_that_only_fails_when_written(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    says = (str(out), "cannot be written (Read-only file system)", "Choose another --out")
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), says=says)


def test_too_little_disk(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**6, used=0, free=10**4))
    says = (str(out), "GB of disk", "Free space, or choose another --out")
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), says=says)


def test_too_little_memory(
    refuse: Refuse, tiny_llama_dir: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**6, available=10**5))
    says = ("of memory", "are available", "Use fewer or shorter calibration windows")
    refuse("quantize", tiny_llama_dir, "--out", out, *rtn(text), says=says)


def test_an_earlier_result_survives_a_fresh_start_that_is_refused(
    refuse: Refuse, tiny_llama_dir: Path, good_run: Path, text: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["--out", good_run, *rtn(text), "--fresh"]
    edit_weights(model, lambda tensors: tensors[WEIGHT].view(-1)[:1].fill_(float("nan")))
    refuse("quantize", model, *start, says=("NaN or Inf",))
    refuse("quantize", tiny_llama_dir, *start, "--scheme", "W4A16-g48", says=("not divisible",))
    refuse("quantize", tiny_llama_dir, *start, "--samples", "99999", says=("Use a longer text",))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**6, used=0, free=10**4))
    refuse("quantize", tiny_llama_dir, *start, says=("of disk",))


# in the middle


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tensors_of(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "4-model").glob("*.safetensors"))}


def fails_on_a_full_disk(cli: Cli, arguments: list[object], out: Path, says: tuple[str, ...]) -> None:
    status, printed, err = cli(*arguments)
    assert (status, printed) == (2, "")
    assert err.startswith("bitwright: ")
    assert err.count("\n") == 1, err
    for words in says:
        assert words in err
    assert not (out / "4-model" / "config.json").exists()
    assert not list(out.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_full_disk_while_reserving_activations(
    cli: Cli, tiny_llama_dir: Path, finished_run: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[object] = ["quantize", tiny_llama_dir, "--out", out, *rtn(text), "--quiet"]
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", no_space)
        fails_on_a_full_disk(cli, arguments, out, ("no room for", "MB of activations", "Free disk space"))
    assert cli(*arguments)[0] == 0
    assert tensors_of(out) == tensors_of(finished_run)


@pytest.mark.parametrize("broken", ["os.fsync", "safetensors"])
def test_full_disk_while_writing(
    cli: Cli,
    tiny_llama_dir: Path,
    finished_run: Path,
    out: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    calls = 0

    def fail_later(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            if broken == "os.fsync":
                no_space()
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(*args, **kwargs)

    arguments: list[object] = ["quantize", tiny_llama_dir, "--out", out, *rtn(text), "--quiet"]
    place, name = (os, "fsync") if broken == "os.fsync" else (tensor_file, "save_file")
    original = getattr(place, name)
    with monkeypatch.context() as full:
        full.setattr(place, name, fail_later)
        fails_on_a_full_disk(cli, arguments, out, ("No space left on device", "cannot be written", "Free disk space"))
    assert calls > 3
    assert cli(*arguments)[0] == 0
    assert tensors_of(out) == tensors_of(finished_run)


@pytest.mark.parametrize("when", [1, 2])
def test_interrupted(
    cli: Cli,
    tiny_llama_dir: Path,
    finished_run: Path,
    out: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: int,
) -> None:
    def stop(self: ProgressBars, what: str, done: int, total: int) -> None:
        if what == "quantize" and done == when:
            raise KeyboardInterrupt

    arguments = ["quantize", tiny_llama_dir, "--out", out, *rtn(text), "--quiet"]
    with monkeypatch.context() as interrupting:
        interrupting.setattr(ProgressBars, "__call__", stop)
        assert cli(*arguments) == (
            130,
            "",
            "bitwright: interrupted; the same command resumes a quantize run or a grid\n",
        )
    assert json.loads((out / "run.json").read_text())["complete"] is False
    status, printed, err = cli(*arguments, "--json")
    assert (status, err) == (0, "")
    assert json.loads(printed)["failure"] is None
    assert tensors_of(out) == tensors_of(finished_run)
    assert not (out / "work").exists()


# the result


def test_loss_above_the_gate(cli: Cli, tiny_llama_dir: Path, out: Path, text: Path) -> None:
    arguments = ["quantize", tiny_llama_dir, "--out", out, *rtn(text), "--quiet"]
    status, printed, err = cli(*arguments, "--max-kl", "1e-9")
    assert (status, printed) == (1, "")
    assert err.startswith(f"bitwright: {out}: KL divergence")
    assert err.count("\n") == 1
    assert "above the gate of 1e-09" in err
    assert "raise --max-kl" in err
    info = json.loads((out / "run.json").read_text())
    assert info["complete"]
    assert "above the gate" in info["failure"]
    complete = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert complete <= {file.name for file in (out / "4-model").iterdir()}
    # The gate does not change the tensors, so that another gate judges the same result, either way.
    before = tensors_of(out)
    assert cli(*arguments) == (0, "", "")
    assert json.loads((out / "run.json").read_text())["failure"] is None
    assert cli(*arguments, "--max-kl", "1e-9")[0] == 1
    assert tensors_of(out) == before


def test_result_that_reads_back_differently(
    cli: Cli, tiny_llama_dir: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "reread_equals", lambda _shard, _written: [WEIGHT])
    status, _, err = cli("quantize", tiny_llama_dir, "--out", out, *rtn(text), "--quiet")
    assert status == 1
    assert WEIGHT in err
    assert "reads back differently" in err
    info = json.loads((out / "run.json").read_text())
    assert not info["complete"]
    assert "reads back differently" in info["failure"]


@pytest.mark.parametrize("verb", ["evaluate", "export", "report"])
def test_unfinished_or_foreign_run(refuse: Refuse, good_run: Path, tmp_path: Path, text: Path, verb: str) -> None:
    rest = {"evaluate": ["--text", text], "export": ["--out", tmp_path / "exported"], "report": []}[verb]
    info = json.loads((good_run / "run.json").read_text())
    (good_run / "run.json").write_text(json.dumps({**info, "complete": False}))
    says = (str(good_run), "the run is not finished", "same bitwright quantize command")
    refuse(verb, good_run, *rest, says=says)
    (tmp_path / "foreign").mkdir()
    problem = "no config.json" if verb == "evaluate" else "not a run directory"
    refuse(verb, tmp_path / "foreign", *rest, says=(str(tmp_path / "foreign"), problem))
    refuse(verb, tmp_path / "nothing", *rest, says=(str(tmp_path / "nothing"),))


def test_unknown_exporter(refuse: Refuse, good_run: Path, tmp_path: Path) -> None:
    says = ("unknown exporter 'compressed-tensor'", "Did you mean 'compressed-tensors'?")
    refuse("export", good_run, "--to", "compressed-tensor", "--out", tmp_path / "exported", says=says)


def test_export_to_a_place_that_is_taken(refuse: Refuse, good_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    target.mkdir()
    (target / "thesis.tex").write_text("ten years of work")
    refuse("export", good_run, "--out", target, says=(str(target), "not empty", "Choose another --out"))
    refuse("export", good_run, "--out", target / "thesis.tex", says=("thesis.tex", "Choose another --out"))


def test_export_that_the_engine_reads_differently(
    refuse: Refuse, good_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(theirs: object, ours: object) -> int:
        raise VerificationError(f"{WEIGHT}: transformers reads other values than were written.")

    monkeypatch.setattr(transformers_directory, "compare_weights", differ)
    says = (WEIGHT, "reads other values than were written")
    refuse("export", good_run, "--out", tmp_path / "exported", "--quiet", code=1, says=says)


def test_export_that_the_engine_cannot_load(
    refuse: Refuse, good_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("size mismatch\nfor every tensor")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    says = ("transformers cannot load it (size mismatch for every tensor)",)
    refuse("export", good_run, "--out", tmp_path / "exported", code=1, says=says)


def test_export_of_a_result_that_was_changed(refuse: Refuse, good_run: Path, tmp_path: Path) -> None:
    file = good_run / "4-model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    file.write_text(json.dumps(config))
    status = ("4-model", "not those that the run wrote")
    refuse("export", good_run, "--out", tmp_path / "exported", code=1, says=status)


def test_export_on_a_full_disk(refuse: Refuse, good_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copytree", no_space)
    refuse("export", good_run, "--out", tmp_path / "exported", says=("No space left on device", "Free space"))
