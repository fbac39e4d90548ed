"""Samples: the same words for both models, cut from the gate text, and recorded for the report."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bitwright import pipeline
from bitwright.cli.report_command import report
from bitwright.errors import RunError
from bitwright.recipe import Recipe
from bitwright.records import read_jsonl
from bitwright.reports.facts import read_facts
from bitwright.runs import RunDirectory
from bitwright.samples import NEW_TOKENS, PROMPT_TOKENS, gate_prompts, record_samples


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "text.txt").write_text(tiny_text)
    calibration = {"text": str(folder / "text.txt"), "num_samples": 4, "seqlen": 128}
    recipe = {"scheme": "nf4-b64", "method": "rtn", "calibration": calibration, "max_kl": 100.0}
    pipeline.quantize(tiny_llama_dir, Recipe.from_mapping(recipe), folder / "run")
    return folder / "run"


def test_both_models_continue_greedily_what_the_gate_says(run: Path, tiny_llama_dir: Path) -> None:
    samples = record_samples(run, num=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    gate = load_file(run / "2-stats.safetensors")["gate_tokens"].flatten().tolist()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="auto").eval()
    for sample, prompt in zip(samples, gate_prompts(RunDirectory(run), 2), strict=True):
        tokens = prompt.tolist()
        assert any(gate[i : i + PROMPT_TOKENS] == tokens for i in range(len(gate)))
        assert sample.prompt == tokenizer.decode(tokens, skip_special_tokens=True)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                if tokens[-1] == model.config.eos_token_id:
                    break
        assert sample.before == tokenizer.decode(tokens[PROMPT_TOKENS:], skip_special_tokens=True)
    recorded = [record for record in read_jsonl(run / "5-records.jsonl") if record["kind"] == "generation"]
    assert [record["after"] for record in recorded[-2:]] == [sample.after for sample in samples]


def test_prompts_are_spread_and_no_more_than_there_are(run: Path) -> None:
    every = gate_prompts(RunDirectory(run), 10_000)
    few = gate_prompts(RunDirectory(run), 2)
    assert every.shape[1] == PROMPT_TOKENS
    assert few.tolist() == [every[0].tolist(), every[len(every) // 2].tolist()]


def test_another_model_is_refused(run: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.lm_head.weight.data.neg_()
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match="not the model that"):
        record_samples(run, str(tmp_path / "other"))


def test_every_site_has_its_histogram_in_the_records(run: Path) -> None:
    facts = read_facts(run)
    assert set(facts.findings.histograms) == {site.site for site in facts.sites}
    for site in facts.sites:
        assert sum(facts.findings.histograms[site.site].counts) == site.num_weights
        assert len(facts.findings.histograms[site.site].levels) == 16
    assert {channel.site for channel in facts.channels} < {site.site for site in facts.sites}


def test_the_command_writes_one_run_or_several(run: Path, tmp_path: Path) -> None:

    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "a.html"), "--samples", "1", "--quiet"])
    assert result.exit_code == 0, result.output
    assert "Text before and after" in (tmp_path / "a.html").read_text()
    result = CliRunner().invoke(app, [str(run), str(run)])
    assert isinstance(result.exception, RunError)
    assert "--out" in str(result.exception)


def test_a_run_without_gate_text_is_told_what_to_do(tmp_path: Path) -> None:
    other = RunDirectory(tmp_path)
    save_file({"calibration_tokens": torch.zeros(1, 4)}, other.stats)
    with pytest.raises(RunError, match="holds no gate text"):
        gate_prompts(other, 1)
