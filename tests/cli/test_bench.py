"""`bitwright bench` on the command line: lists, JSON, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright import bench
from bitwright.bench_worker import measure
from bitwright.progress import Progress

Cli = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]
SMALL = ("--samples", "4", "--seqlen", "64", "--windows", "2")


@pytest.fixture
def heldout(tmp_path: Path, text: Path) -> Path:
    """The second half of the text, which is taken out of the first file."""
    lines = text.read_text().splitlines()
    text.write_text("\n".join(lines[: len(lines) // 2]))
    file = tmp_path / "heldout.txt"
    file.write_text("\n".join(lines[len(lines) // 2 :]))
    return file


def test_unknown_names_end_in_one_line(refuse: Refuse, tiny_llama_dir: Path, text: Path, out: Path) -> None:
    usual = ("bench", tiny_llama_dir, "--calibration", text, "--text", text, "--out", out)
    refuse(*usual, "--schemes", "W4A16-g32", "--methods", "rtn,gtpq", says=("gtpq", "Did you mean 'gptq'"))
    refuse(*usual, "--schemes", "W4A16-g32,W4Q16", "--methods", "rtn", says=("W4Q16",))
    refuse(*usual, "--schemes", "W4A16-g32", "--methods", "lnq", says=("all 1 cells are refused", "kmeans"))
    refuse(*usual, "--schemes", ",", "--methods", "rtn", says=("at least one scheme",))
    refuse(*usual, "--schemes", "W4A16-g32", "--methods", "none.yaml", says=("none.yaml",))


def test_lists_and_repeated_options_make_one_grid(
    cli: Cli, tiny_llama_dir: Path, text: Path, heldout: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "launch_worker", measure)
    command = ("bench", tiny_llama_dir, "--calibration", text, "--text", heldout, "--out", out, *SMALL)
    grid = ("--schemes", "W4A16-g32,W3A16-g32", "--schemes", "W8A16-channel", "--methods", "rtn, rtn")
    status, printed, err = cli(*command, *grid, "--json")
    assert status == 0, err
    records = json.loads(printed)
    assert [record["scheme"] for record in records[1:]] == ["W3A16-g32", "W4A16-g32", "W8A16-channel"]
    status, printed, _ = cli(*command, *grid)
    assert status == 0
    assert "0 cells measured now, 3 before" in printed
    assert "bench.html" in printed

    def crash(record: Path, progress: Progress) -> str:
        return "its process was killed by SIGKILL"

    monkeypatch.setattr(bench, "launch_worker", crash)
    status, _, err = cli(*command, "--schemes", "W4A16-channel", "--methods", "rtn", "--quiet")
    assert status == 1
    assert (
        err
        == f"bitwright: {out}: 1 cells have no figures; w4a16-channel--rtn crashed: its process was killed by SIGKILL\n"
    )
