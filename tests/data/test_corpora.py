import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bitwright.data.corpora import hash_documents, load_corpus
from bitwright.errors import DataError, MissingDependency


def write_lines(path: Path, *entries: object) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_a_text_file_is_one_document_hashed_by_content(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo: \xc3\xa9.")
    corpus = load_corpus(str(path))
    assert corpus.documents == ("One.\n\nTwo: é.",)
    content = "One.\n\nTwo: é.".encode()
    assert corpus.data_hash == hashlib.sha256(len(content).to_bytes(8, "little") + content).hexdigest()
    other = tmp_path / "copy.md"
    other.write_text("One.\n\nTwo: é.")
    assert load_corpus(str(other)).data_hash == corpus.data_hash


def test_json_lines_are_documents_in_order(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "b", "n": 1}, {"text": ""}, {"text": "a\u2028c"})
    assert load_corpus(source).documents == ("b", "", "a\u2028c")


def test_json_lines_may_not_escape_line_separators(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028c"}\n\n{"text": "d"}', encoding="utf-8")
    assert load_corpus(str(tmp_path / "a.jsonl")).documents == ("a\u2028c", "d")


def test_another_field_can_be_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.ndjson", {"content": "x"})
    assert load_corpus(source, field="content").documents == ("x",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl:2: no field 'text'. Did you mean 'txt'\? Known: txt."),
        ('{"text": "a"}\n\n{"text": 3}\n', r"a.jsonl:3: field 'text' is not text"),
        ('{"text": "a"\n', r"a.jsonl:1: not JSON"),
        ('["a"]\n', r"a.jsonl:1: not a JSON object"),
        ("", r"a.jsonl: holds no text"),
        ('{"text": " \\n"}\n', r"a.jsonl: holds no text"),
    ],
)
def test_flawed_json_lines_name_the_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_corpus(str(path))


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"empty.txt: holds no text"):
        load_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match=r"not UTF-8 at byte 3\. Convert it"):
        load_corpus(str(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match=r"no such file\. Give a text file"):
        load_corpus(str(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        load_corpus(str(tmp_path))


def test_document_borders_count_in_the_hash() -> None:
    assert hash_documents(["ab", "c"]) != hash_documents(["a", "bc"])
    assert hash_documents(["a", ""]) != hash_documents(["a"])


def test_the_standard_library_has_two_disjoint_parts() -> None:
    train, heldout = load_corpus("stdlib"), load_corpus("stdlib:heldout")
    assert len(train.documents) > len(heldout.documents) > 1
    assert not set(train.documents) & set(heldout.documents)


class FakeRows(dict[str, list[object]]):
    @property
    def column_names(self) -> list[str]:
        return list(self)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[Any, ...]]) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> FakeRows:
        calls.append((name, config, split))
        if name == "absent/set":
            raise ConnectionError("Couldn't reach 'absent/set'\nlong story")
        return FakeRows(text=["one", "two"], label=[0, 1])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:wikitext:raw-v1", ("wikitext", "raw-v1", "train")),
        ("hub:wikitext:raw-v1:test", ("wikitext", "raw-v1", "test")),
        ("hub:wikitext::test[:10]", None),
        ("hub:owner/name::validation", ("owner/name", None, "validation")),
    ],
)
def test_hub_sources(source: str, call: tuple[Any, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fake_datasets(monkeypatch, calls)
    if call is None:
        with pytest.raises(DataError, match=r"Write hub:NAME\[:CONFIG\[:SPLIT\]\]"):
            load_corpus(source)
        return
    assert load_corpus(source).documents == ("one", "two")
    assert calls == [call]


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [])
    with pytest.raises(DataError, match=r"no field 'body'.* Known: label, text"):
        load_corpus("hub:owner/name", field="body")
    with pytest.raises(DataError, match="field 'label' is not text"):
        load_corpus("hub:owner/name", field="label")
    with pytest.raises(DataError, match=r"cannot be loaded \(Couldn't reach 'absent/set'\)") as caught:
        load_corpus("hub:absent/set")
    assert "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'bitwright\[data\]'"):
        load_corpus("hub:owner/name")
