"""Speed, memory and energy in the report: what was measured is told, what was not is said to be absent, never zero."""

from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import RunError
from bitwright.reports.comparison import compare_runs, verdict
from bitwright.reports.facts import read_facts
from bitwright.reports.outlook import next_steps
from bitwright.reports.page import write_report
from bitwright.reports.speed import ROWS, Speeds, cell, change, sentences

ENERGY = next(row for row in ROWS if row.name == "decode_j_per_token")
DECODE = next(row for row in ROWS if row.name == "decode_tokens_per_s")


def speeds_of(example: Any, *records: dict[str, Any]) -> Speeds:
    return read_facts(example.write(records=[*example.records(), *records])).findings.speeds


def test_the_page_sets_both_models_side_by_side(example: Any) -> None:
    page = write_report(example.write(records=example.everything())).read_text()
    section = page[page.index('<section id="speed">') :]
    section = section[: section.index("</section>")]
    for words in (
        "43.0 (42.0 to 44.0)",
        "21.5 (20.5 to 22.5)",
        "0.500 times",
        "2.80\u00a0MB",
        "0.750 J",
        "rapl:package-0",
    ):
        assert words in section
    assert "writes 21.5 tokens per second with it, 43.0 with the original." in page
    assert "128 tokens of prompt, 64 new ones, batch 1, bfloat16, on cpu with 2 threads" in section


def test_without_a_meter_there_is_no_figure_and_no_zero(example: Any) -> None:
    record = {**example.speed("result", rate=20.0), "energy_note": "this machine shows no energy counter"}
    speeds = speeds_of(example, record)
    assert speeds.result is not None
    assert cell(speeds.result, ENERGY) == "no meter"
    assert change(speeds, ENERGY) == "–"
    assert "The energy of a token was not measured: no meter." in sentences(speeds)
    assert "this machine shows no energy counter" in write_report(example.path).read_text()


def test_of_several_records_the_latest_counts_and_originals_only_under_the_same_circumstances(example: Any) -> None:
    old, new = example.speed("result", rate=10.0), example.speed("result", rate=20.0)
    original = example.speed("original", rate=40.0)
    speeds = speeds_of(example, example.speed("original", rate=80.0), old, original, new)
    assert speeds.ratio("decode_tokens_per_s") == 0.5
    for measurement in original["measurements"]:
        measurement["details"]["num_threads"] = 16
    example.path = example.path.with_name("other")
    speeds = speeds_of(example, original, new)
    assert speeds.original is None
    assert change(speeds, DECODE) == "–"


@pytest.mark.parametrize(("spread", "says"), [(1.0, False), (6.0, True)])
def test_rates_whose_repetitions_overlap_may_be_equal(example: Any, spread: float, says: bool) -> None:
    rates = {"original": 30.0, "result": 20.0}
    speeds = speeds_of(example, *(example.speed(of, rate=rate, spread=spread) for of, rate in rates.items()))
    assert ("may be chance" in sentences(speeds)[0]) == says


@pytest.mark.parametrize(("held", "says"), [(2_800_000, False), (11_000_000, True)])
def test_weights_that_transformers_unpacks_are_told(example: Any, held: int, says: bool) -> None:
    original = example.speed("original", rate=30.0, weight_bytes=11_000_000)
    speeds = speeds_of(example, original, example.speed("result", rate=20.0, weight_bytes=held))
    assert ("unpacks this layout" in sentences(speeds)[1]) == says


def test_a_run_without_speeds_is_told_how_to_measure_them(example: Any) -> None:
    facts = read_facts(example.write())
    assert sentences(facts.findings.speeds) == []
    assert any(step.command.startswith("bitwright speed ") for step in next_steps(facts))
    assert 'id="speed"' not in write_report(example.path).read_text()
    example.path = example.path.with_name("measured")
    measured = read_facts(example.write(records=example.everything()))
    assert not any("bitwright speed" in step.command for step in next_steps(measured))


def test_a_damaged_measurement_is_refused_in_one_line(example: Any) -> None:
    record = example.speed("result", rate=20.0)
    record["measurements"][0]["value"] = "fast"
    with pytest.raises(RunError, match="'speed' record 1: decode_tokens_per_s: value is 'fast', not a number"):
        speeds_of(example, record)


def test_a_comparison_names_the_fastest_and_says_when_speeds_do_not_compare(example: Any, tmp_path: Path) -> None:
    row = {"kl_stderr": None, "failure": None, "kl_mean": 0.1, "size_bytes": 1e6}
    rows = [
        {**row, "name": "a", "decode_tokens_per_s": 20.0, "decode_j_per_token": 0.5},
        {**row, "name": "b", "decode_tokens_per_s": 30.0, "decode_j_per_token": 0.9},
    ]
    words = " ".join(verdict(rows))
    assert "b writes fastest: 30.0 tokens/s." in words
    assert "a takes the least energy: 0.500 J per token." in words
    spread = {"a": {"decode_fastest": 25.0}, "b": {"decode_slowest": 24.0}}
    words = " ".join(verdict([row | spread[str(row["name"])] for row in rows]))
    assert "30.0 tokens/s; the repetitions of a overlap with its own." in words
    assert "fastest" not in " ".join(verdict([row | {"measured_with": row["name"]} for row in rows]))
    runs: list[Path] = []
    for name, threads in (("one", 2), ("two", 4)):
        example.path = tmp_path / name
        record = example.speed("result", rate=20.0)
        for measurement in record["measurements"]:
            measurement["details"]["num_threads"] = threads
        runs.append(example.write(records=[*example.records(), record]))
    assert "These were measured differently and do not compare." in compare_runs(runs, tmp_path / "p.html").read_text()
