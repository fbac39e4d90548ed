"""Where text comes from: one string names a source, and every source becomes a list of documents with a content hash.

notes.txt                        a text file, one document
data.jsonl                       one JSON object per line, one document each, in the field "text" (or another)
hub:NAME[:CONFIG[:SPLIT]]        a Hugging Face data set; split "train" unless given; `hub:NAME::test` skips the config
stdlib, stdlib:heldout           the running Python's own sources, two disjoint sets of files (no download)
stdlib:train                     all sources that are not held out: stdlib and some fifteen times as much
"""

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitwright.data.stdlib import stdlib_documents
from bitwright.errors import DataError, MissingDependency, did_you_mean

HUB_PREFIX = "hub:"
STDLIB_SPLITS = {"stdlib": "calibration", "stdlib:train": "train", "stdlib:heldout": "heldout"}
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents of one source, in the source's order; `data_hash` is the SHA-256 of their content."""

    source: str
    documents: tuple[str, ...]
    data_hash: str


def load_corpus(source: str, *, field: str = "text") -> Corpus:
    """Read the documents a source names.

    Args:
        source: see the module's table.
        field: the key that holds the text in JSON lines and hub data sets.
    Raises:
        DataError: no such source, not text, a malformed line, or nothing but white space.
        MissingDependency: a hub data set without the `data` extra.
    """
    if source in STDLIB_SPLITS:
        documents = [text for _, text in stdlib_documents(STDLIB_SPLITS[source])]
    elif source.startswith(HUB_PREFIX):
        documents = _hub_documents(source, field)
    elif Path(source).suffix.lower() in JSON_LINES_SUFFIXES:
        documents = _json_lines(Path(source), field)
    else:
        documents = [_read(Path(source))]
    if not any(document.strip() for document in documents):
        raise DataError(f"{source}: holds no text. Give a source with text in it.")
    return Corpus(source=source, documents=tuple(documents), data_hash=hash_documents(documents))


def hash_documents(documents: Sequence[str]) -> str:
    """SHA-256 over the documents' UTF-8 bytes and their borders, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", errors="surrogatepass")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = "a text file, a .jsonl file, hub:NAME, stdlib, stdlib:train or stdlib:heldout"
        raise DataError(f"text '{path}': no such file. Give {known}.") from None
    except OSError as error:
        raise DataError(f"text '{path}': cannot be read ({error.strerror}). Give a readable text file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"text '{path}': not UTF-8 at byte {error.start}. Convert it to UTF-8.") from None


def _json_lines(path: Path, field: str) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}). Give one JSON object per line.") from None
        if not isinstance(entry, dict):
            raise DataError(f"{where}: not a JSON object. Give one JSON object per line.")
        documents.append(_text_of(cast(dict[str, object], entry), field, where))
    return documents


def _text_of(entry: dict[str, object], field: str, where: str) -> str:
    if field not in entry:
        raise DataError(f"{where}: no field '{field}'.{did_you_mean(field, entry)}")
    text = entry[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{field}' is not text. Name the field that holds the text.")
    return text


def _hub_documents(source: str, field: str) -> list[str]:
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{source}: not a hub data set. Write hub:NAME[:CONFIG[:SPLIT]].")
    config, split = ([part or None for part in rest] + [None, None])[:2]
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise MissingDependency(f"{source}: needs the package datasets. Run pip install 'bitwright[data]'.") from None
    try:
        rows: Any = datasets.load_dataset(name, config, split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source}: cannot be loaded ({reason}). Check its name and the network.") from None
    if field not in rows.column_names:
        raise DataError(f"{source}: no field '{field}'.{did_you_mean(field, rows.column_names)}")
    return [_text_of({field: text}, field, source) for text in rows[field]]
