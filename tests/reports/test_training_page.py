"""Training in the report: a page of its own for adapters, a section for trained codes, the curve and its levels."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitwright.cli.app import app
from bitwright.errors import RunError
from bitwright.reports.charts import NUM_POINTS
from bitwright.reports.comparison import compare_runs
from bitwright.reports.page import write_report
from bitwright.reports.training import Compared

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
ENVIRONMENT = {"kind": "environment", "python": "3.11.7", "cpu": "Example CPU", "versions": {"torch": "2.13.0"}}
QLORA = {
    "kind": "training",
    "method": "qlora",
    "scheme": "nf4-b64-dq",
    "rank": 8,
    "perplexity_before": 126.24,
    "perplexity": 75.6,
    "perplexity_stderr": 2.06,
    "heldout_tokens": 16256,
    "trainable": 155_648,
    "parameters": 3_827_968,
    "memory": {"weights": 3_679_232, "adapters": 622_592, "gradients": 0},
    "peak_memory_bytes": 737_304_576,
    "seconds": 57.2,
}
QAT = {
    "kind": "training",
    "method": "qat",
    "scheme": "W3A16-g128",
    "loss": "kl",
    "perplexity_original": 10.0,
    "perplexity_before": 14.0,
    "perplexity": 11.0,
    "perplexity_stderr": 0.5,
    "kl_before": 0.04,
    "kl_mean": 0.03,
    "gate_kl_before": 0.05,
    "gate_kl": 0.06,
    "heldout_tokens": 16256,
    "peak_memory_bytes": 759_201_792,
    "seconds": 90.5,
}
MERGE = {
    "kind": "merge",
    "how": "requantize",
    "kl_mean": 0.0012,
    "kl_stderr": 0.0003,
    "perplexity_before": 75.6,
    "perplexity": 75.7,
}
TASK = {"text": {"data": "notes.txt", "seqlen": 128}, "training": {"steps": 3}, "start": "method", "temperature": 1.0}


class Page:
    """A page: its text as people read it, its data, and the tags with an attribute."""

    def __init__(self, path: Path) -> None:
        whole = path.read_text(encoding="utf-8")
        self.data: Any = json.loads(whole.split('<script type="application/json" id="data">')[1].split("</script>")[0])
        self.body = re.sub(r"<(script|style).*?</\1>", "", whole, flags=re.DOTALL)
        self.text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", self.body))).replace(" .", ".")

    def all(self, attribute: str) -> list[str]:
        """The values of an attribute, in order."""
        return re.findall(rf'\s{attribute}="([^"]*)"', self.body)


def steps(*losses: Any) -> list[dict[str, Any]]:
    """A record per step."""
    return [
        {"kind": "training_step", "step": step, "loss": loss, "learning_rate": 0.001 / step}
        for step, loss in enumerate(losses, start=1)
    ]


def write_run(path: Path, records: list[dict[str, Any]], task: dict[str, Any], **more: Any) -> Path:
    """A run that trained: its records, and run.json with what was asked."""
    path.mkdir(parents=True)
    asked = {"model": "models/tiny-llama", "model_hash": "ab12" * 16, "data_hash": "cd34" * 16, "task": task, **more}
    results = {key: value for key, value in records[1].items() if key not in ("kind", "method", "memory")}
    info = {"fingerprint": "f", "asked": asked, "complete": True, "failure": None, "results": results}
    (path / "run.json").write_text(json.dumps(info), encoding="utf-8")
    (path / "5-records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_adapter(path: Path, *more: dict[str, Any], training: dict[str, Any] = QLORA) -> Path:
    return write_run(path, [ENVIRONMENT, training, *steps(4.9, 4.6, 4.4), *more], {**TASK, "lora": {"rank": 8}})


def write_qat(example_class: Any, path: Path, *, training: dict[str, Any] = QAT, task: dict[str, Any] = TASK) -> Path:
    """A run of quantization-aware training with the run of its codes inside."""
    trained = [training, *steps(0.05, 0.04, 0.03)]
    write_run(path, [ENVIRONMENT, *trained], task, recipe={"method": "gptq"})
    inner = example_class(path / "4-quantized")
    recipe = {**inner.recipe, "scheme": "W3A16-g128", "method": "trained"}
    inner.write(records=[*inner.records(), *trained], recipe=recipe)
    return path


def curves(page: Page) -> dict[str, list[Any]]:
    """The chart's lines by name: their heights."""
    return {trace["name"]: trace["y"] for trace in page.data["charts"]["training"]["data"]}


def test_an_adapter_run_has_a_page_of_its_own(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "run")
    out = write_report(run)
    assert out == run / "7-report.html"
    page = Page(out)
    for figure in (
        "tiny-llama trained by QLoRA over nf4-b64-dq",
        "QLoRA took the perplexity on 16 256 predicted tokens of held-out text from 126.2 to 75.6 ± 2.1.",
        "−40.1 %", "155 648 of 3 827 968 (4.07 %)", "weights 3.68 MB, adapters 623 kB", "57.2 s", "737 MB",
        "data notes.txt, seqlen 128", "ab12" * 16, "Example CPU", "2.13.0",
    ):  # fmt: skip
        assert figure in page.text, figure
    for absent in ("Error per site", "Map of sites", "the gate", "Original", "Taken back", "None", "divergences from"):
        assert absent not in page.text.replace("heldout none", ""), absent
    assert set(page.data["charts"]) == {"training"}
    assert curves(page) == {
        "loss of the text trained on": [4.9, 4.6, 4.4],
        "before training": [float(f"{math.log(126.24):.5g}")] * 2,
    }
    assert not re.search(r"https?://|url\(", page.body)


def test_the_page_says_who_wrote_the_text(tmp_path: Path) -> None:
    adapter = Page(write_report(write_adapter(tmp_path / "adapter", training={**QLORA, "data": "self"})))
    assert "Text written by the original itself" in adapter.text
    distilled = {**QLORA, "method": "distill", "data": "notes.txt"}
    assert "Text notes.txt" in Page(write_report(write_adapter(tmp_path / "distilled", training=distilled))).text


def test_the_chart_has_its_place_and_a_merge_its_line(tmp_path: Path) -> None:
    page = Page(write_report(write_adapter(tmp_path / "run", MERGE)))
    assert page.all("data-chart") == list(page.data["charts"]) == ["training"]
    assert {"asked", "training", "environment"} <= set(page.all("id"))
    assert (
        "Merged into the weights (requantize): KL divergence 0.00120 ± 0.00030 nats per token from the model with its "
        "adapter, perplexity 75.60 → 75.70."
    ) in page.text


def test_quantization_aware_training_reports_the_run_of_its_codes(example_class: Any, tmp_path: Path) -> None:
    run = write_qat(example_class, tmp_path / "run")
    out = write_report(run)
    assert out == run / "7-report.html"
    assert not (run / "4-quantized" / "7-report.html").exists()
    page = Page(out)
    for figure in (
        "tiny-llama in W3A16-g128 by quantization-aware training", "Passed the gate", "Error per site",
        "from 14.00 to 11.00 ± 0.50; the original has 10.00.",
        "took back 75.0 % in perplexity, 25.0 % in KL divergence, −20.0 % in KL divergence on the gate text.",
        "Method before training gptq",
        f"bitwright report {run / '4-quantized'} --samples",
    ):  # fmt: skip
        assert figure in page.text, figure
    assert curves(page) == {
        "loss of the text trained on": [0.05, 0.04, 0.03],
        "post-training quantization": [0.04, 0.04],
        "full precision": [0.0, 0.0],
    }
    assert "#training" in page.all("href")


def test_the_run_of_the_codes_reports_the_same_training(example_class: Any, tmp_path: Path) -> None:
    inner = write_qat(example_class, tmp_path / "run") / "4-quantized"
    page = Page(write_report(inner))
    assert "75.0 % in perplexity" in page.text
    assert set(curves(page)) == {"loss of the text trained on", "post-training quantization", "full precision"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"loss": "cross_entropy"},
            {"post-training quantization": math.log(14.0), "full precision": math.log(10.0)},
        ),
        ({"loss": "cross_entropy", "perplexity_original": None}, {"post-training quantization": math.log(14.0)}),
        ({"temperature": 2.0}, {"full precision": 0.0}),
        (
            {"labels": 0.25},
            {
                "post-training quantization": 0.75 * 0.04 + 0.25 * math.log(14.0),
                "full precision": 0.25 * math.log(10.0),
            },
        ),
        ({"start": "original"}, {"before training": 0.04, "full precision": 0.0}),
        ({"kl_before": None}, {"full precision": 0.0}),
        ({"loss": "something new"}, {}),
        ({"loss": "cross_entropy", "perplexity_before": "inf", "perplexity_original": "nan"}, {}),
    ],
)
def test_levels_have_the_unit_of_the_loss(
    example_class: Any, tmp_path: Path, changes: dict[str, Any], expected: dict[str, float]
) -> None:
    page = Page(write_report(write_qat(example_class, tmp_path / "run", training={**QAT, **changes})))
    found = curves(page)
    del found["loss of the text trained on"]
    assert found == {name: [float(f"{level:.5g}")] * 2 for name, level in expected.items()}


def test_what_a_record_leaves_out_is_read_from_what_was_asked(example_class: Any, tmp_path: Path) -> None:
    task = {**TASK, "start": "original", "temperature": 2.0}
    page = Page(write_report(write_qat(example_class, tmp_path / "run", task=task)))
    assert set(curves(page)) == {"loss of the text trained on", "full precision"}


def test_distillation_is_compared_with_its_teacher(tmp_path: Path) -> None:
    training = {**QAT, "method": "distill", "scheme": None, "perplexity_teacher": 10.0}
    for key in ("loss", "perplexity_original", "gate_kl", "gate_kl_before"):
        del training[key]
    page = Page(write_report(write_adapter(tmp_path / "run", training=training)))
    assert "tiny-llama trained by distillation" in page.text
    assert "Distillation took the perplexity" in page.text
    assert "the teacher has 10.00" in page.text
    assert "Of the distance to the teacher, training took back 75.0 % in perplexity, 25.0 % in KL" in page.text
    assert set(curves(page)) == {"loss of the text trained on", "before training", "teacher"}


@pytest.mark.parametrize(
    ("original", "before", "after", "share"),
    [
        (10.0, 14.0, 11.0, 0.75),
        (10.0, 14.0, 14.0, 0.0),
        (10.0, 14.0, 16.0, -0.5),
        (10.0, 14.0, 9.0, 1.25),
        (10.0, 10.0, 9.0, None),
        (10.0, 9.0, 8.0, None),
        (None, 14.0, 11.0, None),
        (10.0, None, 11.0, None),
        (10.0, math.inf, 11.0, None),
        (math.nan, 14.0, 11.0, None),
    ],
)
def test_share_taken_back(original: Any, before: Any, after: Any, share: float | None) -> None:
    assert Compared(name="", original=original, before=before, after=after).recovered == share


def test_a_long_training_is_drawn_by_means(tmp_path: Path) -> None:
    size, losses = 5, [float(index % 5) for index in range(5 * NUM_POINTS)]
    run = write_run(tmp_path / "run", [ENVIRONMENT, QLORA, *steps(*losses)], TASK)
    page = Page(write_report(run))
    trace = page.data["charts"]["training"]["data"][0]
    assert trace["y"] == [2.0] * NUM_POINTS
    assert trace["x"][:2] == [size, 2 * size]
    assert trace["x"][-1] == len(losses)
    assert "steps 1–5" in trace["hovertext"][0]
    assert "each point the mean of 5 steps" in page.text


def test_small_losses_are_drawn_with_their_digits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [ENVIRONMENT, QLORA, *steps(1.23456e-6, 2e-6)], TASK)
    assert Page(write_report(run)).data["charts"]["training"]["data"][0]["y"] == [1.2346e-6, 2e-6]


def test_a_training_recorded_twice_counts_once(example_class: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, [ENVIRONMENT, {**QLORA, "perplexity": 80.0}, *steps(9.0, 9.0, 9.0), QLORA, *steps(3.0, 2.0)], TASK)
    page = Page(write_report(run))
    assert page.data["charts"]["training"]["data"][0]["y"] == [3.0, 2.0, 9.0]
    assert "75.6 ± 2.1" in page.text


def test_figures_that_are_missing_or_not_finite_do_not_stop_the_report(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", [ENVIRONMENT, {"kind": "training"}], {})
    page = Page(write_report(bare))
    assert page.data["charts"] == {}
    assert page.all("data-chart") == []
    assert "None" not in page.text
    broken = {**QLORA, "perplexity": "nan", "memory": {"weights": None}, "trainable": 3, "parameters": 0}
    run = write_run(tmp_path / "broken", [ENVIRONMENT, broken, *steps("nan", None, "inf")], TASK)
    assert Page(write_report(run)).data["charts"]["training"]["data"][0]["y"] == [None, None, None]


def test_a_damaged_step_is_refused_in_one_line(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "run", {"kind": "training_step", "step": 4, "loss": "low"})
    with pytest.raises(RunError, match=r"'training_step' record 4: loss is 'low', not a number"):
        write_report(run)


def test_markup_in_records_stays_text(tmp_path: Path) -> None:
    training = {**QLORA, "method": ATTACK, "scheme": ATTACK, "loss": ATTACK, "memory": {ATTACK: 5}}
    page = Page(write_report(write_adapter(tmp_path / "run", {**MERGE, "how": ATTACK}, training=training)))
    assert ATTACK in page.text
    assert "<img" not in page.body
    assert "<script" not in json.dumps(page.data["charts"])


def test_a_merge_is_one_line_in_the_report_of_a_quantized_run(example: Any) -> None:
    page = Page(write_report(example.write(records=[*example.records(), MERGE])))
    assert "Merged into the weights (requantize)" in page.text
    assert "Error per site" in page.text
    assert "training" not in page.data["charts"]


def test_a_comparison_takes_runs_that_trained(example_class: Any, tmp_path: Path) -> None:
    trained, adapter = write_qat(example_class, tmp_path / "qat"), write_adapter(tmp_path / "adapter")
    page = Page(compare_runs([trained, adapter], tmp_path / "both.html"))
    assert (trained / "7-report.html").is_file()
    assert (adapter / "7-report.html").is_file()
    assert "75.6" in page.text


def test_the_command_reports_a_run_that_trained_and_refuses_its_samples(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0
    assert (run / "7-report.html").is_file()
    refused = CliRunner().invoke(app, ["report", str(run), "--samples", "2", "--quiet"])
    assert isinstance(refused.exception, RunError)
    assert "no quantized model" in str(refused.exception)
