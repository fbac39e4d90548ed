"""The run directory: one per run, locked while in use, resumable after a kill, with a fingerprint of what was asked.

1-structure.json  2-stats.safetensors  3-plan.yaml  4-model/  5-records.jsonl  6-export/  7-report.html
run.json          what was asked, by hash, and whether it is finished
work/             journal and hidden states of an unfinished run; removed at the end
"""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

from bitwright.errors import ResourceError, RunError
from bitwright.records import write_json_atomic

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
_FIRST_FILES = re.compile(rf"{re.escape(LOCK_FILE)}|\.{re.escape(RUN_FILE)}\.\w+\.tmp")
"""All that a start killed before it wrote run.json can leave."""
_TEMPORARY = re.compile(r"\.tmp\w{6}|\..+\.tmp")  # safetensors' own, and ours
WEIGHT_INDEX = "model.safetensors.index.json"
TRAINED_CODES = "4-quantized"
"""In a run of quantization-aware training: the run of the codes that were trained."""


class RunDirectory:
    """A run's folder. Use as a context manager: the lock is held inside it and dies with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.structure = path / "1-structure.json"
        self.stats = path / "2-stats.safetensors"
        self.plan = path / "3-plan.yaml"
        self.model = path / "4-model"
        self.records = path / "5-records.jsonl"
        self.export = path / "6-export"
        self.report = path / "7-report.html"
        self.work = path / "work"
        self._lock: Any = None

    @property
    def info(self) -> dict[str, Any] | None:
        """The contents of run.json; None where there is none yet."""
        file = self.path / RUN_FILE
        if not file.is_file():
            return None
        try:
            info: object = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{file}: not readable as JSON ({error}). Choose another --out, or remove the folder."
            ) from None
        if not isinstance(info, dict) or not {"fingerprint", "complete"} <= set(cast(dict[str, Any], info)):
            raise RunError(f"{file}: not written by bitwright. Choose another directory.")
        return cast(dict[str, Any], info)

    @property
    def is_complete(self) -> bool:
        """Whether the run has come to its end, passed or failed."""
        info = self.info
        return info is not None and bool(info["complete"])

    def check_place(self) -> None:
        """Refuse a path that is not a run directory and not free, before anything is read or touched.

        Raises:
            RunError: a file, a folder that holds something else, or one that another process is working in.
            ResourceError: a place that cannot be written.
        """
        if not self.path.exists():
            parent = next(folder for folder in self.path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise ResourceError(f"{self.path}: {parent} cannot be written. Choose another --out.")
            return
        if not self.path.is_dir():
            raise RunError(f"{self.path}: is a file. Give a directory for the run.")
        if self.info is None and any(not _FIRST_FILES.fullmatch(entry.name) for entry in self.path.iterdir()):
            raise RunError(f"{self.path}: not empty and not a run directory. Choose another --out.")
        if self._lock is None and os.access(self.path / LOCK_FILE, os.W_OK):
            self._take_lock()
            self.release()

    def check(self, fingerprint: str, *, fresh: bool) -> None:
        """Refuse a folder that belongs to a run of another recipe, model or text, unless it is to be replaced.

        Raises:
            RunError: it does.
        """
        info = self.info
        if info is not None and info["fingerprint"] != fingerprint and not fresh:
            raise RunError(
                f"{self.path}: belongs to a run with another recipe, model or calibration text. "
                "Choose another --out, or --fresh to replace it."
            )

    def start(self, fingerprint: str, asked: dict[str, Any], *, fresh: bool) -> None:
        """Take the lock (until `release`) and make the folder this run's own; `fresh` discards what is in it.

        A kill between any two steps leaves a folder that the next start accepts: run.json is there before anything
        else, and says when what was there before is gone. From then on what a killed run has left is kept.

        Raises:
            RunError: another process is working in it, or has made it its own since it was checked.
            ResourceError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.check_place()
            self.check(fingerprint, fresh=fresh)
            if fresh or not (self.is_complete or (self.info or {}).get("cleared", bool(self.journal()))):
                mine = {"fingerprint": fingerprint, "asked": asked, "complete": False}
                write_json_atomic(self.path / RUN_FILE, mine | {"cleared": False})
                self._clear()
                write_json_atomic(self.path / RUN_FILE, mine | {"cleared": True})
            self._sweep()
            if not self.is_complete:
                self.work.mkdir(exist_ok=True)
                self.model.mkdir(exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written ({error.strerror}). Choose another --out.") from None

    def judge(self, failure: str | None) -> None:
        """Record why the run failed, or that it did not after all (the gate is not part of what identifies a run)."""
        info = self.info
        assert info is not None
        if info.get("failure") != failure:
            write_json_atomic(self.path / RUN_FILE, {**info, "failure": failure})

    def finish(self, results: dict[str, Any], *, failure: str | None) -> None:
        """Mark the run complete, with its headline results and why it failed its gate, if it did."""
        info = self.info
        assert info is not None
        write_json_atomic(self.path / RUN_FILE, {**info, "complete": True, "failure": failure, "results": results})
        shutil.rmtree(self.work, ignore_errors=True)

    def make_loadable(self) -> None:
        """Let the run itself load as a model directory: an index that points into 4-model, and the small files."""
        for file in self.model.iterdir():
            if file.suffix == ".safetensors" or file.is_dir():
                continue
            if file.name == WEIGHT_INDEX:
                index = json.loads(file.read_text(encoding="utf-8"))
                index["weight_map"] = {
                    name: f"{self.model.name}/{shard}" for name, shard in index["weight_map"].items()
                }
                write_json_atomic(self.path / WEIGHT_INDEX, index)
            else:
                shutil.copyfile(file, self.path / file.name)

    def journal(self) -> dict[str, Any]:
        """How far an unfinished run has come."""
        file = self._journal_file
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def commit(self, entry: dict[str, Any]) -> None:
        """Record progress: everything that the entry stands for is already on disk."""
        write_json_atomic(self._journal_file, entry)

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = (self.path / LOCK_FILE).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunError(f"{self.path}: in use by another run. Wait for it, or choose another --out.") from None
        self._lock = lock

    @property
    def _journal_file(self) -> Path:
        return self.work / "journal.json"

    def _sweep(self) -> None:
        """Remove the temporary files of a killed run, and the work folder of one killed after its last step."""
        for folder in (self.path, self.model, self.work):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if _TEMPORARY.fullmatch(entry.name):
                    entry.unlink()
        if self.is_complete:
            shutil.rmtree(self.work, ignore_errors=True)

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name in (LOCK_FILE, RUN_FILE):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def quantized_run(path: Path) -> Path:
    """Return the run that has the quantized model: in quantization-aware training that of its codes, else itself."""
    inner = path / TRAINED_CODES
    return inner if (inner / RUN_FILE).is_file() else path


def open_run(path: Path) -> RunDirectory:
    """Open a finished run for evaluation, export or the report.

    Raises:
        RunError: no run there, or not finished.
    """
    run = RunDirectory(path)
    if run.info is None:
        raise RunError(f"{path}: not a run directory (no {RUN_FILE}). Give the --out of a bitwright quantize.")
    if not run.is_complete:
        raise RunError(f"{path}: the run is not finished. Give the same bitwright quantize command again to resume it.")
    return run


def model_directory(target: str | Path) -> str | Path:
    """The model directory behind a run directory; anything else is returned as it is."""
    path = Path(target)
    return open_run(quantized_run(path)).model if (path / RUN_FILE).is_file() else target


def run_behind(target: str | Path) -> RunDirectory | None:
    """The finished run that a target is, or whose model directory it is."""
    path = Path(target)
    if (path / RUN_FILE).is_file():
        return open_run(quantized_run(path))
    parent = path.absolute().parent
    is_its_model = path.name == RunDirectory(parent).model.name and (parent / RUN_FILE).is_file()
    return open_run(parent) if is_its_model else None
