"""bitwright speed: each model alone in its process, figures as records, and what is refused before any is loaded."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bitwright.cli.quantize_command import quantize as quantize_command
from bitwright.cli.search_command import search
from bitwright.cli.speed_command import speed as command
from bitwright.errors import DataError, RecipeError, ResourceError, RunError, VerificationError
from bitwright.evaluation import generation_speed
from bitwright.evaluation.generation_speed import Rate, Speed, measure_speed
from bitwright.pipeline import quantize
from bitwright.progress import Progress
from bitwright.recipe import Calibration, Recipe
from bitwright.records import Measurement, read_jsonl
from bitwright.reports.facts import read_facts
from bitwright.reports.speed import sentences
from bitwright.runs import model_directory, run_behind
from bitwright.schemes import Scheme
from bitwright.speed_run import UNITS, measure_in_process, run_speed


class Here:
    """Measures in this process, which saves the start of another, and remembers the models."""

    def __init__(self) -> None:
        self.measured: list[Path] = []

    def __call__(self, asked: Mapping[str, Any], progress: Progress) -> Speed:
        arguments = dict(asked)
        self.measured.append(Path(arguments.pop("model_dir")))
        return measure_speed(self.measured[-1], progress=progress, **arguments)


SHORT: dict[str, Any] = {"prompt_tokens": 4, "new_tokens": 3, "repeats": 2}


def run_of(model: Path, folder: Path, text: str, scheme: str) -> Path:
    (folder / "text.txt").write_text(text)
    calibration = Calibration(text=str(folder / "text.txt"), num_samples=2, seqlen=32)
    recipe = Recipe(scheme=Scheme.parse(scheme), method="rtn", calibration=calibration, max_kl=1e6)
    return quantize(model, recipe, folder / "run").run


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tiny_llama_dir, tmp_path_factory.mktemp("packed"), tiny_text, "nf4-b64")


def test_a_run_records_its_original_and_itself(run: Path, tiny_llama_dir: Path) -> None:
    here, steps = Here(), list[tuple[str, int, int]]()
    found = run_speed(run, **SHORT, measure=here, progress=lambda *step: steps.append(step))
    assert here.measured == [tiny_llama_dir, run / "4-model"]
    assert [each.of for each in found] == ["original", "result"]
    assert steps == [(of, done, 3) for of in ("original", "result") for done in (1, 2, 3)]
    records = [record for record in read_jsonl(run / "5-records.jsonl") if record["kind"] == "speed"][-2:]
    for record, each in zip(records, found, strict=True):
        figures = {one["name"]: Measurement.from_mapping(one) for one in record["measurements"]}
        assert set(figures) | {"decode_j_per_token"} == set(UNITS)
        decode = figures["decode_tokens_per_s"]
        assert (decode.value, decode.unit, decode.n) == (each.speed.decode_tokens_per_s.median, "tokens/s", 2)
        assert decode.details["slowest"] <= decode.value <= decode.details["fastest"]
        assert (decode.device, decode.details["num_threads"]) == ("cpu", each.speed.num_threads)
        assert figures["weight_bytes"].n == 1
    assert records[0]["measurements"][0]["model_hash"] != records[1]["measurements"][0]["model_hash"]


def test_the_run_of_trained_codes_stands_for_the_training(tmp_path: Path) -> None:
    inner = tmp_path / "4-quantized"
    (inner / "4-model").mkdir(parents=True)
    for folder in (tmp_path, inner):
        (folder / "run.json").write_text('{"fingerprint": "f", "complete": true}')
    assert model_directory(tmp_path) == model_directory(inner) == inner / "4-model"
    for target in (tmp_path, inner, inner / "4-model"):
        found = run_behind(target)
        assert found is not None
        assert found.path == inner
    assert run_behind(tmp_path / "elsewhere") is None


def test_packed_layers_stay_packed_and_the_report_tells(run: Path) -> None:
    original, result = run_speed(run, **SHORT, measure=Here())
    assert result.speed.weight_bytes < original.speed.weight_bytes
    speeds = read_facts(run).findings.speeds
    assert speeds.ratio("weight_bytes") == result.speed.weight_bytes / original.speed.weight_bytes
    assert not any("unpacks" in sentence for sentence in sentences(speeds))


def test_an_energy_that_no_counter_measured_is_no_record(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_speed, "_energy_per_token", lambda *_: (None, "no counter"))
    (found,) = run_speed(run, alone=True, **SHORT, measure=Here())
    assert found.to_record()["energy_note"] == "no counter"
    assert "decode_j_per_token" not in {each.name for each in found.measurements()}
    monkeypatch.setattr(generation_speed, "_energy_per_token", lambda *_: (0.25, "rapl:package-0"))
    (found,) = run_speed(run, alone=True, **SHORT, measure=Here())
    (energy,) = [each for each in found.measurements() if each.name == "decode_j_per_token"]
    assert (energy.value, energy.unit, energy.n) == (0.25, "J/token", 2)


def test_a_model_has_a_process_of_its_own(tiny_llama_dir: Path) -> None:
    ballast = b"x" * 1_500_000_000
    speed = measure_in_process({"model_dir": str(tiny_llama_dir), **SHORT}, lambda *_: None)
    assert 0 < speed.memory_bytes < speed.process_bytes < len(ballast)
    assert isinstance(speed.decode_tokens_per_s, Rate)


def test_what_a_process_says_as_it_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.speed_run.run_worker", lambda *_: "killed by SIGKILL")
    with pytest.raises(VerificationError, match="its speed could not be measured: killed by SIGKILL"):
        measure_in_process({"model_dir": str(tmp_path)}, lambda *_: None)


def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    run: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here()
    with pytest.raises(DataError, match="128 positions"):
        run_speed(run, prompt_tokens=127, new_tokens=2, measure=here)
    with pytest.raises(DataError, match="cannot be measured"):
        run_speed(run, new_tokens=1, measure=here)
    with pytest.raises(RecipeError, match="contradicts --alone"):
        run_speed(run, original=str(tiny_llama_dir), alone=True, measure=here)
    with pytest.raises(RunError, match="not the model that"):
        run_speed(run, original=str(run / "4-model"), measure=here)
    with pytest.raises(RecipeError, match="--device nowhere"):
        run_speed(run, device="nowhere", measure=here)
    monkeypatch.setattr(generation_speed, "USABLE_MEMORY", 1e-12)
    with pytest.raises(ResourceError, match="holds the whole model in memory"):
        run_speed(run, **SHORT, measure=here)
    assert here.measured == []


def test_a_model_that_transformers_unpacks_needs_the_memory_of_the_dense_one(
    tiny_llama_dir: Path, tiny_text: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    run = run_of(tiny_llama_dir, tmp_path, tiny_text, "W4A16-g32")
    original, result = run_speed(run / "4-model", **SHORT, measure=Here())
    assert result.speed.weight_bytes >= original.speed.weight_bytes
    assert any("unpacks" in sentence for sentence in sentences(read_facts(run).findings.speeds))


def test_the_command_and_the_option_print_the_figures(
    run: Path, tiny_llama_dir: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, Any]] = []

    def fake(arguments: Mapping[str, Any], _: Progress) -> Speed:
        asked.append(arguments)
        rate = Rate(median=20.0, slowest=19.0, fastest=21.0)
        return Speed(
            prompt_tokens=4, new_tokens=3, repeats=2, prefill_tokens_per_s=rate, decode_tokens_per_s=rate,
            load_seconds=1.0, memory_bytes=2, process_bytes=3, weight_bytes=1, decode_j_per_token=None,
            energy_note="no counter here", device="cpu", dtype="float32", num_threads=1,
        )  # fmt: skip

    monkeypatch.setattr("bitwright.speed_run.run_speed", partial(run_speed, measure=fake))
    app = typer.Typer()
    app.command()(command)
    app.command()(quantize_command)
    said = CliRunner().invoke(
        app, ["speed", str(run), "--alone", "--context", "4", "--new-tokens", "3", "--repeat", "2"]
    )
    assert said.exit_code == 0, said.output
    assert "no meter" in said.output
    assert "20.0 (19.0 to 21.0)" in said.output
    assert (asked[0]["prompt_tokens"], asked[0]["new_tokens"], asked[0]["repeats"]) == (4, 3, 2)
    (tmp_path / "text.txt").write_text(tiny_text)
    out = tmp_path / "run"
    arguments = ["quantize", str(tiny_llama_dir), "--scheme", "W8A16-channel", "--max-kl", "100", "--out", str(out)]
    arguments += ["--method", "rtn", "--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--seqlen", "32"]
    said = CliRunner().invoke(app, [*arguments, "--measure-speed"])
    assert said.exit_code == 0, said.output
    assert [(each["prompt_tokens"], each["new_tokens"]) for each in asked[1:]] == [(86, 42)] * 2, "128 positions"
    assert read_facts(out).findings.speeds.original is not None


def test_a_search_without_a_result_has_nothing_to_measure(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(search)
    said = CliRunner().invoke(app, ["m", "--calibration", "t", "--out", str(tmp_path), "--measure-speed"])
    with pytest.raises(RecipeError, match="nothing to run without --apply"):
        raise said.exception or AssertionError(said.output)
