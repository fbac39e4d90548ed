"""What was measured and on what machine, in files that survive a crash: JSON lines, and files replaced whole.

Standard library only: a report reads records where neither torch nor a model is installed.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from bitwright.errors import ResourceError, RunError, VerificationError

DECIDING = ("bitwright", "torch", "transformers")
PACKAGES = (
    *DECIDING,
    "tokenizers",
    "safetensors",
    "compressed-tensors",
    "numpy",
    "scipy",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One figure with what is needed to repeat or doubt it.

    Args:
        name: what was measured, such as `perplexity`.
        value: finite.
        unit: such as `nats/token`, `bytes`, `s`, `bits/weight`; "1" for a pure number.
        n: how many independent observations stand behind the value (tokens, windows, repetitions).
        ci: low and high end of the 95 % confidence interval.
        seed: of the random choices the value depends on.
        device: such as `cpu` or `cuda:0`.
        model_hash: SHA-256 of the weights measured.
        data_hash: SHA-256 of the text or tokens measured on.
        details: whatever else a reader needs: data set, context length, scheme.
    Raises:
        VerificationError: the value or an end of the interval is not finite.
    """

    name: str
    value: float
    unit: str
    n: int | None = None
    ci: tuple[float, float] | None = None
    seed: int | None = None
    device: str | None = None
    model_hash: str | None = None
    data_hash: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.value, *(self.ci or ()))):
            raise VerificationError(f"{self.name} is {self.value} with interval {self.ci}: a record must be finite.")

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data for JSON, without the entries that are not set."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != {}}

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any]) -> "Measurement":
        """Read what `to_mapping` wrote.

        Raises:
            RunError: an entry is unknown or one that every measurement needs is missing.
        """
        arguments = dict(mapping)
        if arguments.get("ci") is not None:
            arguments["ci"] = tuple(arguments["ci"])
        unknown = sorted(set(arguments) - {f.name for f in fields(Measurement)})
        missing = sorted({"name", "value", "unit"} - set(arguments))
        if unknown or missing:
            raise RunError(
                f"not a measurement: unknown {unknown}, missing {missing}. Was it written by another version?"
            )
        return Measurement(**arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine and the versions behind a set of records."""

    python: str
    platform: str
    cpu: str
    num_cores: int
    versions: Mapping[str, str]

    @staticmethod
    def capture() -> "Environment":
        """Describe the running process: usable cores, and the versions of the packages that are installed."""
        return Environment(
            python=platform.python_version(),
            platform=platform.platform(),
            cpu=_cpu_name(),
            num_cores=_num_cores(),
            versions=_versions(),
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def append_jsonl(path: Path, *records: Mapping[str, Any]) -> None:
    """Append one JSON line per record and wait until all are on disk; a line torn by an earlier crash is cut off first.

    A number that is not finite, which JSON has no word for, is written as the text `nan`, `inf` or `-inf`.

    Raises:
        ResourceError: the disk is full or the file may not be written.
    """
    lines = "".join(_json(record, indent=None) + "\n" for record in records).encode()
    try:
        with path.open("ab+") as file:
            _cut_torn_line(file.fileno())
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file in order, without a last line that a crash tore (it has no line end).

    Raises:
        RunError: there is no such file, or a whole line is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}). Give the directory of a finished run.") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record: object = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RunError(f"{path}:{number}: not a JSON record. The file was changed by hand or damaged; run again.")
        records.append(cast(dict[str, Any], record))
    return records


def deciding_versions() -> dict[str, str]:
    """Versions of the packages on which results depend to the last bit: package -> version."""
    return {name: importlib.metadata.version(name) for name in DECIDING}


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader, or a crash, sees the old text or the new one, never a part.

    Raises:
        ResourceError: the disk is full or the file may not be written; the old content is untouched.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from None


def temporary_beside(path: Path) -> Path:
    """Where to write what will replace a file: each rank elsewhere, since all may write one file at the same time.

    A process that was killed has left it where the next one of its rank writes over it.
    """
    return path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.tmp")


def write_json_atomic(path: Path, value: object) -> None:
    """Write a value as readable JSON, in one step as `write_text_atomic` does; non-finite numbers as `append_jsonl`.

    Raises:
        ResourceError: the disk is full or the file may not be written; the old content is untouched.
    """
    write_text_atomic(path, _json(value, indent=2) + "\n")


def _json(value: object, *, indent: int | None) -> str:
    return json.dumps(_representable(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _representable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _representable(item) for key, item in cast(Mapping[object, object], value).items()}
    if isinstance(value, (list, tuple)):
        return [_representable(item) for item in cast(Sequence[object], value)]
    return value


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path}: cannot be written ({error.strerror}). Free disk space or choose another directory.")


def _cut_torn_line(descriptor: int) -> None:
    end = os.fstat(descriptor).st_size
    content_end = end
    while content_end > 0 and os.pread(descriptor, 1, content_end - 1) != b"\n":
        content_end -= 1
    if content_end < end:
        os.ftruncate(descriptor, content_end)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries (a rename, say) are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
