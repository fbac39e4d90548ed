"""A run that dies at any moment continues where it stopped and ends with the bytes of one that was never disturbed."""

import hashlib
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitwright import pipeline
from bitwright.errors import RunError
from bitwright.recipe import Recipe
from bitwright.records import temporary_beside

NUM_BLOCKS = 4
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["bitwright.pipeline", "transformers.models.llama.modeling_llama"])


class Killed(BaseException):
    """Stands for a kill in the same process: nothing in bitwright catches it."""


@pytest.fixture(scope="session")
def deep_llama_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text)
    return file


def recipe(text: Path, scheme: str = "W3A16-g32-asym") -> Recipe:
    return Recipe.from_mapping(
        {"scheme": scheme, "method": "gptq", "calibration": {"text": str(text), "num_samples": 4, "seqlen": 128}}
    )


def outcome_of(run: Path) -> dict[str, str]:
    """Hashes of all that a repetition must give again; records and run.json also hold seconds."""
    files = [*(run / "4-model").iterdir(), run / "1-structure.json", run / "2-stats.safetensors", run / "3-plan.yaml"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


TAKEN = (
    "seconds", "quantize_seconds", "peak_memory_bytes", "quantize_held_bytes", "quantize_peak_bytes",
)  # fmt: skip
"""Results that no repetition can give again."""


def figures_of(run: Path) -> dict[str, float]:
    results = json.loads((run / "run.json").read_text())["results"]
    return {key: value for key, value in results.items() if key not in TAKEN}


def require_equal(run: Path, undisturbed: Path) -> None:
    assert outcome_of(run) == outcome_of(undisturbed)
    assert figures_of(run) == figures_of(undisturbed)
    assert sorted(file.name for file in run.iterdir()) == sorted(file.name for file in undisturbed.iterdir())


def start_child(model: Path, text: Path, out: Path) -> ForkServerProcess:
    process = PROCESSES.Process(target=pipeline.quantize, args=(model, recipe(text), out))
    process.start()
    return process


def kill_at_random_moments(num_kills: int, model: Path, text: Path, folder: Path) -> None:
    start_child(model, text, folder / "warm-up").join()
    began = time.perf_counter()
    undisturbed = start_child(model, text, folder / "undisturbed")
    undisturbed.join()
    duration = time.perf_counter() - began
    assert undisturbed.exitcode == 0
    require_equal(folder / "warm-up", folder / "undisturbed")

    moments = random.Random(0)
    killed, out = 0, folder / "killed"
    while killed < num_kills:
        child = start_child(model, text, out)
        child.join(timeout=moments.uniform(0, duration))
        if child.is_alive():
            child.kill()
            child.join()
            killed += 1
        else:
            assert child.exitcode == 0
            require_equal(out, folder / "undisturbed")
            shutil.rmtree(out)
    last = start_child(model, text, out)
    last.join()
    assert last.exitcode == 0
    require_equal(out, folder / "undisturbed")


@pytest.fixture(autouse=True)
def one_thread_per_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_killed_three_times(deep_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    kill_at_random_moments(3, deep_llama_dir, text, tmp_path)


@pytest.mark.slow
def test_killed_twenty_times(deep_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    kill_at_random_moments(20, deep_llama_dir, text, tmp_path)


class CommitPoints:
    """Dies once at every place where something becomes visible on disk: before it and after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, *, only: tuple[str, ...] = ()) -> None:
        self.root, self.only = root, only
        self.seen: list[tuple[str, str]] = []
        replace, unlink, rmtree = Path.replace, Path.unlink, shutil.rmtree

        def dying_replace(source: Path, target: Path) -> Path:
            self.pass_by("before", Path(target))
            result = replace(source, target)
            self.pass_by("after", Path(target))
            return result

        def dying_unlink(path: Path, missing_ok: bool = False) -> None:
            self.pass_by("unlink", path)
            unlink(path, missing_ok=missing_ok)

        def dying_rmtree(path: Path, ignore_errors: bool = False) -> None:
            self.pass_by("rmtree", Path(path))
            rmtree(path, ignore_errors=ignore_errors)

        monkeypatch.setattr(Path, "replace", dying_replace)
        monkeypatch.setattr(Path, "unlink", dying_unlink)
        monkeypatch.setattr(shutil, "rmtree", dying_rmtree)

    def pass_by(self, what: str, path: Path) -> None:
        if not path.is_relative_to(self.root):
            return
        point = (what, str(path.relative_to(self.root)))
        if point not in self.seen and (not self.only or what in self.only or path.name in self.only):
            self.seen.append(point)
            raise Killed


def until_done(start: Callable[[], object]) -> int:
    """Start again after every death; return how many there were."""
    deaths = 0
    while True:
        try:
            start()
        except Killed:
            deaths += 1
        else:
            return deaths


def test_killed_at_every_commit_point(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.quantize(tiny_llama_dir, recipe(text), tmp_path / "undisturbed")
    with monkeypatch.context() as dying:
        points = CommitPoints(dying, tmp_path / "run")
        deaths = until_done(lambda: pipeline.quantize(tiny_llama_dir, recipe(text), tmp_path / "run"))
    assert deaths == len(points.seen)
    for what in ("before", "after"):
        for place in (
            "run.json", "work/journal.json", "work/block-00001.json", "work/stats-00001.safetensors", "3-plan.yaml",
            *(f"4-model/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "4-model/config.json",
            "2-stats.safetensors",
        ):  # fmt: skip
            assert (what, place) in points.seen
    require_equal(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("finished", [True, False])
def test_killed_while_replacing_an_earlier_run(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """A `fresh` start that dies leaves the old result whole or a new run that can be continued, never a mixture."""
    out = tmp_path / "run"
    pipeline.quantize(tiny_llama_dir, recipe(text), tmp_path / "undisturbed")
    if finished:
        pipeline.quantize(tiny_llama_dir, recipe(text, "W8A16-channel"), out)
    else:
        die_after_block(1, tiny_llama_dir, recipe(text, "W8A16-channel"), out)
    (out / "7-report.html").write_text("of the earlier run")
    old = outcome_of(out) if finished else {}

    def start() -> None:
        try:
            pipeline.quantize(tiny_llama_dir, recipe(text), out)
        except RunError:
            assert not finished or outcome_of(out) == old
            pipeline.quantize(tiny_llama_dir, recipe(text), out, fresh=True)

    with monkeypatch.context() as dying:
        points = CommitPoints(dying, out, only=("unlink", "rmtree", "run.json"))
        until_done(start)
    assert ("rmtree", "4-model") in points.seen
    require_equal(out, tmp_path / "undisturbed")


def test_an_unfinished_run_of_another_recipe_is_not_continued(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    pipeline.quantize(tiny_llama_dir, recipe(text), tmp_path / "undisturbed")
    die_after_block(1, tiny_llama_dir, recipe(text, "W8A16-channel"), out)
    with pytest.raises(RunError, match="another recipe"):
        pipeline.quantize(tiny_llama_dir, recipe(text), out)
    result = pipeline.quantize(tiny_llama_dir, recipe(text), out, fresh=True)
    assert result.resumed_blocks == 0
    require_equal(out, tmp_path / "undisturbed")


@pytest.mark.parametrize("num_done", [1, 3, NUM_BLOCKS])
def test_finished_blocks_are_not_done_again(deep_llama_dir: Path, text: Path, tmp_path: Path, num_done: int) -> None:
    out = tmp_path / "run"
    die_after_block(num_done, deep_llama_dir, recipe(text), out)
    done = sorted((out / "4-model").glob("*.safetensors"))[:num_done]
    before = {file: file.stat().st_mtime_ns for file in done}
    seconds = sum(json.loads((out / f"work/block-{i:05d}.json").read_text())["seconds"] for i in range(num_done))
    result = pipeline.quantize(deep_llama_dir, recipe(text), out)
    assert result.resumed_blocks == num_done
    assert {file: file.stat().st_mtime_ns for file in done} == before
    assert result.results["seconds"] > seconds


def test_temporary_files_of_a_kill_do_not_reach_the_result(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    die_after_block(1, tiny_llama_dir, recipe(text), out)
    strays = (".tmpAb3xYz", ".config.json.tmp", temporary_beside(Path("model-00002-of-00003.safetensors")).name)
    for stray in strays:
        (out / "4-model" / stray).write_bytes(b"half")
    pipeline.quantize(tiny_llama_dir, recipe(text), out)
    assert not [file for file in out.rglob(".*") if file.name != ".lock"]


def die_after_block(num_done: int, model: Path, recipe: Recipe, out: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == "quantize" and done == num_done:
            raise Killed

    with pytest.raises(Killed):
        pipeline.quantize(model, recipe, out, progress=progress)
