"""How the command line is run in tests: in this process, with what it printed and how it ended."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.cli.app import main

Refuse = Callable[..., str]


class Cli:
    """Runs one command in this process and reports how it ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self._capsys.readouterr()
        return int(stop.value.code or 0), out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


@pytest.fixture
def refuse(cli: Cli, tmp_path: Path) -> Refuse:
    """Run a command that must fail; check its one line, and that the whole folder is as it was."""

    def run(*arguments: object, code: int = 2, says: tuple[str, ...] = ()) -> str:
        before = snapshot(tmp_path)
        status, out, err = cli(*arguments)
        assert status == code, err
        assert out == ""
        assert err.startswith("bitwright: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        for words in says:
            assert words in err
        assert snapshot(tmp_path) == before, "something was left behind or changed"
        return err

    return run


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text)
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
