"""What only some runs record: it is shown where it is there, said to be absent where it is not, and checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import RunError
from bitwright.reports.facts import read_facts
from bitwright.reports.findings import GenerationFact
from bitwright.reports.mixes import mix_chart
from bitwright.reports.mixes import summary as summary_of_search
from bitwright.reports.outlook import next_steps, where
from bitwright.reports.page import write_report
from bitwright.reports.site_map import NUM_HISTOGRAMS, site_details, site_map
from bitwright.reports.trials import chosen, summary, trials


def facts_of(example: Any, *, statistics: bool = True) -> Any:
    run = example.write(records=example.everything())
    if statistics:
        example.write_statistics()
    return read_facts(run)


def test_trials_tell_what_was_tried_where_and_what_was_kept(example: Any) -> None:
    found = trials(facts_of(example))
    assert found is not None
    assert found.blocks == ("model.layers.0", "model.layers.1")
    gptq, awq, lnq = found.candidates
    assert (gptq.composition, gptq.errors, gptq.best) == ("gptq", (0.012, 0.022), True)
    assert gptq.mean == pytest.approx(0.017)
    assert (awq.composition, awq.best) == ("awq+gptq", False)
    assert (lnq.composition, lnq.refused, lnq.mean) == ("lnq", "it learns tables", None)
    assert [(row.block, row.change, row.kept) for row in found.refinements] == [
        ("model.layers.0", "rtn in q_proj", True), ("model.layers.1", "rtn in q_proj", False),
    ]  # fmt: skip
    assert [row.before for row in found.refinements] == [0.012, 0.022]
    assert "2 compositions were tried on 2 blocks" in summary(found)
    assert "2 trials, of which 1 lowered the error" in summary(found)


def test_methods_are_shown_by_role_and_block(example: Any) -> None:
    picked = chosen(facts_of(example))
    assert picked.blocks == ("model.layers.0", "model.layers.1")
    assert picked.methods["q_proj"] == ("gptq", "gptq")
    assert picked.methods["experts"] == ("–", "rtn")


def test_page_shows_what_auto_chose_where_and_why(example: Any) -> None:
    run = example.write(records=example.everything())
    text = write_report(run).read_text()
    for words in ("What auto tried, and what it chose", "it learns tables", "auto: gptq with gptq leaves error 0.012"):
        assert words in text
    others = text[text.index('id="changed"') : text.index('id="kept"')]
    assert "rule '*.down_proj'" in others.replace("&#39;", "'")
    assert "auto: gptq" not in others


def test_a_run_without_findings_has_no_empty_sections(example: Any) -> None:
    text = write_report(example.write()).read_text()
    for part in ('id="auto"', 'id="repairs"', 'id="text"', 'id="transforms"', 'id="search"'):
        assert part not in text
    assert "this run saw no calibration text, or kept no statistics" in text


def test_a_search_shows_its_frontier_and_the_mix_that_it_chose(example: Any) -> None:
    found = facts_of(example).findings.search
    assert found is not None
    chart = mix_chart(found)
    best, chosen = chart["data"]
    assert (best["x"], best["y"]) == ([2_000_000, 2_750_000], [0.4, 0.04]), "16 bit loses nothing, and log has no 0"
    assert (chosen["x"], chosen["y"], chosen["name"]) == ([2_750_000], [0.04], "chosen")
    assert chart["layout"]["yaxis"]["type"] == "log"
    assert "chose a mix of 2.75" in summary_of_search(found)
    page = write_report(example.path).read_text()
    assert 'data-chart="search"' in page
    assert "What the search found" in page


def test_a_frontier_that_is_none_is_refused(example: Any) -> None:
    run = example.write(records=[*example.records(), {"kind": "search", "frontier": [3]}])
    with pytest.raises(RunError, match=r"'search' record 1: frontier is \[3\], not a list of mappings"):
        read_facts(run)


def test_map_has_a_cell_per_role_and_block(example: Any) -> None:
    found = site_map(facts_of(example))
    assert found["blocks"] == ["model.layers.0", "model.layers.1"]
    assert found["roles"] == ["q_proj", "down_proj", "experts", "o_proj", "gate"]
    measures = {measure["label"]: measure for measure in found["measures"]}
    assert list(measures) == [
        "Output SQNR (dB)", "Weight SQNR (dB)", "Bits per weight", "Sensitivity: fisher, W4A16-g128",
    ]  # fmt: skip
    assert measures["Output SQNR (dB)"]["values"][0] == [23.5, 11.75]
    assert measures["Output SQNR (dB)"]["values"][2] == [None, None], "an expert that no token reached"
    assert measures["Bits per weight"]["values"][4] == [None, 16.0]
    assert measures["Sensitivity: fisher, W4A16-g128"]["values"][0] == [0.0125, 0.375]
    assert found["members"][3] == [[], [4]]
    assert found["kept"][4][1] == [["model.layers.1.gate", "ignored by pattern '*.gate'"]]


def test_a_cell_of_several_sites_shows_the_worst(example: Any) -> None:
    sites = [example.site(f"b.up[{i}]", block="b", output_sqnr_db=30.0 - i, bits_per_weight=4 + i) for i in range(3)]
    found = site_map(read_facts(example.write(records=[example.block("b"), *sites])))
    values = {measure["label"]: measure["values"] for measure in found["measures"]}
    assert values["Output SQNR (dB)"] == [[28.0]]
    assert values["Bits per weight"] == [[6.0]]
    assert found["members"] == [[[0, 1, 2]]]


def test_details_hold_histograms_inputs_and_sensitivities(example: Any) -> None:
    facts = facts_of(example)
    details = site_details(facts, facts.sites)
    assert details["histograms"]["model.layers.0.q_proj"] == [-1.0, 1.0, [1, 2, 60, 1], [-0.5, 0.0, 0.5]]
    assert details["histograms"]["model.layers.1.o_proj"][3] == []
    assert "channel 2 is the loudest: 9.00 times the median. 1 channel" in details["inputs"]["model.layers.0.down_proj"]
    assert details["sensitivities"]["labels"] == [["fisher", "W4A16-g128"]]
    assert details["sensitivities"]["of"]["model.layers.1.q_proj"] == [0.375]


def test_histograms_are_those_of_the_worst_sites_where_they_are_many(example: Any) -> None:
    number = NUM_HISTOGRAMS + 5
    records: list[dict[str, Any]] = [example.block("b")]
    for i in range(number):
        records.append(example.site(f"b.x[{i}]", block="b"))
        records.append({"kind": "histogram", "site": f"b.x[{i}]", "low": 0, "high": 1, "counts": [1]})
    facts = read_facts(example.write(records=records))
    drawn = site_details(facts, facts.sites[::-1])["histograms"]
    assert len(drawn) == NUM_HISTOGRAMS
    assert f"b.x[{number - 1}]" in drawn
    assert "b.x[0]" not in drawn


def test_edges_may_stand_for_the_ends_and_what_cannot_be_drawn_is_left_out(example: Any) -> None:
    kind = {"kind": "histogram", "counts": [1, 2]}
    records = [{**kind, "site": "a", "edges": [0.0, 0.5, 1.0]}, {**kind, "site": "b", "low": 1.0, "high": 1.0}]
    found = read_facts(example.write(records=records)).findings.histograms
    assert (found["a"].low, found["a"].high) == (0.0, 1.0)
    assert "b" not in found


def test_channels_are_told_by_the_group_that_reads_them(example: Any) -> None:
    (fact,) = facts_of(example).channels
    assert fact.sites == ("model.layers.0.q_proj", "model.layers.0.down_proj")
    assert fact.loudest[0] == (2, pytest.approx(9.0))
    assert (fact.num_channels, fact.num_outliers) == (8, 1)


def test_verdict_says_where_and_what_next(example: Any) -> None:
    facts = facts_of(example)
    words = " ".join(where(facts))
    assert "Most is lost in o_proj" in words
    assert "The worst site is model.layers.1.o_proj with 9.5" in words
    assert "loses most at model.layers.1: 5.5" in words
    steps = next_steps(facts)
    assert any("*.o_proj more bits" in step.what for step in steps)
    assert not any("--samples" in step.command for step in steps), "there are samples"


def test_a_failed_run_is_told_how_to_pass(example: Any) -> None:
    recipe = {**example.recipe, "method": "rtn"}
    commands = [step.command for step in next_steps(read_facts(example.write(failure="too much", recipe=recipe)))]
    assert "--method gptq --calibration TEXT" in commands[0]
    assert "--ignore '*.q_proj'" in commands[1]
    assert not any("export" in command for command in commands)


def test_generations_are_told_apart_at_the_first_difference() -> None:
    assert GenerationFact(prompt="", before=" upon a time", after=" upon a hill").num_common == len(" upon a ")
    assert GenerationFact(prompt="", before="ab", after="abc").num_common == 2


def test_of_two_generations_for_one_prompt_the_later_is_shown(example: Any) -> None:
    again = [{"kind": "generation", "prompt": "p", "before": "b", "after": str(i)} for i in range(2)]
    (fact,) = read_facts(example.write(records=again)).findings.generations
    assert fact.after == "1"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "histogram", "counts": ["many"]}, "counts is 'many', not a number"),
        ({"kind": "histogram", "counts": 5}, "counts is 5, not a list of numbers"),
        ({"kind": "auto", "error": "large"}, "'auto' record 1: error is 'large', not a number"),
        ({"kind": "repair", "kl_after": True}, "kl_after is True, not a number"),
    ],
)
def test_damaged_records_are_refused_in_one_line(example: Any, record: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        read_facts(example.write(records=[record]))


@pytest.mark.parametrize("name", ["2-stats.safetensors", "1-structure.json"])
def test_damaged_statistics_are_refused_in_one_line(example: Any, name: str) -> None:
    run: Path = example.write()
    example.write_statistics()
    (run / name).write_text(json.dumps({"blocks": 3}))
    with pytest.raises(RunError, match=name):
        read_facts(run)
