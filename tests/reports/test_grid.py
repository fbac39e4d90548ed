"""The table and the page of a grid say what its records say, and nothing that they do not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitwright.reports.bench_page import bench_markdown, row_words, write_bench_page
from bitwright.reports.grid import grid_rows, paired_difference

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
FIGURES = {
    "bits_per_weight": 4.125, "size_bytes": 2_000_000, "perplexity": 3.238, "perplexity_stderr": 0.05, "kl_mean": 0.03,
    "kl_stderr": 0.002, "kl_p99": 0.4, "same_top1": 0.981, "seconds": 14.0, "peak_memory_bytes": 573_775_872,
    "window_kl": [0.02, 0.03, 0.04], "num_windows": 3,
}  # fmt: skip
ASKED = {
    "model": "models/tiny", "model_hash": "ab" * 32, "text": "heldout.txt", "text_hash": "cd" * 32, "context": 512,
    "device": "cpu", "dtype": "float32", "calibration_hash": "ef" * 32,
    "recipe": {"calibration": {"text": "notes.txt", "num_samples": 8, "seqlen": 256, "seed": 7}},
}  # fmt: skip
MACHINE = {
    "environment": {"cpu": "Example CPU", "versions": {"torch": "2.13.0"}}, "threads": 2,
    "date": "2026-11-20T10:00:00+00:00",
}  # fmt: skip


def cell(scheme: str, method: str, **figures: Any) -> dict[str, Any]:
    return {
        "kind": "cell", "slug": f"{scheme}--{method}", "scheme": scheme, "method": method, "status": "done",
        "reason": None, "asked": ASKED, "machine": MACHINE, "figures": {**FIGURES, **figures},
    }  # fmt: skip


def refused(scheme: str, method: str, reason: str) -> dict[str, Any]:
    return {**cell(scheme, method), "status": "refused", "reason": reason, "machine": None, "figures": {}}


REFERENCE = {**cell("", ""), "kind": "reference", "figures": {"perplexity": 3.0, "num_windows": 3}}
RECORDS = [
    REFERENCE,
    cell("W4A16-g128", "rtn"),
    cell("W4A16-g128", "gptq", kl_mean=0.02, window_kl=[0.011, 0.02, 0.029]),
    refused("W4A16-g128", "lnq", "it learns tables"),
    cell("W3A16-g128", "rtn", bits_per_weight=3.125, kl_mean=0.1, window_kl=[0.1, 0.1, 0.1]),
]


def charts(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])["charts"]


def test_rows_are_ordered_per_scheme_and_stand_beside_the_best() -> None:
    rows = grid_rows(RECORDS)
    names = [(row.scheme, row.method) for row in rows]
    assert names == [("W3A16-g128", "rtn"), *(("W4A16-g128", method) for method in ("gptq", "rtn", "lnq"))]
    assert [row.best for row in rows] == [True, True, False, False]
    assert rows[2].behind is not None
    assert rows[2].behind[0] == pytest.approx(0.01)
    assert rows[3].behind is None


def test_paired_difference_forgets_what_windows_share() -> None:
    mean, stderr = paired_difference([1.0, 5.0, 9.0], [0.9, 4.9, 8.9])
    assert mean == pytest.approx(0.1)
    assert stderr == pytest.approx(0.0, abs=1e-12)
    mean, stderr = paired_difference([1.0, 3.0], [1.0, 1.0])
    assert (mean, stderr) == (1.0, 1.0)
    assert paired_difference([2.0], [1.0]) == (1.0, None)


def test_markdown_has_the_best_in_bold_and_the_reason_of_a_refusal() -> None:
    table = bench_markdown(RECORDS)
    assert re.search(r"\| \*\*gptq\*\* \| \*\*4\.125\*\* .*\*\*best\*\*", table)
    assert re.search(r"\n\| rtn \| 4\.125 .* \d+\.\d SE \|", table)
    assert "| lnq | – | – | refused |" in table
    assert "- lnq, refused: it learns tables" in table
    assert table.index("W3A16-g128") < table.index("W4A16-g128")
    assert "notes.txt, 8 windows of 256 tokens, seed 7" in table
    assert "heldout.txt, 3 windows of 512 tokens" in table


def test_page_draws_every_method_and_the_frontier(tmp_path: Path) -> None:
    page = write_bench_page(RECORDS, tmp_path / "bench.html")
    drawn = charts(page)
    assert set(drawn) == {"kl", "perplexity", "time", "memory"}
    frontier, *methods = drawn["kl"]["data"]
    assert (frontier["x"], frontier["y"]) == ([3.125, 4.125], [0.1, 0.02])
    assert [trace["name"] for trace in methods] == ["gptq", "rtn"]
    assert len({trace["marker"]["color"] for trace in methods}) == 2
    assert drawn["kl"]["layout"]["yaxis"]["type"] == "log"
    assert drawn["perplexity"]["layout"]["shapes"][0]["y0"] == 3.0
    label = methods[0]["hovertext"][0]
    for words in row_words(grid_rows(RECORDS)[1]):
        assert words in label
    text = page.read_text()
    assert text.count("<tr") == 5, "a head and four cells"
    assert "data-sortable" in text
    assert "it learns tables" in text


def test_page_fetches_nothing_and_runs_nothing_from_a_record(tmp_path: Path) -> None:
    hostile = [REFERENCE, cell(ATTACK, ATTACK), refused("W4A16", ATTACK, ATTACK)]
    text = write_bench_page(hostile, tmp_path / "bench.html").read_text()
    own = text.replace(text[text.index('<script id="plotly">') :], "")
    assert "default-src 'none'" in own
    assert not re.search(r"<(img|link[^>]+href=\"(?!data:)|script[^>]+src)", own)
    assert "<script>alert" not in own


def test_figures_that_are_absent_or_not_finite_are_left_out(tmp_path: Path) -> None:
    broken = cell("W2A16-g128", "rtn", kl_mean="nan", perplexity="inf", kl_p99=None, window_kl=["nan"])
    for records in ([broken], [], [refused("W4A16", "lnq", "no")], [REFERENCE, broken, *RECORDS[1:]]):
        assert "inf" not in bench_markdown(records)
        assert charts(write_bench_page(records, tmp_path / "bench.html"))["kl"]["data"][0]["x"] is not None
