"""Entries of a record, read as the types they should have.

A figure that is absent or null becomes None ("not measured"), the texts `nan` and `inf` that stand for figures JSON has
no word for become those floats, and anything else in the place of a figure is an error that names the file and the
entry.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeVar, cast

from bitwright.errors import RunError
from bitwright.records import read_jsonl
from bitwright.runs import RunDirectory

Figure = float | None
T = TypeVar("T")


class Records:
    """The records of a run by kind."""

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.records
        self._by_kind: dict[str, list[dict[str, Any]]] = {}
        for record in read_jsonl(run.records):
            self._by_kind.setdefault(str(record.get("kind")), []).append(record)

    def of(self, kind: str) -> list[tuple[dict[str, Any], str]]:
        """All records of a kind, each with the words that name its place in an error."""
        where = f"{self._path}: '{kind}' record"
        return [(record, f"{where} {n}") for n, record in enumerate(self._by_kind.get(kind, []), start=1)]

    def read(self, fact: type[T], kind: str) -> tuple[T, ...]:
        """All records of a kind as facts."""
        return tuple(read_entry(fact, record, where) for record, where in self.of(kind))

    def first(self, kind: str) -> Mapping[str, Any]:
        """The first record of a kind, as it is; empty if there is none."""
        return next(iter(self._by_kind.get(kind, [])), {})


def read_entry(fact: type[T], record: Mapping[str, Any], where: str) -> T:
    """Build a fact of texts and figures from the entries of a record that it has fields for."""
    values = {
        field.name: text(record, field.name) if field.type is str else figure(record, field.name, where)
        for field in fields(cast(Any, fact))
    }
    return fact(**values)


def text(record: Mapping[str, Any], key: str) -> str:
    """An entry as text; empty if it is absent."""
    value = record.get(key)
    return "" if value is None else str(value)


def figure(record: Mapping[str, Any], key: str, where: str) -> Figure:
    """An entry as a figure.

    Raises:
        RunError: it is none.
    """
    return _number(record.get(key), key, where)


def figures(record: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    """An entry as a list of figures; empty if it is absent.

    Raises:
        RunError: it is none, or one of them is missing.
    """
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _damaged(value, key, where, "a list of numbers")
    found = [_number(item, key, where) for item in cast(Sequence[object], value)]
    if any(item is None for item in found):
        raise _damaged(None, key, where, "a number")
    return tuple(cast(list[float], found))


def mappings(record: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    """An entry as a list of mappings; empty if it is absent.

    Raises:
        RunError: it is none.
    """
    value = record.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in cast(list[object], value)):
        raise _damaged(value, key, where, "a list of mappings")
    return cast(list[Mapping[str, Any]], value)


def mapping_or_empty(value: object) -> Mapping[str, Any]:
    """Return a mapping as it is, anything else as an empty one."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def is_finite(value: Figure) -> bool:
    """Whether there is a figure, and it is a number that can be compared or drawn."""
    return value is not None and math.isfinite(value)


def _number(value: object, key: str, where: str) -> Figure:
    if value is None:
        return None
    if value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        with suppress(OverflowError):  # a whole number too large for a float
            return float(cast(float, value))
    raise _damaged(value, key, where, "a number")


def _damaged(value: object, key: str, where: str, wanted: str) -> RunError:
    return RunError(
        f"{where}: {key} is {value!r}, not {wanted}. The file was changed by hand or damaged; correct it or run again."
    )
