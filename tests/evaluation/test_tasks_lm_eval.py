"""lm-evaluation-harness as an oracle of our own scores, and what is made of its results."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitwright.errors import MissingDependency
from bitwright.evaluation.lm_eval_tasks import LmEvalScore, compare_lm_eval, lm_eval_scores, require_lm_eval
from bitwright.task_run import run_tasks

ROUNDING = 2.0**-12


def metric(name: str, values: dict[int, float]) -> LmEvalScore:
    return LmEvalScore(
        task="t", version="1", metric=name, value=0.5, stderr=0.1, num_fewshot=0, num_questions=len(values),
        per_question=values,
    )  # fmt: skip


def test_its_absence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"bitwright\[lm-eval\]"):
        require_lm_eval(["arc_easy"])


def test_only_metrics_of_right_and_wrong_are_compared_on_questions_that_both_saw() -> None:
    ours = [metric("acc", {0: 1.0, 1: 0.0, 2: 1.0}), metric("perplexity", {0: -3.0}), metric("f1", {})]
    theirs = [metric("acc", {3: 1.0, 2: 1.0, 1: 1.0, 0: 1.0}), metric("perplexity", {0: -2.0})]
    accuracy, perplexity, missing = compare_lm_eval(ours, theirs)
    assert accuracy is not None
    assert (accuracy.num_questions, accuracy.num_lost, accuracy.num_gained) == (3, 1, 0)
    assert (perplexity, missing) == (None, None)


@pytest.mark.filterwarnings("default")
def test_both_evaluators_agree(tiny_llama_dir: Path, tiny_text: str, tmp_path: Path) -> None:
    """The same questions as a task of the harness: equal accuracies by both rules, question by question."""
    pytest.importorskip("lm_eval")
    words = tiny_text.split()
    file = tmp_path / "questions.jsonl"
    entries = [
        {"query": " ".join(words[30 * i : 30 * i + 3 + i]), "choices": words[9 * i : 9 * i + 4], "gold": i % 4}
        for i in range(12)
    ]
    file.write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "ours.yaml").write_text(
        f"task: bitwright_test\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {file}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: query\ndoc_to_target: gold\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        AutoTokenizer.from_pretrained(tiny_llama_dir),
    )
    theirs = {s.metric: s for s in lm_eval_scores(model, tokenizer, ["bitwright_test"], include_path=tmp_path)}
    ours = run_tasks(tiny_llama_dir, [file])[0].score
    assert theirs["acc"].value == pytest.approx(ours.accuracy, rel=1e-12)
    assert theirs["acc_norm"].value == pytest.approx(ours.accuracy_normalised, rel=1e-12)
    assert theirs["acc"].stderr == pytest.approx(ours.stderr, rel=1e-9)
    assert theirs["acc"].per_question == {i: float(a.correct) for i, a in enumerate(ours.per_question)}
    assert theirs["acc_norm"].per_question == {i: float(a.correct_normalised) for i, a in enumerate(ours.per_question)}
