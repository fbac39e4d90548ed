"""A grid measures every cell once, whatever happens on the way, and says what it did not measure and why."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitwright.bench import BenchResult, launch_worker, run_bench
from bitwright.bench_grid import BenchFolder, plan_cells, read_record
from bitwright.bench_worker import measure
from bitwright.errors import DataError, RecipeError, RunError, StructureError, UnknownName
from bitwright.pipeline import evaluate
from bitwright.progress import Progress
from bitwright.worker_process import ORPHANED

SCHEMES = ("W4A16-g32", "W3A16-g32")
Grid = Callable[..., BenchResult]


class Killed(BaseException):
    """Stands for a kill in the same process: nothing in bitwright catches it."""


class Here:
    """Measures cells in this process, which saves the start of another, and counts them."""

    def __init__(self, *, kill_in: int | None = None) -> None:
        self.launched: list[str] = []
        self._kill_in = kill_in

    def __call__(self, record: Path, progress: Progress) -> str | None:
        self.launched.append(record.stem)

        def dying(what: str, done: int, total: int) -> None:
            if what == "quantize" and done == 1 and len(self.launched) == self._kill_in:
                raise Killed
            progress(what, done, total)

        measure(record, dying)
        return None


@pytest.fixture
def texts(tmp_path: Path, tiny_text: str) -> tuple[Path, Path]:
    """Disjoint halves of the text: one to calibrate on, one to evaluate on."""
    lines = tiny_text.splitlines()
    files = (tmp_path / "calibration.txt", tmp_path / "evaluation.txt")
    for file, part in zip(files, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        file.write_text("\n".join(part))
    return files


@pytest.fixture
def grid(tiny_llama_dir: Path, texts: tuple[Path, Path], tmp_path: Path) -> Grid:
    def run(**changes: Any) -> BenchResult:
        usual: dict[str, Any] = {
            "schemes": SCHEMES, "methods": ("rtn", "gptq"), "calibration": str(texts[0]), "text": str(texts[1]),
            "num_samples": 4, "seqlen": 64, "max_windows": 4, "launch": Here(),
        }  # fmt: skip
        return run_bench(tiny_llama_dir, tmp_path / "grid", **{**usual, **changes})

    return run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (folder / "records").glob("*.json")}


def test_every_cell_is_measured(grid: Grid, tiny_llama_dir: Path, texts: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    result = grid(progress=lambda what, done, total: seen.append((done, total)) if what == "cells" else None)
    cells = {(record["scheme"], record["method"]): record for record in result.records if record["kind"] == "cell"}
    assert set(cells) == {(scheme, method) for scheme in SCHEMES for method in ("rtn", "gptq")}
    assert {record["status"] for record in result.records} == {"done"}
    assert (result.num_measured, result.num_known, result.problem) == (4, 0, None)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    for record in cells.values():
        figures = record["figures"]
        assert len(figures["window_kl"]) == figures["num_windows"] == 4
        assert figures["kl_mean"] == pytest.approx(sum(figures["window_kl"]) / 4)
        assert figures["seconds"] > 0
        assert figures["reference_perplexity"] == result.records[0]["figures"]["perplexity"]
        assert record["machine"]["threads"] == 1
        assert record["asked"]["recipe"]["calibration"]["num_samples"] == 4
    assert cells["W3A16-g32", "rtn"]["figures"]["kl_mean"] > cells["W4A16-g32", "rtn"]["figures"]["kl_mean"]
    lines = [json.loads(line) for line in (result.folder / "bench.jsonl").read_text().splitlines()]
    assert lines == result.records
    assert "## W3A16-g32" in (result.folder / "bench.md").read_text()
    assert result.page.is_file()
    assert not list(result.folder.rglob("*/4-model/*.safetensors"))
    assert not (result.folder / "work").exists()


def test_figures_are_those_of_evaluate(grid: Grid, tiny_llama_dir: Path, texts: tuple[Path, Path]) -> None:
    result = grid(schemes=SCHEMES[:1], methods=("gptq",), keep_models=True)
    figures = result.records[1]["figures"]
    score, _ = evaluate(
        result.folder / "runs" / "w4a16-g32--gptq", str(texts[1]), reference=tiny_llama_dir, seqlen=64, max_windows=4
    )
    assert (figures["kl_mean"], figures["kl_stderr"]) == (score.kl_mean, score.kl_stderr)
    assert (figures["perplexity"], figures["same_top1"]) == (score.perplexity, score.same_top1)


def test_killed_and_restarted_repeats_nothing(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        grid(launch=Here(kill_in=3))
    folder = tmp_path / "grid"
    finished = {name: kept for name, kept in contents(folder).items() if b'"started"' not in kept[1]}
    assert len(finished) == 3, "two cells and the reference"
    unfinished = folder / "runs" / "w3a16-g32--rtn" / "4-model" / "model-00001-of-00003.safetensors"
    first_block = unfinished.stat().st_mtime_ns
    again = Here()
    result = grid(launch=again, keep_models=True)
    assert again.launched == ["w3a16-g32--rtn", "w3a16-g32--gptq"]
    assert (result.num_measured, result.num_known) == (2, 2)
    assert unfinished.stat().st_mtime_ns == first_block, "a killed cell goes on in its run directory"
    assert {name: contents(folder)[name] for name in finished if name != "reference.json"} == {
        name: kept for name, kept in finished.items() if name != "reference.json"
    }
    before, nothing = contents(folder), Here()
    assert grid(launch=nothing).num_measured == 0
    assert not nothing.launched
    assert contents(folder) == before


def test_a_larger_grid_keeps_what_is_known(grid: Grid) -> None:
    grid(schemes=SCHEMES[:1])
    launch = Here()
    result = grid(launch=launch)
    assert launch.launched == ["w3a16-g32--rtn", "w3a16-g32--gptq"]
    assert result.num_known == 2


def test_refused_cells_are_recorded(grid: Grid, tmp_path: Path) -> None:
    result = grid(methods=("rtn", "lnq"), schemes=SCHEMES[:1])
    record = read_record(tmp_path / "grid" / "records" / "w4a16-g32--lnq.json")
    assert record["status"] == "refused"
    assert "method lnq does not work on W4A16-g32" in record["reason"]
    assert result.problem is None
    table = (tmp_path / "grid" / "bench.md").read_text()
    assert "| lnq | – | – | refused |" in table
    assert record["reason"] in table
    before = contents(tmp_path / "grid")
    grid(methods=("rtn", "lnq"), schemes=SCHEMES[:1])
    assert contents(tmp_path / "grid") == before


def test_what_was_refused_for_want_of_a_text_is_measured_with_one(grid: Grid, texts: tuple[Path, Path]) -> None:
    cells = {"schemes": SCHEMES[:1], "methods": ("rtn", "gptq")}
    statuses = {r["method"]: r["status"] for r in grid(**cells, calibration=None).records if r["kind"] == "cell"}
    assert statuses == {"rtn": "done", "gptq": "refused"}
    result = grid(schemes=SCHEMES[:1], methods=("gptq",), calibration=str(texts[0]))
    assert result.num_measured == 1
    assert {r["status"] for r in result.records} == {"done"}


def test_a_model_that_a_method_cannot_take_apart_is_refused(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_roles(*_: object, **__: object) -> None:
        raise StructureError("no norm leads into model.layers.0")

    monkeypatch.setattr("bitwright.bench_worker.quantize", no_roles)
    result = grid(schemes=SCHEMES[:1], methods=("rtn",))
    record = read_record(tmp_path / "grid" / "records" / "w4a16-g32--rtn.json")
    assert (record["status"], record["reason"]) == ("refused", "no norm leads into model.layers.0")
    assert result.problem is not None  # nothing at all was measured
    assert "every cell is refused" in result.problem


def test_nothing_to_measure_is_refused_before_any_work(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="all 2 cells are refused; w4a16-g32--lnq"):
        grid(methods=("lnq",))
    with pytest.raises(UnknownName, match="gtpq"):
        grid(methods=("rtn", "gtpq"))
    with pytest.raises(UnknownName, match="W4B16"):
        grid(schemes=("W4A16", "W4B16"))
    with pytest.raises(RecipeError, match="at least one scheme"):
        grid(schemes=())
    with pytest.raises(DataError, match="share"):
        grid(text=str(tmp_path / "calibration.txt"))
    assert not (tmp_path / "grid").exists()


def test_changed_inputs_are_refused_unless_fresh(grid: Grid, texts: tuple[Path, Path], tmp_path: Path) -> None:
    few = {"schemes": SCHEMES[:1], "methods": ("rtn",)}
    grid(**few)
    before = contents(tmp_path / "grid")
    with pytest.raises(RunError, match=r"with another recipe\.calibration\..*--fresh"):
        grid(**few, seed=1)
    with pytest.raises(RunError, match="another evaluation text, context length or number of windows"):
        grid(**few, max_windows=3)
    texts[0].write_text(texts[0].read_text() + " One more sentence.")
    with pytest.raises(RunError, match="w4a16-g32--rtn was measured with another calibration text"):
        grid(**few)
    assert contents(tmp_path / "grid") == before
    assert grid(**few, fresh=True).num_measured == 1


def test_a_crash_is_recorded_and_tried_again(grid: Grid, tmp_path: Path) -> None:
    here = Here()

    def crash(record: Path, progress: Progress) -> str | None:
        return "its process was killed" if record.stem.startswith("w4") else here(record, progress)

    result = grid(methods=("rtn",), launch=crash)
    assert (
        result.problem
        == f"{tmp_path / 'grid'}: 1 cells have no figures; w4a16-g32--rtn crashed: its process was killed"
    )
    assert "crashed" in (tmp_path / "grid" / "bench.md").read_text()
    assert grid(methods=("rtn",), launch=here).problem is None
    assert here.launched == ["w3a16-g32--rtn", "w4a16-g32--rtn"]


def test_a_recipe_file_is_a_method(grid: Grid, texts: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "careful.yaml"
    file.write_text('scheme: W8A16-channel\nmethod: rtn\nrules: [{pattern: "*.down_proj", scheme: W8A16-channel}]\n')
    result = grid(schemes=SCHEMES[:1], methods=(str(file), "rtn"))
    bits = {record["method"]: record["figures"].get("bits_per_weight") for record in result.records[1:]}
    assert bits["careful"] > bits["rtn"]
    with pytest.raises(RecipeError, match="given twice"):
        plan_cells(SCHEMES, (str(file), "careful"), {})


def test_compositions_are_taken_apart(grid: Grid) -> None:
    result = grid(schemes=SCHEMES[:1], methods=("rtn", "gptq+rtn"))
    reasons = {record["method"]: record["reason"] for record in result.records[1:]}
    assert reasons["rtn"] is None
    assert "both choose codes" in reasons["gptq+rtn"]
    with pytest.raises(UnknownName, match=r"unknown method 'gtpq' in 'gtpq\+rtn'"):
        grid(methods=("rtn", "gtpq+rtn"))


def test_a_folder_with_something_else_or_in_use_is_refused(grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "letters").touch()
    with pytest.raises(RunError, match="not the folder of a grid"):
        grid()
    (tmp_path / "grid" / "letters").unlink()
    with BenchFolder(tmp_path / "grid").locked(), pytest.raises(RunError, match="in use by another grid"):
        grid()


def test_a_cell_has_a_process_of_its_own(grid: Grid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its peak memory is not that of the process that starts it, and it ends with that process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ballast = b"x" * 1_500_000_000
    result = grid(schemes=SCHEMES[:1], methods=("rtn",), launch=launch_worker)
    assert result.problem is None
    assert result.records[1]["figures"]["peak_memory_bytes"] < len(ballast)
    file = tmp_path / "grid" / "records" / "w4a16-g32--rtn.json"
    (tmp_path / "grid" / "work").mkdir()
    orphan = subprocess.run(
        [sys.executable, "-m", "bitwright.bench_worker", str(file)], stdin=subprocess.DEVNULL, env=dict(os.environ),
        capture_output=True, check=False,
    )  # fmt: skip
    assert orphan.returncode == ORPHANED


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("exit 0", None),
        ("echo 'text: is empty.' >&2; exit 2", "text: is empty."),
        ("exit 7", "its process ended with status 7"),
        ("kill -9 $$", "its process was killed by SIGKILL, perhaps for want of memory"),
    ],
)
def test_how_a_process_ends_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, reason: str | None
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '[\"quantize\", 1, 2]'\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "work").mkdir()
    seen: list[tuple[str, int, int]] = []
    assert launch_worker(tmp_path / "records" / "cell.json", lambda *report: seen.append(report)) == reason
    assert seen == [("quantize", 1, 2)]
