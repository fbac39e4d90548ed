import html
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from bitwright.errors import ResourceError, RunError
from bitwright.reports.comparison import write_comparison
from bitwright.reports.page import NUM_JSON_SITES, write_report

NUM_SCRIPTS = 4  # data, the page's own, plotly, and the call that draws
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
ROW = {
    "name": "4-bit GPTQ",
    "bits_per_weight": 4.125,
    "size_bytes": 2_000_000,
    "perplexity": 3.238,
    "perplexity_stderr": 0.05,
    "kl_mean": 0.038,
    "kl_stderr": 0.0019,
    "same_top1": 0.981,
    "seconds": 14.0,
    "report": "w4 gptq/7-report.html",
}
REFERENCE = {**ROW, "name": "reference", "kl_mean": 0.0, "kl_stderr": 0.0, "same_top1": 1.0, "report": None}


class Page(HTMLParser):
    """A page as a browser sees it: tags with their attributes, the text people read, and the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def test_page_holds_the_figures(example: Any) -> None:
    run = example.write()
    out = write_report(run)
    assert out == run / "7-report.html"
    text = Page(out).text
    for figure in (
        "tiny-llama in W4A16-g128 by gptq", "Passed the gate", "4.137", "11.0 MB → 2.75 MB", "4.00 times smaller",
        "0.0521 ± 0.0043", "0.731", "1.62", "89.1 %", "6.033 → 6.575", "+9.0 %", "95.0 s", "574 MB",
        "KL divergence at most 0.5 nats per token", "notes.txt: 32 windows of 256 tokens, seed 7", "ab12" * 16,
        "cd34" * 16, "bfloat16", "Example CPU", "2.13.0",
        "heldout.txt", "20 440", "10.88 ± 0.45", "0.0837 ± 0.0065", "76.3 %",
        "compressed-tensors", "transformers", "0.000160",
        "The largest loss in one step after the first block is 5.5 dB, at model.layers.1.",
        "ignored by pattern '*.gate'", "model.layers.1.gate",
        "rule '*.down_proj'", "no calibration token reached this expert",
    ):  # fmt: skip
        assert figure in text, figure


def test_worst_sites_are_named_worst_first(example: Any) -> None:
    text = Page(write_report(example.write())).text
    assert "The 3 sites with the largest error of the output" in text
    first = text.index("model.layers.1.q_proj: output 11.8 dB (error energy 6.7 %)")
    second = text.index("model.layers.0.q_proj: output 23.5 dB")
    third = text.index("model.layers.0.down_proj: output 40.3 dB")
    assert first < second < third


def test_without_output_figures_the_weights_rank(example: Any) -> None:
    records = [example.block("b"), example.site("b.x", block="b", output_sqnr_db=None, weight_sqnr_db=18.25)]
    page = Page(write_report(example.write(records=records)))
    assert "b.x: weights 18.2 dB" in page.text
    assert set(page.data["charts"]) == {"depth", "time", "sites"}
    assert page.data["charts"]["sites"]["data"][0]["y"] == [18.25]


def test_site_table_and_chart_carry_every_figure(example: Any) -> None:
    data = Page(write_report(example.write())).data
    columns = data["sites"]
    row = columns["site"].index("model.layers.1.experts[3]")
    assert columns["output_sqnr_db"][row] is None
    assert columns["weight_sqnr_db"][row] == 20.5
    assert columns["saturated"][row] == 0.061
    assert columns["num_tokens"][row] == 0
    assert columns["method"]["words"][columns["method"]["of"][row]] == "rtn"
    assert columns["reason"]["words"][columns["reason"]["of"][row]].startswith("no calibration token")
    by_role = {trace["name"]: trace for trace in data["charts"]["sites"]["data"]}
    assert by_role["q_proj"]["x"] == [0, 1]
    assert by_role["q_proj"]["y"] == [23.5, 11.75]
    assert "experts" not in by_role


def test_experts_are_drawn_by_their_worst(example: Any) -> None:
    experts = [example.site(f"b.experts.up[{i}]", block="b", output_sqnr_db=30.0 - i) for i in range(8)]
    (trace,) = Page(write_report(example.write(records=[example.block("b"), *experts]))).data["charts"]["sites"]["data"]
    assert trace["name"] == "up"
    assert trace["y"] == [23.0]
    assert "b.experts.up[7]" in trace["hovertext"][0]
    assert "worst of 8" in trace["hovertext"][0]


def test_failed_gate_is_said_first(example: Any) -> None:
    results = {**example.results, "kl_mean": 3.1}
    records = [{"kind": "quantize", **results}, *[r for r in example.records() if r["kind"] != "quantize"]]
    text = Page(
        write_report(example.write(failure="KL divergence 3.1 is above 0.5.", results=results, records=records))
    ).text
    assert "Failed the gate" in text
    assert "KL divergence 3.1 is above 0.5." in text
    assert "Passed the gate" not in text
    assert "fits together" not in text


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"results": {"num_quantized": 5}}, "run.json counts 5 quantized sites, the records hold 4."),
        ({"results": {"num_kept": 0}}, "run.json counts 0 kept sites, the records hold 1."),
        ({"results": {"perplexity": 6.1}}, "The headline figures in run.json and in the records differ."),
        ({"recipe": {"max_kl": 0.01}}, "counts as passed, though its KL divergence is not under the recipe"),
        ({"results": {"kl_mean": "nan"}}, "counts as passed, though its KL divergence is not under the recipe"),
    ],
)
def test_a_run_that_does_not_fit_together_says_so(example: Any, changes: dict[str, Any], doubt: str) -> None:
    merged = {name: {**getattr(example, name), **change} for name, change in changes.items()}
    text = Page(write_report(example.write(**merged))).text
    assert "Not everything here fits together" in text
    assert doubt in text


def test_a_run_without_recorded_figures_says_so(example: Any) -> None:
    assert "The records hold no headline figures" in Page(write_report(example.write(records=[example.context]))).text


def test_a_sound_run_raises_no_doubt(example: Any) -> None:
    assert "fits together" not in Page(write_report(example.write())).text


def test_markup_in_names_stays_text(example: Any) -> None:
    hostile = [
        {"kind": "quantize", **example.results},
        example.block(ATTACK),
        example.site(ATTACK, block=ATTACK, scheme=ATTACK, method=ATTACK, reason=ATTACK),
        {"kind": "kept", "site": ATTACK, "reason": ATTACK},
        {"kind": "evaluate", "text": ATTACK, "reference": ATTACK},
        {"kind": "export", "to": ATTACK, "out": ATTACK, "engine": ATTACK},
        {"kind": "context", "device": ATTACK, "environment": {ATTACK: ATTACK, "versions": {ATTACK: ATTACK}}},
    ]
    recipe = {**example.recipe, "scheme": ATTACK, "method": ATTACK, "calibration": {"text": ATTACK}, ATTACK: [ATTACK]}
    page = Page(write_report(example.write(records=hostile, recipe=recipe, failure=ATTACK)))
    assert [tag for tag, _ in page.tags].count("script") == NUM_SCRIPTS
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.data["sites"]["site"] == [ATTACK]
    assert ATTACK in page.text
    # Plotly reads some tags in labels, so there the name's own are entities.
    assert "&lt;/script&gt;" in page.data["charts"]["depth"]["data"][0]["hovertext"][0]
    assert "<script" not in json.dumps(page.data["charts"])


@pytest.mark.slow
def test_the_pages_of_the_demo_are_small_and_have_data_for_every_chart(demo_pages: tuple[Path, Path]) -> None:
    for path in demo_pages:
        assert path.stat().st_size < 8_000_000
        page = Page(path)
        names = [attributes["data-chart"] for _, attributes in page.tags if "data-chart" in attributes]
        assert names
        for name in names:
            traces = page.data["charts"][name]["data"]
            assert any(value is not None for trace in traces for value in trace["y"]), name


def check_fetches_nothing(path: Path) -> None:
    page = Page(path)
    policies = [a for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policies[0]["content"] or "")
    for tag, attributes in page.tags:
        assert "src" not in attributes, (tag, attributes)
        target = attributes.get("href") or ""
        assert not re.match(r"(\w+:)?//|(?!data:)\w+:", target), (tag, target)
    own = path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert not re.search(r"@import|url\(|https?://", own)


def test_pages_fetch_nothing(example: Any, tmp_path: Path) -> None:
    check_fetches_nothing(write_report(example.write()))
    check_fetches_nothing(write_comparison([REFERENCE, ROW], tmp_path / "demo.html", title="demo", notes=[]))


def test_plotly_is_inlined_once(example: Any) -> None:
    assert write_report(example.write()).read_text(encoding="utf-8").count(get_plotlyjs()) == 1


def test_figures_that_are_missing_or_not_finite_do_not_stop_the_report(example: Any) -> None:
    nothing = dict.fromkeys(example.results)
    empty_site = {"kind": "site", "site": "b.x", "block": "b", "weight_sqnr_db": None, "bits_per_weight": "inf"}
    records = [
        {"kind": "block", "block": "b"},
        empty_site,
        {"kind": "evaluate", "perplexity": "nan"},
        {"kind": "export"},
    ]
    text = Page(write_report(example.write(results=nothing, records=records, recipe={}, failure="nan"))).text
    assert "not a number" in text
    assert "not verified" in text
    assert "None" not in text.replace("None yet", "")


def test_a_run_with_results_only_still_reports(example: Any) -> None:
    text = Page(write_report(example.write(records=[]))).text
    for sentence in ("No site was recorded.", "None yet.", "No times were recorded.", "Not recorded."):
        assert sentence in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", '{"fingerprint": "f", "complete": false}', "not finished"),
        ("run.json", '{"fingerprint": "f", "complete": true}', "results: missing"),
        ("run.json", "{", "not readable as JSON"),
        ("5-records.jsonl", '{"kind": "site", "saturated": "much"}\n', "'site' record 1: saturated is 'much', not a"),
        ("5-records.jsonl", '{"kind": "block", "seconds": true}\n', "seconds is True, not a number"),
        ("5-records.jsonl", "nonsense\n", "5-records.jsonl:1: not a JSON record"),
    ],
)  # fmt: skip
def test_damaged_runs_are_refused_in_one_line(example: Any, name: str, content: str, message: str) -> None:
    run = example.write()
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(RunError) as error:
        write_report(run)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (run / "7-report.html").exists()


def test_no_run_and_no_records_are_refused(example: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
    run = example.write()
    (run / "5-records.jsonl").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        write_report(run)


def test_page_is_the_same_bytes_each_time_and_replaced_whole(example: Any) -> None:
    run = example.write()
    first = write_report(run, run / "a.html").read_bytes()
    assert write_report(run, run / "a.html").read_bytes() == first
    (run / "5-records.jsonl").write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(RunError):
        write_report(run, run / "a.html")
    assert (run / "a.html").read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == ["5-records.jsonl", "a.html", "run.json"]


def test_a_place_that_cannot_be_written_is_refused(example: Any) -> None:
    run = example.write()
    with pytest.raises(ResourceError, match=r"no-folder/report\.html"):
        write_report(run, run / "no-folder" / "report.html")


def test_half_a_surrogate_pair_does_not_stop_the_report(example: Any) -> None:
    assert "b.?" in Page(write_report(example.write(records=[{"kind": "kept", "site": "b.\ud800", "reason": ""}]))).text


def json_of(page: Path) -> Any:
    """What the page offers to copy and to download."""
    found = re.search(r"<pre[^>]*>(.*?)</pre>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1]))


def test_the_json_has_the_figures_of_every_block_and_site(example: Any) -> None:
    found = json_of(write_report(example.write()))
    assert [block["hidden_sqnr_db"] for block in found["blocks"]] == [19.7, 14.2]
    assert [site["output_sqnr_db"] for site in found["sites"]] == [23.5, 40.26, 11.75, None]
    assert found["sites"][1]["reason"] == "rule '*.down_proj'"
    assert found["num_sites_left_out"] == 0


def test_ten_thousand_sites_stay_small_and_fast(example: Any) -> None:
    records: list[dict[str, Any]] = [{"kind": "quantize", **example.results}]
    for index in range(50):
        name = f"model.layers.{index}"
        records.append(example.block(name))
        for i in range(200):
            reason = "recipe; group_size 43 in place of 32, which does not divide in_features 172"
            sqnr = 20 + (index * 37 + i * 11) % 97 / 10
            expert = f"{name}.mlp.experts.gate_up_proj[{i}]"
            records.append(
                example.site(expert, block=name, output_sqnr_db=sqnr, weight_sqnr_db=sqnr + 1, reason=reason)
            )
    run = example.write(records=records)
    start = time.perf_counter()
    out = write_report(run)
    assert time.perf_counter() - start < 10  # takes one; a quadratic step would take minutes
    assert out.stat().st_size - len(get_plotlyjs().encode()) < 3_000_000
    assert len(Page(out).data["sites"]["site"]) == 10_000
    found = json_of(out)
    assert (len(found["sites"]), found["num_sites_left_out"]) == (NUM_JSON_SITES, 10_000 - NUM_JSON_SITES)
    assert max(site["output_sqnr_db"] for site in found["sites"]) < 22


def test_comparison_shows_rows_and_links(tmp_path: Path) -> None:
    notes = ["Calibrated on <b>nothing</b>."]
    out = write_comparison([REFERENCE, ROW], tmp_path / "demo.html", title="A & B", notes=notes)
    page = Page(out)
    for figure in ("A & B", "4-bit GPTQ", "4.125", "2.00 MB", "3.238 ± 0.050", "0.0380 ± 0.0019", "98.1 %", "14.0 s"):
        assert figure in page.text
    assert notes[0] in page.text
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["#content", "w4%20gptq/7-report.html"]
    frontier, points = page.data["charts"]["pareto"]["data"]
    assert points["x"] == [4.125]
    assert points["y"] == [0.038]
    assert frontier["x"] == [4.125]


def test_pareto_line_joins_what_nothing_beats(tmp_path: Path) -> None:
    figures = [(8.1, 0.0002), (4.125, 0.061), (4.125, 0.038), (4.5, 0.05), (3.125, 0.21)]
    rows = [{**ROW, "bits_per_weight": bits, "kl_mean": kl, "kl_stderr": 2 * kl} for bits, kl in figures]
    frontier, points = Page(write_comparison(rows, tmp_path / "p.html", title="", notes=[])).data["charts"]["pareto"][
        "data"
    ]
    assert list(zip(frontier["x"], frontier["y"], strict=True)) == [(3.125, 0.21), (4.125, 0.038), (8.1, 0.0002)]
    lowest = [y - down for y, down in zip(points["y"], points["error_y"]["arrayminus"], strict=True)]
    assert min(lowest) > 0


def test_comparison_survives_absent_figures_and_hostile_links(tmp_path: Path) -> None:
    absent = {**dict.fromkeys(ROW), "name": ATTACK, "report": "javascript:alert(1)"}
    page = Page(write_comparison([absent], tmp_path / "p.html", title=ATTACK, notes=[ATTACK]))
    assert [tag for tag, _ in page.tags].count("script") == NUM_SCRIPTS
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["#content", "javascript%3Aalert%281%29"]
    assert page.data["charts"]["pareto"]["data"][1]["x"] == []


def test_importing_the_report_needs_no_torch() -> None:
    program = (
        "import sys, bitwright.reports.page\n"
        "print(sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
