"""`bitwright bench`: every scheme with every method on one model, each cell in a process of its own.

A grid is a folder (see `bench_grid`). Whatever can be refused by names and shapes is refused before any work; a cell
that crashes does not end the grid; and the same command continues where an earlier one stopped, measuring no finished
cell again.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.bench_grid import FINISHED, REFERENCE, BenchFolder, Cell, finish_record, new_record, plan_cells
from bitwright.bench_worker import evaluation_windows
from bitwright.data.corpora import load_corpus
from bitwright.data.overlap import require_disjoint
from bitwright.data.windows import hash_tokens
from bitwright.errors import CheckpointError, RecipeError, ShapeError
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import LONGEST_DEFAULT_WINDOW
from bitwright.preparation import (
    GATE_TOKENS,
    SELF,
    check_seqlen,
    decide,
    max_length,
    open_model,
    text_sample,
)
from bitwright.progress import Progress, no_progress
from bitwright.recipe import Calibration, Recipe
from bitwright.records import deciding_versions, write_json_atomic, write_text_atomic
from bitwright.reports.bench_page import bench_markdown, write_bench_page
from bitwright.worker_process import run_worker

Launch = Callable[[Path, Progress], str | None]
"""Measures the cell of a record file and finishes the record; returns why it could not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """A grid that has come to its end.

    Attributes:
        folder: where it is.
        records: of all cells in the folder, as in bench.jsonl, the reference's first.
        num_measured: cells that this call has measured, whatever came of them.
        num_known: cells asked for that an earlier call had finished.
        page: the interactive page.
    """

    folder: Path
    records: list[dict[str, Any]]
    num_measured: int
    num_known: int
    page: Path

    @property
    def problem(self) -> str | None:
        """Why the grid is no success: cells without figures for another reason than a refusal, or only refusals."""
        broken = [record for record in self.records if record["status"] not in ("done", "refused")]
        measured = [record for record in self.records if record["kind"] == "cell" and record["status"] == "done"]
        if not broken and measured:
            return None
        first = next(iter(broken or self.records))
        what = f"{len(broken)} cells have no figures" if broken else "every cell is refused"
        return f"{self.folder}: {what}; {first['slug']} {first['status']}: {first['reason']}"


def run_bench(
    model: str | Path,
    out: str | Path,
    *,
    schemes: Sequence[str],
    methods: Sequence[str],
    text: str,
    calibration: str | None = None,
    num_samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    max_windows: int | None = None,
    keep_models: bool = False,
    fresh: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    launch: "Launch | None" = None,
) -> BenchResult:
    """Quantize and evaluate a model in every combination of scheme and method; the same call resumes.

    Args:
        model: model directory or hub id.
        out: the grid's folder.
        schemes: names of schemes.
        methods: names of methods, or recipe files, whose scheme is replaced.
        text: what is evaluated on.
        calibration: what is calibrated on; None for what each recipe says, which is nothing by default.
        num_samples: calibration windows.
        seqlen: tokens per window, of calibration and evaluation; the recipe's and the model's own (at most 2048) unless
            given.
        seed: of the choice of calibration windows.
        max_windows: evaluate only the first windows.
        keep_models: do not remove a cell's weights after its evaluation.
        fresh: discard what an earlier grid left in `out`.
        progress: called with (what, done, total); "cells" for the whole grid.
        launch: how a cell is measured; in a process of its own unless given.
    Raises:
        BitwrightError: see `errors`; nothing is measured unless some cell can be.
    """
    calibrate = {"text": calibration, "num_samples": num_samples, "seqlen": seqlen, "seed": seed}
    cells = plan_cells(schemes, methods, calibrate)
    folder = BenchFolder(Path(out))
    folder.check_place()
    opened = open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    refusals = _refusals(opened, cells)
    length = min(max_length(opened) or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW) if seqlen is None else seqlen
    shared = {
        "model": str(model), "text": text, "context": length, "windows": max_windows,
        "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code,
        "versions": deciding_versions(),
    }  # fmt: skip
    every = evaluation_windows(opened, {**shared, "windows": None})
    hashes = _check_texts(opened, [c.recipe for c in cells if c.recipe and c.slug not in refusals], every, shared)
    shared |= {"model_hash": opened.skeleton.checkpoint.audit(), "text_hash": hash_tokens(every[:max_windows])}
    asked = {cell.slug: {**shared, **_asked(cell.recipe, hashes)} for cell in cells}
    if not fresh:
        folder.check({slug: each for slug, each in asked.items() if slug not in refusals} or asked)
    with folder.locked():
        if fresh:
            folder.clear()
        return _fill(folder, cells, asked, refusals, keep_models, progress, launch or launch_worker)


def _refusals(model: StreamedModel, cells: Sequence[Cell]) -> dict[str, str]:
    """Why cells cannot be, by their slugs, as far as names and shapes tell.

    Raises:
        UnknownName: a method that does not exist.
        CheckpointError: a model that is quantized already.
        RecipeError: no cell can be.
    """
    model.skeleton.checkpoint.require_original()
    refusals: dict[str, str] = {}
    for cell in cells:
        try:
            if cell.recipe is None:
                refusals[cell.slug] = cell.refusal or ""
            else:
                decide(model, cell.recipe)
        except (RecipeError, ShapeError, CheckpointError) as error:
            refusals[cell.slug] = str(error)
    if len(refusals) == len(cells):
        raise RecipeError(f"all {len(cells)} cells are refused; {cells[0].slug}: {refusals[cells[0].slug]}")
    return refusals


def _check_texts(
    model: StreamedModel, recipes: Sequence[Recipe], windows: Tensor, shared: Mapping[str, Any]
) -> dict[str, str]:
    """The content hash of each calibration text.

    Raises:
        DataError: a text is too short, or shares more than boilerplate with the evaluation windows.
    """
    hashes: dict[str, str] = {}
    wanted: dict[Calibration, None] = dict.fromkeys(recipe.calibration for recipe in recipes)
    for each in wanted:
        check_seqlen(model, each.seqlen)
        if each.text is None or each.text == SELF:
            continue
        num_gate = max(2, GATE_TOKENS // each.seqlen)
        sample = text_sample(
            model, each.text, each.seqlen, num_samples=each.num_samples + num_gate, seed=each.seed,
            trust_remote_code=shared["trust_remote_code"],
        )  # fmt: skip
        require_disjoint(
            sample[: each.num_samples], windows, calibration_source=each.text, evaluation_source=shared["text"]
        )
        hashes[each.text] = load_corpus(each.text).data_hash
    return hashes


def _asked(recipe: Recipe | None, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a cell asks for beyond what all have in common."""
    if recipe is None:
        return {"recipe": None, "calibration_hash": None}
    text = recipe.calibration.text
    return {"recipe": recipe.to_mapping(), "calibration_hash": hashes.get(text, text) if text else None}


def _fill(
    folder: BenchFolder,
    cells: Sequence[Cell],
    asked: Mapping[str, Mapping[str, Any]],
    refusals: Mapping[str, str],
    keep_models: bool,
    progress: Progress,
    launch: Launch,
) -> BenchResult:
    """Measure what is not finished; write the outputs."""
    found = folder.read()
    for cell in cells:
        reason = refusals.get(cell.slug)
        if reason is not None and found.get(cell.slug, {}).get("reason") != reason:
            write_json_atomic(folder.record(cell.slug), new_record(cell, asked[cell.slug], refusal=reason))
    # What was refused before it was tried may be possible by now: only what is asked for decides, again.
    tried = {slug for slug, record in found.items() if record["status"] in FINISHED and record["fingerprint"]}
    known = {*refusals, *tried}
    pending = [cell for cell in cells if cell.slug not in known]
    num_known = len(cells) - len(pending)
    folder.work.mkdir(exist_ok=True)
    for number, cell in enumerate(pending):
        progress("cells", num_known + number, len(cells))
        file = folder.record(cell.slug)
        write_json_atomic(file, new_record(cell, asked[cell.slug], refusal=None))
        problem = launch(file, progress)
        if problem is not None:
            finish_record(file, "crashed", problem)
        elif not keep_models:
            folder.drop_weights(cell.slug)
        _write_tables(folder)
    progress("cells", len(cells), len(cells))
    shutil.rmtree(folder.work, ignore_errors=True)
    records = _write_tables(folder)
    page = write_bench_page(records, folder.page)
    return BenchResult(
        folder=folder.path, records=records, num_measured=len(pending), num_known=num_known, page=page
    )  # fmt: skip


def _write_tables(folder: BenchFolder) -> list[dict[str, Any]]:
    """All records into bench.jsonl and bench.md; return them, the reference's first."""
    found = folder.read()
    records = [found.pop(REFERENCE)] if REFERENCE in found else []
    records += [record for record in found.values() if record["status"] != "started"]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text_atomic(folder.lines, "".join(lines))
    write_text_atomic(folder.table, bench_markdown(records))
    return records


def launch_worker(record: Path, progress: Progress) -> str | None:
    """Measure a cell in a new process of this interpreter; return why it could not be measured, or None."""
    log = record.parent.parent / "work" / f"{record.stem}.log"
    return run_worker("bitwright.bench_worker", record, log, progress)
