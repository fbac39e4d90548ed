"""Method auto: what it tries, what it keeps, that it is never behind GPTQ on the gate, and that it resumes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright import automatic, chooser, pipeline
from bitwright.errors import RecipeError, VerificationError
from bitwright.preflight import estimate
from bitwright.preparation import model_sites, open_model
from bitwright.recipe import Plan, Recipe, SitePlan, resolve
from bitwright.records import read_jsonl
from bitwright.schemes import Scheme


@pytest.fixture(scope="module")
def text(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text)
    return file


def recipe_of(text: Path, method: str = "auto", **changes: Any) -> Recipe:
    return Recipe.from_mapping(
        {
            "scheme": "W3A16-g32", "method": method, "max_kl": 50.0, "auto": {"candidates": ["rtn", "gptq"]},
            "calibration": {"text": str(text), "num_samples": 8, "seqlen": 64}, **changes,
        }
    )  # fmt: skip


def tensors(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "4-model").glob("*.safetensors"))}


def auto_records(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "5-records.jsonl") if record["kind"] == "auto"]


def test_it_names_a_solver_and_the_reason_for_every_site(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    result = pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "3-plan.yaml")
    assert {plan.sites[name].method for name in plan.quantized} <= {"rtn", "gptq"}
    assert all(plan.sites[name].reason.startswith("auto") for name in plan.quantized)
    trials = auto_records(tmp_path / "run")
    assert {trial["composition"] for trial in trials} == {"rtn", "gptq"}
    assert {trial["block"] for trial in trials} == {"model.layers.0", "model.layers.1"}
    gptq = pipeline.quantize(tiny_llama_dir, recipe_of(text, "gptq"), tmp_path / "gptq")
    assert result.results["kl_mean"] <= gptq.results["kl_mean"]


def test_gptq_takes_over_where_the_choice_is_worse(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only candidate is round-to-nearest; GPTQ is better on the gate, so the result is GPTQ's to the last bit."""
    losses = iter([0.1, 0.2])  # GPTQ's, then the choice's
    monkeypatch.setattr(pipeline, "gate_loss", lambda *_: next(losses))
    recipe = recipe_of(text, auto={"candidates": ["rtn"]})
    pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "run")
    pipeline.quantize(tiny_llama_dir, recipe_of(text, "gptq"), tmp_path / "gptq")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "gptq")
    plan = Plan.load(tmp_path / "run" / "3-plan.yaml")
    assert {plan.sites[name].method for name in plan.quantized} == {"gptq"}
    assert all("auto kept gptq" in plan.sites[name].reason for name in plan.quantized)


def test_the_choice_takes_the_place_of_gptq_where_it_is_better(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.2, 0.1])
    monkeypatch.setattr(pipeline, "gate_loss", lambda *_: next(losses))
    recipe = recipe_of(text, auto={"candidates": ["rtn"]})
    pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "3-plan.yaml")
    assert {plan.sites[name].method for name in plan.quantized} == {"rtn"}


@pytest.mark.parametrize(
    ("folder", "blocks"), [(automatic.BASELINE, 1), (automatic.BASELINE, 2), ("killed", 1), ("killed", 2)]
)
def test_a_killed_run_makes_the_same_choice(
    folder: str, blocks: int, tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a block of the baseline or of the choice is counted."""
    pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "whole")
    commit = automatic.RunDirectory.commit

    def killed(run: automatic.RunDirectory, entry: dict[str, Any]) -> None:
        if run.path.name == folder and entry["completed_blocks"] >= blocks:
            raise KeyboardInterrupt
        commit(run, entry)

    with monkeypatch.context() as patch:
        patch.setattr(automatic.RunDirectory, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "killed")
    if folder == "killed":
        assert json.loads((tmp_path / "killed" / "work" / automatic.CHOICE).read_text())["solvers"]
        monkeypatch.setattr(chooser.Chooser, "_choose", None)  # what is on disk must do
    result = pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "killed")
    assert result.resumed_blocks == (blocks - 1 if folder == "killed" else 0)
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")
    assert auto_records(tmp_path / "killed") == auto_records(tmp_path / "whole")


def test_a_run_killed_amid_its_trials_makes_the_same_choice(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "whole")

    def kill(what: str, done: int, _total: int) -> None:
        if (what, done) == ("auto", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "killed", progress=kill)
    pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "killed")
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")
    assert auto_records(tmp_path / "killed") == auto_records(tmp_path / "whole")


def test_candidates_are_tried_behind_a_quantized_prefix(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enters the first block is the model's own, what enters the second has gone through GPTQ's first."""
    distance: dict[int, float] = {}
    attempt = chooser.Chooser._try

    def watched(self: chooser.Chooser, text: str, recipe: Recipe, index: int, streams: Any, solvers: Any) -> Any:
        cpu = torch.device("cpu")
        for quantized, original in (("calibration", "teacher"), ("gate", "reference")):
            count = len(streams[quantized])
            assert count == len(streams[original]) == {"calibration": 6, "gate": 2}[quantized]
            difference = streams[quantized].read(0, count, cpu) - streams[original].read(0, count, cpu)
            distance[index] = float(difference.norm())
        return attempt(self, text, recipe, index, streams, solvers)

    monkeypatch.setattr(chooser.Chooser, "_try", watched)
    pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "run")
    assert distance[0] == 0
    assert distance[1] > 0


@pytest.mark.parametrize(
    ("schemes", "tried"),
    [
        (["W4A16-g32"], {"awq+gptq", "awq+gptaq"}),
        (["W8A8"], {"smoothquant+gptq", "smoothquant+gptaq"}),
        (["W4A16-g32", "W8A8"], {"awq+gptq", "awq+gptaq", "smoothquant+gptq", "smoothquant+gptaq"}),
    ],
)
def test_what_is_tried_suits_the_scheme(schemes: list[str], tried: set[str]) -> None:
    sites = {
        scheme: SitePlan(scheme=Scheme.parse(scheme), group_size=32, method="auto", reason="") for scheme in schemes
    }
    assert {"gptq", "gptaq"} | tried == set(chooser.default_candidates(Plan(sites=sites)))


def test_candidates_that_are_refused_are_recorded(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    recipe = recipe_of(text, auto={"candidates": ["smoothquant", "gptq"]})
    pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "run")
    trials = auto_records(tmp_path / "run")
    assert [t["composition"] for t in trials if t["refused"]] == ["smoothquant"]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("rotation+gptq", "changes the whole model"),
        ("gptq+bias", "repairs .* are not chosen"),
        ("guided", "needs gradients of the whole model"),
    ],
)
def test_what_cannot_be_tried_on_one_block_is_no_candidate(
    candidate: str, reason: str, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    pipeline.quantize(tiny_llama_dir, recipe_of(text, auto={"candidates": [candidate, "rtn"]}), tmp_path / "run")
    trials = auto_records(tmp_path / "run")
    refused = {trial["composition"]: trial["refused"] for trial in trials if trial["refused"]}
    assert re.search(reason, refused[candidate])


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_block = chooser.Walk.quantize_block

    def failing(walk: chooser.Walk, *args: Any) -> Any:
        if walk.recipe.method == "rtn":
            raise VerificationError("scaling moved its output")
        return quantize_block(walk, *args)

    monkeypatch.setattr(chooser.Walk, "quantize_block", failing)
    pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "run")
    trials = auto_records(tmp_path / "run")
    assert {t["composition"] for t in trials if t["refused"] == "scaling moved its output"} == {"rtn"}


def test_one_window_is_not_enough(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    calibration = {"text": str(text), "num_samples": 1, "seqlen": 64}
    with pytest.raises(RecipeError, match="at least 2"):
        pipeline.quantize(tiny_llama_dir, recipe_of(text, calibration=calibration), tmp_path / "run")


@pytest.mark.parametrize("extra", [{"scheme": "kmeans3", "importance": "fisher"}, {"rules": "guided"}])
def test_what_was_measured_for_the_whole_model_is_there_for_the_trials(
    extra: dict[str, Any], tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    if extra.get("rules"):
        extra = {"rules": [{"pattern": "*.q_proj", "scheme": "W3A16-g32", "method": "guided"}]}
    result = pipeline.quantize(tiny_llama_dir, recipe_of(text, **extra), tmp_path / "run")
    assert result.failure is None


def test_a_solver_far_behind_is_not_tried_on_single_groups(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, tried in ((1.0, False), (float("inf"), True)):
        monkeypatch.setattr(chooser, "WORTH_A_TRIAL", limit)
        pipeline.quantize(tiny_llama_dir, recipe_of(text), tmp_path / "run", fresh=True)
        assert any(trial["solvers"] for trial in auto_records(tmp_path / "run")) == tried


def test_the_experts_of_a_stack_are_tried_as_one(
    tiny_moe_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser, "WORTH_A_TRIAL", float("inf"))
    recipe = recipe_of(text, auto={"candidates": ["rtn", "gptq"], "sample": 1})
    pipeline.quantize(tiny_moe_dir, recipe, tmp_path / "run")
    trials = auto_records(tmp_path / "run")
    stacks = [{*trial["solvers"]} for trial in trials if any("experts" in name for name in trial["solvers"])]
    assert stacks
    assert all({"[0]", "[1]"} <= {name[-3:] for name in stack if "experts" in name} for stack in stacks)


def test_its_rival_and_its_samples_are_part_of_the_estimate(tiny_llama_dir: Path) -> None:
    model = open_model(tiny_llama_dir, device="cpu", dtype="float32", trust_remote_code=False)
    sites = model_sites(model)
    plans = (resolve(Recipe(scheme=Scheme.parse("W4A16-g32"), method=method), sites) for method in ("gptaq", "auto"))
    plain, auto = (estimate(model, sites, plan, 4, 2, 64, auto_blocks=2) for plan in plans)
    assert auto.model_bytes == plain.model_bytes
    assert auto.work_bytes >= plain.work_bytes + plain.model_bytes + 2 * 2 * 4 * 64 * 64 * 4


def test_no_candidate_at_all_is_refused(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="auto: no candidate works here"):
        pipeline.quantize(tiny_llama_dir, recipe_of(text, auto={"candidates": ["smoothquant"]}), tmp_path / "run")


def test_rules_keep_their_own_method(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    rule = {"pattern": "*.down_proj", "scheme": "W8A16-channel", "method": "rtn"}
    pipeline.quantize(tiny_llama_dir, recipe_of(text, rules=[rule]), tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "3-plan.yaml")
    ruled = [plan.sites[name] for name in plan.quantized if name.endswith("down_proj")]
    assert {(str(site.scheme), site.method) for site in ruled} == {("W8A16-channel", "rtn")}
    assert not any(site.reason.startswith("auto") for site in ruled)


def test_the_error_is_relative_to_what_the_block_adds(tmp_path: Path) -> None:
    from bitwright.model.activations import Activations

    def store(name: str, value: torch.Tensor) -> Activations:
        made = Activations(tmp_path / name, tuple(value.shape), torch.float32)
        made.write(0, value)
        return made

    x = torch.randn(2, 3, 4)
    added, error = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = chooser._relative_error(store("x", x), store("y", x + added), store("z", x + added + error))
    expected = float(error.square().sum() / added.square().sum())
    assert found == pytest.approx(expected, rel=1e-4)  # float32 sums and differences of a few numbers
