"""`bitwright sensitivity`: what it prints and writes, that it resumes, and what it refuses."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bitwright.cli.sensitivity_command import sensitivity
from bitwright.errors import UnknownName

SMALL = ("--samples", "2", "--seqlen", "16", "--schemes", "W2A16-g32,W8A16-channel", "--scores", "fisher,measured")


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command("sensitivity")(sensitivity)
    return made


def test_it_writes_what_it_prints_and_resumes(
    app: typer.Typer, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    command = [str(tiny_llama_dir), "--calibration", str(text), "--out", str(tmp_path / "out"), *SMALL]
    printed = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = json.loads(printed.stdout)
    assert found == json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert set(found["scores"]) == {"fisher", "measured"}
    assert list(found["correlations"]["fisher"]) == ["all", "W2A16-g32", "W8A16-channel"]
    lines = {path: path.read_text() for path in tmp_path.rglob("*.jsonl")}

    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout

    assert {path: path.read_text() for path in tmp_path.rglob("*.jsonl")} == lines
    value = found["scores"]["measured"]["values"]["model.layers.1.mlp.down_proj"]["W2A16-g32"]
    assert f"{value:.2e}" in shown
    assert "rank correlation with measured" in shown


def test_an_unknown_target_is_named(app: typer.Typer, tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    command = [str(tiny_llama_dir), "--calibration", str(text), "--out", str(tmp_path / "out"), "--target", "input"]
    with pytest.raises(UnknownName, match="Did you mean 'inputs'"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
