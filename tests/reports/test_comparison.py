"""Several runs side by side: figures on one text where there is one, ranked in words, as charts and as JSON."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import RunError
from bitwright.reports.comparison import compare_runs, verdict


def write_runs(example: Any, **second: Any) -> list[Path]:
    """Two runs that differ in size and loss; the arguments replace results of the second."""
    runs: list[Path] = []
    for name, changes in (("large", {}), ("small", {"size_bytes": 1_500_000, "kl_mean": 0.3, **second})):
        example.path = example.path.parent / name
        results = {**example.results, **changes}
        records = [{"kind": "quantize", **results}, *[r for r in example.everything() if r["kind"] != "quantize"]]
        runs.append(example.write(results=results, records=records))
    return runs


def data_of(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def json_of(page: Path) -> Any:
    found = re.search(r"<pre[^>]*>(.*?)</pre>", page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1]))


def test_every_chart_has_every_run_and_every_run_its_report(example: Any, tmp_path: Path) -> None:
    runs = write_runs(example)
    page = compare_runs(runs, tmp_path / "pages.html")
    drawn = data_of(page)["charts"]
    assert set(drawn) == {"pareto", "size", "time", "speed", "memory", "energy"}
    for chart in drawn.values():
        assert len(chart["data"][1]["x"]) == 2
    assert drawn["speed"]["data"][1]["x"] == [21.5, 21.5]
    assert drawn["speed"]["data"][1]["error_x"]["array"] == [1.0, 1.0]
    assert drawn["energy"]["data"][1]["x"] == [0.75, 0.75]
    assert drawn["size"]["data"][1]["error_x"]["array"] == [0.0, 0.0]
    assert [row["decode_ratio"] for row in json_of(page)["results"]] == [0.5, 0.5]
    assert "21.5 (0.500)" in page.read_text()
    for run in runs:
        assert (run / "7-report.html").is_file()
        assert f'href="{run.name}/7-report.html"' in page.read_text()


def test_loss_is_that_on_the_text_all_were_evaluated_on(example: Any, tmp_path: Path) -> None:
    page = compare_runs(write_runs(example), tmp_path / "pages.html")
    figures = json_of(page)["results"]
    assert [row["kl_mean"] for row in figures] == [0.0837, 0.0837]
    assert "heldout.txt, 40 windows" in page.read_text()


def test_without_a_shared_text_the_gates_are_compared_and_the_page_says_so(example: Any, tmp_path: Path) -> None:
    runs = write_runs(example)
    records = (runs[0] / "5-records.jsonl").read_text().replace("heldout.txt", "other.txt")
    (runs[0] / "5-records.jsonl").write_text(records)
    page = compare_runs(runs, tmp_path / "pages.html")
    assert [row["kl_mean"] for row in json_of(page)["results"]] == [0.0521, 0.3]
    assert "on the short gate text of each run" in page.read_text()


def test_a_figure_that_no_run_has_is_said_to_be_missing(example: Any, tmp_path: Path) -> None:
    page = compare_runs([example.write()], tmp_path / "pages.html")
    assert set(data_of(page)["charts"]) == {"pareto", "size", "time"}
    assert "No result recorded how fast it generates (bitwright speed)." in page.read_text()


def test_verdict_ranks_and_names_what_is_beaten() -> None:
    row = {"kl_stderr": None, "failure": None}
    rows = [
        {**row, "name": "a", "kl_mean": 0.1, "size_bytes": 3e6},
        {**row, "name": "b", "kl_mean": 0.2, "size_bytes": 2e6},
        {**row, "name": "c", "kl_mean": 0.2, "size_bytes": 3e6, "failure": "too much"},
        {**row, "name": "reference", "kl_mean": 0.0, "size_bytes": 9e6},
    ]
    words = " ".join(verdict(rows))
    assert "a loses least" in words
    assert "b is smallest" in words
    assert "Beaten by another in both size and loss: c." in words
    assert "Failed the gate: c." in words


def test_runs_of_one_name_are_told_by_their_paths_and_one_run_twice_is_refused(example: Any, tmp_path: Path) -> None:
    run = example.write()
    with pytest.raises(RunError, match="given twice"):
        compare_runs([run, run], tmp_path / "pages.html")
    example.path = tmp_path / "other" / run.name
    example.path.parent.mkdir()
    page = compare_runs([run, example.write()], tmp_path / "pages.html")
    assert len({row["name"] for row in json_of(page)["results"]}) == 2
