"""The cells of a grid of schemes and methods, what determines their figures, and the folder that keeps them.

records/SLUG.json   one cell: what was asked, its status, and its figures once it is finished
records/reference.json   the unquantized model on the same text
runs/SLUG/          the run directory of a cell
work/               hidden states of the reference, and what workers print; removed at the end
bench.jsonl  bench.md  bench.html   all records; the table; the page
"""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitwright.errors import RecipeError, RunError, ShapeError
from bitwright.recipe import Recipe, load_recipe
from bitwright.recipe_builder import build_recipe
from bitwright.records import write_json_atomic
from bitwright.schemes import Scheme

FINISHED = ("done", "refused", "failed")
"""A cell of another status (`started`, `crashed`) is measured when the command is given again."""
REFERENCE = "reference"
RECIPE_SUFFIXES = (".yaml", ".yml")
_SHARED = {
    "model_hash": "model",
    "text_hash": "evaluation text, context length or number of windows",
    "dtype": "dtype",
    "device": "kind of device",
    "versions": "version of bitwright, torch or transformers",
}
_OWN = {"calibration_hash": "calibration text"}
_NO_DIFFERENCE = ("max_kl",)  # a recipe's entries that do not change what is measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One scheme with one method; `refusal` says why there is no recipe."""

    scheme: str
    method: str
    recipe: Recipe | None
    refusal: str | None = None

    @property
    def slug(self) -> str:
        """Its name in the file system."""
        return re.sub(r"[^a-z0-9.+-]+", "-", f"{self.scheme}--{self.method}".lower())


def plan_cells(schemes: Sequence[str], methods: Sequence[str], calibration: Mapping[str, Any]) -> list[Cell]:
    """Every scheme with every method, each once, in the order given.

    Args:
        schemes: names as `--scheme` takes them.
        methods: names as `--method` takes them, or files of recipes, whose scheme is replaced.
        calibration: entries of a recipe's `calibration` that replace those of all; None leaves one alone.
    Raises:
        UnknownName: a scheme or method that does not exist.
        RecipeError: nothing is asked for, a file is no recipe, or two have the same name.
    """
    names = list(dict.fromkeys(str(Scheme.parse(scheme)) for scheme in schemes))
    sources = {method: _recipe_file(method) for method in dict.fromkeys(methods)}
    if not names or not sources:
        raise RecipeError("a grid has at least one scheme and one method. Give --schemes and --methods.")
    labels = [method if file is None else file.stem for method, file in sources.items()]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise RecipeError(f"--methods: '{twice[0]}' is given twice. Rename one of the recipes.")
    return [
        _cell(scheme, label, method, file, calibration)
        for scheme in names
        for label, (method, file) in zip(labels, sources.items(), strict=True)
    ]


def _recipe_file(method: str) -> Path | None:
    if Path(method).suffix.lower() not in RECIPE_SUFFIXES:
        return None
    load_recipe(Path(method))
    return Path(method)


def _cell(scheme: str, label: str, method: str, file: Path | None, calibration: Mapping[str, Any]) -> Cell:
    given = {"scheme": scheme, "method": method if file is None else None}
    try:
        return Cell(scheme=scheme, method=label, recipe=build_recipe(file, given, calibration))
    except (RecipeError, ShapeError) as error:
        return Cell(scheme=scheme, method=label, recipe=None, refusal=str(error))


def identity(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The part of what was asked that determines the figures: content in place of names."""
    recipe = {key: value for key, value in (asked["recipe"] or {}).items() if key not in _NO_DIFFERENCE}
    if recipe:
        recipe["calibration"] = {key: value for key, value in recipe["calibration"].items() if key != "text"}
    return {
        **{key: asked[key] for key in (*_SHARED, *_OWN)},
        "device": str(asked["device"]).partition(":")[0],
        **{f"recipe.{key}": value for key, value in recipe.items()},
    }


def fingerprint(asked: Mapping[str, Any]) -> str:
    """SHA-256 of the identity."""
    return hashlib.sha256(json.dumps(identity(asked), sort_keys=True).encode()).hexdigest()


class BenchFolder:
    """The folder of a grid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = path / "records"
        self.runs = path / "runs"
        self.work = path / "work"
        self.lines, self.table, self.page = path / "bench.jsonl", path / "bench.md", path / "bench.html"

    def record(self, slug: str) -> Path:
        """The file of a cell."""
        return self.records / f"{slug}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """All records, the reference's included, by their slugs.

        Raises:
            RunError: one is not readable.
        """
        return {file.stem: read_record(file) for file in sorted(self.records.glob("*.json"))}

    def check_place(self) -> None:
        """Raises RunError for a file, or a folder that holds something else."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file. Give a directory for the grid.")
        if self.path.is_dir() and not self.records.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: not empty and not the folder of a grid. Choose another --out.")

    def check(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a folder whose figures cannot stand beside those that are wanted.

        Args:
            wanted: what is asked, of each slug.
        Raises:
            RunError: names the cell and what is different.
        """
        any_asked = next(iter(wanted.values()))
        for slug, record in self.read().items():
            if record["status"] == "refused" and record["fingerprint"] is None:
                continue
            now, then = identity(wanted.get(slug, any_asked)), identity(record["asked"])
            keys = [key for key in {**now, **then} if slug in wanted or key in _SHARED]
            different = next((key for key in keys if now.get(key) != then.get(key)), None)
            if different is not None:
                what = {**_SHARED, **_OWN}.get(different, different)
                raise RunError(
                    f"{self.path}: {slug} was measured with another {what}. Choose another --out, or --fresh to "
                    "measure everything again."
                )

    def clear(self) -> None:
        """Remove all that an earlier grid left; the records go first, so that a kill leaves none without its run."""
        for file in (*self.records.glob("*.json"), self.lines, self.table, self.page):
            file.unlink(missing_ok=True)
        for folder in (self.runs, self.work):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keep other processes out; the lock dies with this one.

        Raises:
            RunError: another process is working in the folder.
        """
        self.records.mkdir(parents=True, exist_ok=True)
        with (self.records / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: in use by another grid. Wait for it, or choose another --out.") from None
            yield

    def drop_weights(self, slug: str) -> None:
        """Remove the weights of a cell's model; everything else of its run stays."""
        for file in (self.runs / slug / "4-model").glob("*.safetensors"):
            file.unlink()


def new_record(cell: Cell, asked: Mapping[str, Any], *, refusal: str | None) -> dict[str, Any]:
    """The record of a cell before it is measured; a refused one is finished."""
    return {
        "kind": "cell",
        "slug": cell.slug,
        "scheme": cell.scheme,
        "method": cell.method,
        "status": "started" if refusal is None else "refused",
        "reason": refusal,
        "fingerprint": fingerprint(asked) if refusal is None else None,
        "asked": dict(asked),
        "machine": None,
        "figures": {},
    }


def read_record(file: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        RunError: it is not one.
    """
    try:
        record: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or "status" not in record or "asked" not in record:
        raise RunError(f"{file}: not a record of a grid. Remove it, or give --fresh to measure everything again.")
    return cast(dict[str, Any], record)


def finish_record(file: Path, status: str, reason: str | None, **entries: Any) -> None:
    """Replace a record by its finished self, in one step."""
    write_json_atomic(file, {**read_record(file), "status": status, "reason": reason, **entries})
