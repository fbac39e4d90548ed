"""Read a task: one JSON object per line, all in one layout (see `question_layouts`)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitwright.errors import DataError
from bitwright.evaluation.question_layouts import LAYOUTS, Item, Layout, Question


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The questions of one file.

    Attributes:
        source: the file.
        layout: name of the layout that its fields tell.
        questions: in the file's order; all to be chosen from, or all last words.
        data_hash: SHA-256 of the questions, in hexadecimal.
    """

    source: str
    layout: str
    questions: tuple[Question, ...]
    data_hash: str

    @property
    def is_last_word(self) -> bool:
        """Whether words are to be predicted, rather than options chosen."""
        return self.questions[0].is_last_word


def read_task(path: str | Path, *, limit: int | None = None) -> Task:
    """Read the questions of a file, or the first `limit` of them.

    Raises:
        DataError: no such file, a malformed line, fields of no known layout, or a question without one right answer.
    """
    path = Path(path)
    questions: list[Question] = []
    layout: Layout | None = None
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if limit is not None and len(questions) == limit:
            break
        if not line.strip():
            continue
        entry = _entry(line, f"{path}:{number}")
        layout = layout or _layout_of(entry, f"{path}:{number}")
        questions.append(_question(layout, Item(where=f"{path}:{number}", fields=entry)))
    if layout is None:
        raise DataError(f"{path}: holds no question. Give one JSON object per line.")
    digest = hashlib.sha256(json.dumps([[q.contexts, q.options, q.answer] for q in questions]).encode())
    return Task(source=str(path), layout=layout.name, questions=tuple(questions), data_hash=digest.hexdigest())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"task '{path}': no such file. Give a .jsonl file with one question per line.") from None
    except OSError as error:
        raise DataError(f"task '{path}': cannot be read ({error.strerror}). Give a readable .jsonl file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"task '{path}': not UTF-8 at byte {error.start}. Convert it to UTF-8.") from None


def _entry(line: str, where: str) -> Mapping[str, Any]:
    try:
        entry: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}). Give one JSON object per line.") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: not a JSON object. Give one JSON object per line.")
    return cast(dict[str, Any], entry)


def _layout_of(entry: Mapping[str, Any], where: str) -> Layout:
    for layout in LAYOUTS:
        if layout.fits(entry):
            return layout
    known = "; ".join(f"{layout.name} ({', '.join(layout.fields)})" for layout in LAYOUTS)
    raise DataError(
        f"{where}: the fields {', '.join(sorted(entry)) or '(none)'} are of no known layout. Known: {known}."
    )


def _question(layout: Layout, item: Item) -> Question:
    if not layout.fits(item.fields):
        raise DataError(
            f"{item.where}: has the fields {', '.join(sorted(item.fields))}, the first line is {layout.name} "
            f"({', '.join(layout.fields)}). Give one layout per file."
        )
    question = layout.read(item)
    if not all(option.strip() for option in question.options):
        raise DataError(f"{item.where}: an option is empty. Give every option a text.")
    if not all(context.strip() for context in question.contexts):
        raise DataError(f"{item.where}: nothing stands before an option. Give every option a context.")
    if question.is_last_word != (layout.name in ("last word", "LAMBADA")):
        raise DataError(f"{item.where}: only one option to choose from. Give at least two.")
    return question
