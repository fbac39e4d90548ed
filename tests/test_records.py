import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from bitwright.errors import ResourceError, RunError, VerificationError
from bitwright.records import (
    Environment,
    Measurement,
    append_jsonl,
    read_jsonl,
    write_json_atomic,
    write_text_atomic,
)

FULL = Measurement(
    name="perplexity",
    value=6.24,
    unit="1",
    n=4096,
    ci=(6.1, 6.4),
    seed=0,
    device="cpu",
    model_hash="ab",
    data_hash="cd",
    details={"seqlen": 512, "scheme": "W4A16-g128"},
)


@pytest.mark.parametrize("measurement", [FULL, Measurement(name="kl", value=0, unit="nats/token")])
def test_a_measurement_survives_json(measurement: Measurement) -> None:
    assert Measurement.from_mapping(json.loads(json.dumps(measurement.to_mapping()))) == measurement


def test_unset_entries_are_not_written_but_zeros_are() -> None:
    assert Measurement(name="kl", value=0.0, unit="1", seed=0).to_mapping() == {
        "name": "kl", "value": 0.0, "unit": "1", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_result(value: float) -> None:
    with pytest.raises(VerificationError, match=r"perplexity is .*: a record must be finite"):
        Measurement(name="perplexity", value=value, unit="1")
    with pytest.raises(VerificationError):
        Measurement(name="perplexity", value=1.0, unit="1", ci=(0.0, value))


def test_foreign_data_is_not_a_measurement() -> None:
    with pytest.raises(RunError, match=r"unknown \['mean'\], missing \['unit'\]"):
        Measurement.from_mapping({"name": "a", "value": 1.0, "mean": 2})


def test_the_environment_names_machine_and_versions() -> None:
    environment = Environment.capture()
    assert environment.python == platform.python_version()
    assert environment.versions["torch"] == version("torch")
    assert environment.versions["bitwright"] == version("bitwright")
    assert 1 <= environment.num_cores <= (os.cpu_count() or 1)
    assert environment.cpu
    assert json.loads(json.dumps(environment.to_mapping())) == environment.to_mapping()


def test_records_are_appended_in_order_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "5-records.jsonl"
    entries = [{"name": "ü\n", "value": 1}, {"name": "b", "nested": {"x": [1, 2]}}]
    for entry in entries:
        append_jsonl(path, entry)
    assert read_jsonl(path) == entries
    assert path.read_bytes().count(b"\n") == 2


def test_a_line_torn_by_a_crash_is_left_out_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_jsonl(path, {"n": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"n": 2, "na')
    assert read_jsonl(path) == [{"n": 1}]
    append_jsonl(path, {"n": 3})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}]
    assert path.read_bytes().startswith(whole)
    path.write_bytes(b'{"n"')
    append_jsonl(path, {"n": 4})
    assert read_jsonl(path) == [{"n": 4}]


def test_a_damaged_line_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(RunError, match=r"records.jsonl:2: not a JSON record"):
        read_jsonl(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(RunError, match=r"records.jsonl:1: not a JSON record"):
        read_jsonl(path)
    with pytest.raises(RunError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_several_records_are_one_write(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_jsonl(path, {"n": 1}, {"n": 2})
    append_jsonl(path, *[{"n": n} for n in (3, 4)])
    assert [record["n"] for record in read_jsonl(path)] == [1, 2, 3, 4]


def test_numbers_that_json_lacks_are_written_as_text(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": {"d": float("inf")}}
    written = {"a": "nan", "b": ["inf", [1.5, "-inf"]], "c": {"d": "inf"}}
    append_jsonl(tmp_path / "a.jsonl", value)
    write_json_atomic(tmp_path / "a.json", value)
    assert read_jsonl(tmp_path / "a.jsonl") == [written]
    assert json.loads((tmp_path / "a.json").read_text()) == written


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "one\r\n")
    write_text_atomic(path, "zwei ü\n")
    assert path.read_bytes() == "zwei ü\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_two_ranks_may_replace_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes all of its own between the first's last byte and its rename."""
    path, replace, others = tmp_path / "result.json", Path.replace, iter(["1"])

    def interrupted(self: Path, target: Path) -> Path:
        for rank in others:
            monkeypatch.setenv("RANK", rank)
            write_text_atomic(path, "theirs")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    write_text_atomic(path, "ours")
    assert path.read_text() == "ours"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ResourceError, match=r"a.txt: cannot be written \(No space left on device\). Free disk space"):
        write_text_atomic(path, "new")
    with pytest.raises(ResourceError, match="No space left"):
        append_jsonl(tmp_path / "b.jsonl", {"n": 1})
    assert path.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_missing_or_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent" / "a.json", tmp_path / "file" / "a.json"):
        with pytest.raises(ResourceError, match="cannot be written"):
            write_json_atomic(path, {})
        with pytest.raises(ResourceError, match="cannot be written"):
            append_jsonl(path, {})


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"version": "old"})
    program = (
        "import os, sys; from pathlib import Path; from bitwright import records\n"
        "os.fsync = lambda descriptor: os._exit(9)\n"
        "records.write_json_atomic(Path(sys.argv[1]), {'version': 'new'})\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    assert json.loads(path.read_text()) == {"version": "old"}
    write_json_atomic(path, {"version": "newer"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
