"""A search keeps its budget, its fused sets and the recipe's rules, and what it says of sizes is what is written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bitwright.budget import Budget, parse_size
from bitwright.errors import RecipeError, RunError, ShapeError
from bitwright.escalation import Rung, apply
from bitwright.mixture import Search
from bitwright.options import LowRankOptions
from bitwright.pipeline import QuantizeResult, export, quantize
from bitwright.preparation import open_model
from bitwright.recipe import Calibration, Recipe, Rule, resolve
from bitwright.records import read_jsonl
from bitwright.schemes import Scheme
from bitwright.search.choices import ChoiceBench
from bitwright.search.fused import export_violations, fusion_violations
from bitwright.search.hardware import load_hardware

MENU = ("W2A16-g32", "W4A16-g32", "W8A16-g32")
Make = Callable[..., Search]


@pytest.fixture
def make(tiny_llama_dir: Path, tmp_path: Path) -> Make:
    model = open_model(tiny_llama_dir, device="cpu", dtype="float32", trust_remote_code=False)
    size = model.skeleton.model.config.vocab_size
    tokens = torch.randint(size, (4, 32), generator=torch.Generator().manual_seed(0))

    def search(recipe: Recipe | None = None, *, folder: str = "search", **options: Any) -> Search:
        known = ("fuse", "min_bits", "schemes")
        budget = Budget(**{key: value for key, value in options.items() if key not in known})
        given = {"schemes": MENU} | {key: value for key, value in options.items() if key in known}
        return Search(model, tokens, recipe or Recipe(), budget, tmp_path / folder, num_windows=2, **given)

    return search


def bits_of(scheme: str | None) -> float:
    return 16 if scheme is None else Scheme.parse(scheme).weights.format.bits


@pytest.mark.parametrize("bits", [3.6, 5.0, 7.0])
def test_average_bits_are_kept_and_fused_products_share_a_scheme(make: Make, bits: float) -> None:
    search = make(average_bits=bits)
    found = search.run(rounds=2, offspring=2)
    assert 3.0 <= found.average_bits <= bits
    assert found.measured_loss <= found.start_loss
    plan = resolve(found.recipe(search.recipe), search.sites)
    assert not fusion_violations(plan.sites, [[site.name for site in sites] for sites in search.sets])
    sizes = [each["size_bytes"] for each in found.frontier]
    losses = [each["predicted_loss"] for each in found.frontier]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)


def test_the_rounds_of_a_search_are_remembered(make: Make) -> None:
    first = make(average_bits=4.0).run(rounds=2, offspring=2)
    assert make(average_bits=4.0).run(rounds=2, offspring=2) == first


def test_what_a_recipe_keeps_or_fixes_has_no_choice(make: Make) -> None:
    kept = Rule(pattern="*.down_proj", scheme=None)
    fixed = Rule(pattern="*.o_proj", scheme=Scheme.parse("W8A16-g16"))
    found = make(Recipe(rules=(kept, fixed)), average_bits=14.0).run(rounds=0)
    assert all(scheme is None for site, scheme in found.schemes.items() if site.endswith("down_proj"))
    assert all(scheme == "W8A16-g16" for site, scheme in found.schemes.items() if site.endswith("o_proj"))


def test_the_fewest_bits_of_a_kind_are_kept(make: Make) -> None:
    found = make(average_bits=3.5, min_bits={"*.down_proj": 4}).run(rounds=1, offspring=2)
    assert all(bits_of(scheme) >= 4 for site, scheme in found.schemes.items() if site.endswith("down_proj"))
    with pytest.raises(RecipeError, match="--min-bits"):
        make(average_bits=3.5, min_bits={"*.nothing": 4})


def test_the_default_menu_has_tables_only_where_sites_choose_alone(make: Make) -> None:
    fused, alone = make(average_bits=5.0, schemes=()), make(average_bits=5.0, schemes=(), fuse=False)
    assert set(fused.menu) < set(alone.menu)
    assert all(scheme.startswith("W") for scheme in fused.menu)


def test_a_loss_that_is_allowed_is_kept_and_the_smallest_mix_is_taken(make: Make) -> None:
    loose, strict = make(max_kl=0.05).run(rounds=0), make(max_kl=0.001).run(rounds=0)
    assert loose.measured_loss <= 0.05
    assert strict.measured_loss <= 0.001
    assert loose.size_bytes <= strict.size_bytes


@pytest.mark.parametrize(
    "budget", [{"average_bits": 5.1}, {"max_kl": 1e-4}, {"average_bits": 5.1, "max_kl": 1e-4}], ids=str
)
def test_a_mix_that_its_scores_flatter_gives_way_to_one_scheme_for_all(
    make: Make, budget: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = make(**budget)
    everywhere = [dict.fromkeys((site.name for site in search.sites), scheme) for scheme in MENU]
    with search.measuring() as measure:
        losses = measure(everywhere)
    true = search.scores()
    # Some of the scores say that 2 bits do no harm where they do, and 8 bits much.
    false = {
        name: {s: 0.0 if s[:2] == "W2" else 10 * x if s[:2] == "W8" else x for s, x in scores.items()}
        if "mlp" in name else scores
        for name, scores in true.values.items()
    }  # fmt: skip
    monkeypatch.setattr(search, "scores", lambda: replace(true, values=false))
    found = search.run(rounds=0)
    for schemes, loss in zip(everywhere, losses, strict=True):
        size = search.size_bytes(list(schemes), next(iter(schemes.values())))
        bits = 8 * size / sum(site.out_features * site.in_features for site in search.sites)
        if "average_bits" not in budget:
            assert found.average_bits <= bits or loss > budget["max_kl"]
        elif bits <= budget["average_bits"]:
            assert found.measured_loss <= loss
    assert found.measured_loss <= budget.get("max_kl", 1.0)


def test_what_a_search_has_measured_it_does_not_measure_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(max_kl=1e-4).run(rounds=1, offspring=2)
    monkeypatch.setattr(ChoiceBench, "divergences", lambda *_: pytest.fail("measured again"))
    assert make(max_kl=1e-4).run(rounds=1, offspring=2) == first


def test_an_impossible_budget_says_what_binds_and_what_can_be_reached(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--average-bits 1 would have to be 3\.0"):
        make(average_bits=1.0).run(rounds=0)
    with pytest.raises(RecipeError, match=r"--fit 0\.001 MB would have to be \d"):
        make(fit_bytes=1000).run(rounds=0)
    device = load_hardware("t4")
    with pytest.raises(RecipeError, match=r"--min-tokens-per-s 1e\+09 would have to be \d"):
        make(min_tokens_per_s=1e9, hardware=device).run(rounds=0)
    with pytest.raises(RecipeError, match=r"--size 0\.090 MB would have to be (\d\.\d+) MB\.") as raised:
        make(size_bytes=90_000, average_bits=9.0).run(rounds=0)
    assert "--average-bits" not in str(raised.value)
    assert not (tmp_path / "search" / "scores").exists()  # nothing was measured
    least = parse_size(str(raised.value).split(" would have to be ")[1].split(". ")[0], "--size")
    assert make(size_bytes=least).run(rounds=0).size_bytes <= least  # what was said is enough


def test_files_are_no_larger_than_asked_with_their_headers(
    make: Make, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    for size in (240_000, 260_000, 300_000):
        found = make(recipe, size_bytes=size, fuse=False).run(rounds=0)
        run = quantize(tiny_llama_dir, replace(found.recipe(recipe), max_kl=50.0), tmp_path / f"run-{size}").run
        assert sum(file.stat().st_size for file in (run / "4-model").glob("*.safetensors")) <= size


def test_rules_keep_their_methods_and_repairs(make: Make) -> None:
    rule = Rule(pattern="*.down_proj", scheme=Scheme.parse("W8A16-g32"), method="rtn", repairs=("bias",))
    base = Recipe(method="gptq", rules=(rule,))
    search = make(base, average_bits=9.0)
    plan = resolve(search.run(rounds=0).recipe(base), search.sites)
    ruled = {(entry.method, entry.repairs) for name, entry in plan.sites.items() if name.endswith("down_proj")}
    assert ruled == {("rtn", ("bias",))}
    assert {plan.sites[name].method for name in plan.quantized if not name.endswith("down_proj")} == {"gptq"}


@pytest.mark.parametrize("fuse", [True, False])
def test_experts_of_one_parameter_share_a_scheme_that_transformers_reads(
    fuse: bool, tiny_moe_dir: Path, recipe: Recipe, tmp_path: Path
) -> None:
    model = open_model(tiny_moe_dir, device="cpu", dtype="float32", trust_remote_code=False)
    tokens = torch.randint(model.skeleton.model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    search = Search(
        model, tokens, recipe, Budget(average_bits=5.0), tmp_path / "search",
        num_windows=2, fuse=fuse, schemes=(*MENU, "W4A16-g32-asym", "nf4-g64-dq"),
    )  # fmt: skip
    found = search.run(rounds=1, offspring=2)
    assert len({scheme for site, scheme in found.schemes.items() if site.endswith("]")}) == 1
    done = apply(search, found, found.recipe(recipe), tmp_path / "out", quantizer(tiny_moe_dir), repair=False)
    plan = resolve(Recipe.from_mapping(_recipe_of(done.result.run)), search.sites)
    assert {name: entry.scheme and str(entry.scheme) for name, entry in plan.sites.items()} == found.schemes


def test_what_no_layout_holds_is_refused_before_any_work(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = open_model(tmp_path / "gpt2", device="cpu", dtype="float32", trust_remote_code=False)
    with pytest.raises(ShapeError, match="which no layout holds"):
        Search(model, torch.zeros(2, 16, dtype=torch.long), Recipe(), Budget(average_bits=4.0), tmp_path / "search")


def quantizer(tiny_llama_dir: Path) -> Callable[[Recipe, Path], QuantizeResult]:
    return lambda recipe, folder: quantize(tiny_llama_dir, recipe, folder)


@pytest.fixture
def recipe(tmp_path: Path, tiny_text: str) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text)
    return Recipe(method="rtn", calibration=Calibration(text=str(text), num_samples=4, seqlen=32))


def test_the_files_have_the_size_that_was_said(
    make: Make, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    search = make(recipe, average_bits=5.0)
    found = search.run(rounds=0)
    done = apply(search, found, found.recipe(recipe), tmp_path / "out", quantizer(tiny_llama_dir), repair=False)
    written = sum(file.stat().st_size for file in (done.result.run / "4-model").glob("*.safetensors"))
    assert written == pytest.approx(found.size_bytes, rel=0.01)
    assert done.failure is None


def test_repair_climbs_until_the_gate_holds(make: Make, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path) -> None:
    search = make(recipe, average_bits=6.0)
    coarse = replace(search.run(rounds=0), schemes=dict.fromkeys((site.name for site in search.sites), "W2A16-g32"))
    whole = apply(search, coarse, coarse.recipe(recipe), tmp_path / "a", quantizer(tiny_llama_dir), repair=False)
    search.budget = replace(search.budget, max_kl=0.9 * whole.result.results["kl_mean"])
    assert apply(search, coarse, coarse.recipe(recipe), tmp_path / "b", quantizer(tiny_llama_dir), repair=False).failure
    done = apply(search, coarse, coarse.recipe(recipe), tmp_path / "c", quantizer(tiny_llama_dir), repair=True)
    assert done.failure is None
    assert done.steps
    assert done.steps[0].before == str(Rung(scheme="W2A16-g32", method="rtn"))
    assert done.result.results["kl_mean"] <= search.budget.max_kl
    records = read_jsonl(tmp_path / "c" / "run" / "5-records.jsonl")
    assert [record["site"] for record in records if record["kind"] == "repair"] == [step.site for step in done.steps]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["run"]
    again = apply(search, coarse, coarse.recipe(recipe), tmp_path / "c", must_not_quantize, repair=True)
    assert again.was_finished
    assert not done.was_finished
    assert replace(again, was_finished=False) == done
    assert read_jsonl(tmp_path / "c" / "run" / "5-records.jsonl") == records


def must_not_quantize(recipe: Recipe, folder: Path) -> QuantizeResult:
    raise AssertionError(f"{folder} was quantized anew")


def test_another_mix_is_quantized_anew(make: Make, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path) -> None:
    search = make(recipe, average_bits=6.0)
    fine = search.run(rounds=0)
    coarse = replace(fine, schemes=dict.fromkeys((site.name for site in search.sites), "W2A16-g32"))
    mine = quantizer(tiny_llama_dir)
    apply(search, coarse, coarse.recipe(recipe), tmp_path / "out", mine, repair=False)
    with pytest.raises(RunError, match="belongs to another search"):
        apply(search, fine, fine.recipe(recipe), tmp_path / "out", must_not_quantize, repair=False)
    for found in (fine, coarse):
        done = apply(search, found, found.recipe(recipe), tmp_path / "out", mine, repair=False, fresh=True)
        assert not done.was_finished
        assert resolve(Recipe.from_mapping(_recipe_of(done.result.run)), search.sites).sites == (
            resolve(found.recipe(recipe), search.sites).sites
        )


def test_repair_stops_where_the_budget_has_no_room(
    make: Make, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    search = make(recipe, average_bits=3.6)
    coarse = replace(search.run(rounds=0), schemes=dict.fromkeys((site.name for site in search.sites), "W2A16-g32"))
    search.budget = replace(search.budget, max_kl=1e-9)
    done = apply(search, coarse, coarse.recipe(recipe), tmp_path / "out", quantizer(tiny_llama_dir), repair=True)
    assert done.failure is not None
    assert "no room" in done.failure
    schemes = resolve(Recipe.from_mapping(_recipe_of(done.result.run)), search.sites)
    assert search.costs_fit({name: entry.scheme and str(entry.scheme) for name, entry in schemes.sites.items()})


@pytest.mark.parametrize(
    ("layout", "rank", "after"),
    [
        ("bitwright", 2, "W8A16-g32 gptaq+low_rank"),
        ("bitwright", 64, "16 bit"),  # factors larger than the weight
        ("pack-quantized", 2, "16 bit"),
    ],
)
def test_the_last_rung_but_16_bit_is_a_low_rank_addend_where_the_layout_holds_one(
    make: Make, tmp_path: Path, layout: str, rank: int, after: str
) -> None:
    """Of items that have the best method, the smallest groups and the most bits."""
    recipes: list[Recipe] = []

    def judge(recipe: Recipe, folder: Path) -> QuantizeResult:
        recipes.append(recipe)
        folder.mkdir(parents=True)
        (folder / "5-records.jsonl").touch()
        results = {"kl_mean": 2.0 - len(recipes), "perplexity": 1.0, "reference_perplexity": 1.0, "layouts": [layout]}
        return QuantizeResult(run=folder, results=results, failure=None, resumed_blocks=0)

    recipe = Recipe(method="gptaq", repairs=("bias",), low_rank=LowRankOptions(rank=rank))
    search = make(recipe, average_bits=15.0, max_kl=0.5)
    start = dict.fromkeys((site.name for site in search.sites), "W8A16-g32")
    found = replace(search.run(rounds=0), schemes=start)
    done = apply(search, found, found.recipe(recipe), tmp_path / "out", judge, repair=True)
    assert {step.after for step in done.steps} == {after}
    rules = {rule.pattern: rule.repairs for rule in recipes[-1].rules}
    climbed = {site for step in done.steps for site in step.sites}
    assert rules == dict.fromkeys(climbed, None if after == "16 bit" else ("low_rank", "bias"))
    record = next(each for each in read_jsonl(done.result.run / "5-records.jsonl") if each["kind"] == "repair")
    assert record["to"] == after


def judged(kls: Sequence[float], recipes: list[Recipe]) -> Callable[[Recipe, Path], QuantizeResult]:
    """A quantizer whose models lose what is given, one after the other."""

    def judge(recipe: Recipe, folder: Path) -> QuantizeResult:
        recipes.append(recipe)
        folder.mkdir(parents=True)
        (folder / "5-records.jsonl").touch()
        kl = kls[min(len(recipes), len(kls)) - 1]
        results = {"kl_mean": kl, "perplexity": 1 + kl, "reference_perplexity": 1.0, "layouts": ["pack-quantized"]}
        return QuantizeResult(run=folder, results=results, failure=None, resumed_blocks=0)

    return judge


def test_a_round_that_made_it_worse_is_taken_back(make: Make, tmp_path: Path) -> None:
    search, recipes = make(average_bits=15.0, max_kl=0.1), list[Recipe]()
    coarse = replace(search.run(rounds=0), schemes=dict.fromkeys((site.name for site in search.sites), "W2A16-g32"))
    kls = [0.2, 0.15, 0.5, 0.6]
    done = apply(search, coarse, coarse.recipe(search.recipe), tmp_path, judged(kls, recipes), repair=True)
    assert done.result.results["kl_mean"] == 0.15
    assert {step.step for step in done.steps} == {1}
    assert done.recipe == recipes[1]
    assert done.failure is not None
    assert "no room" in done.failure
    assert len(recipes) < 30


def test_only_the_limits_that_were_given_are_judged(make: Make, tmp_path: Path) -> None:
    search = make(average_bits=6.0, max_ppl_increase=9.0)
    found = search.run(rounds=0)
    assert search.recipe.max_kl == 1.0
    recipe = found.recipe(search.recipe)
    assert apply(search, found, recipe, tmp_path / "a", judged([2.0], []), repair=True).failure is None
    failed = apply(search, found, recipe, tmp_path / "b", judged([20.0], []), repair=False).failure
    assert failed is not None
    assert "where 900 % more perplexity were allowed. Leave out --no-repair" in failed


def test_what_a_rule_fixes_does_not_climb(make: Make, tmp_path: Path) -> None:
    rule = Rule(pattern="*.down_proj", scheme=Scheme.parse("W2A16-g32"), method="rtn", repairs=("bias",))
    search, recipes = make(Recipe(method="gptq", rules=(rule,)), average_bits=9.0, max_kl=0.1), list[Recipe]()
    found = search.run(rounds=0)
    apply(search, found, found.recipe(search.recipe), tmp_path, judged([1.0], recipes), repair=True)
    assert len(recipes) > 1
    plan = resolve(recipes[-1], search.sites).sites
    assert {
        (str(entry.scheme), entry.method, entry.repairs) for name, entry in plan.items() if name.endswith("down_proj")
    } == {("W2A16-g32", "rtn", ("bias",))}


def test_what_a_rule_fixes_of_a_fused_product_keeps_the_others_too(make: Make, tmp_path: Path) -> None:
    rule = Rule(pattern="*.k_proj", scheme=Scheme.parse("W2A16-g32"))
    search, recipes = make(Recipe(rules=(rule,)), average_bits=9.0, max_kl=0.1), list[Recipe]()
    found = search.run(rounds=0)
    apply(search, found, found.recipe(search.recipe), tmp_path, judged([1.0], recipes), repair=True)
    plan = resolve(recipes[-1], search.sites).sites
    assert {str(plan[name].scheme) for name in plan if name.endswith(("q_proj", "k_proj", "v_proj"))} == {"W2A16-g32"}


def test_only_the_best_round_keeps_its_weights(
    make: Make, recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    search, held = make(recipe, average_bits=3.6), list[int]()
    coarse = replace(search.run(rounds=0), schemes=dict.fromkeys((site.name for site in search.sites), "W2A16-g32"))
    search.budget = replace(search.budget, max_kl=1e-9)

    def watched(recipe: Recipe, folder: Path) -> QuantizeResult:
        held.append(len([run for run in folder.parent.glob("round-*") if [*run.glob("4-model/*.safetensors")]]))
        return quantize(tiny_llama_dir, recipe, folder)

    done = apply(search, coarse, coarse.recipe(recipe), tmp_path / "out", watched, repair=True)
    assert len(held) > 2
    assert max(held) == 1
    assert [*(done.result.run / "4-model").glob("*.safetensors")]


def test_a_low_rank_addend_needs_room(make: Make) -> None:
    search = make(Recipe(low_rank=LowRankOptions(rank=2)), average_bits=16.0)
    schemes = dict.fromkeys((site.name for site in search.sites), "W8A16-g32")
    num_weights = sum(site.out_features * site.in_features for site in search.sites)
    first = search.sites[0]
    size = search.size_bytes(list(schemes), "W8A16-g32")
    addend = 2 * (first.out_features + first.in_features) * 4  # bytes of a float32
    assert search.size_bytes([first.name], "W8A16-g32", addend=True) == addend + search.size_bytes(
        [first.name], "W8A16-g32"
    )
    search.budget = Budget(average_bits=8 * (size + addend) / num_weights)
    assert search.costs_fit(schemes, addends=[first.name])
    assert not search.costs_fit(schemes, addends=list(schemes))
    everywhere = make(Recipe(repairs=("low_rank",), low_rank=LowRankOptions(rank=2)), average_bits=16.0)
    everywhere.budget = search.budget
    assert not everywhere.costs_fit(schemes)


def _recipe_of(run: Path) -> dict[str, Any]:
    context = next(record for record in read_jsonl(run / "5-records.jsonl") if record["kind"] == "context")
    return context["recipe"]


@pytest.mark.parametrize("bits", [3.6, 5.0, 9.0])
def test_a_mix_exports_to_what_transformers_loads_and_vllm_can_fuse(
    make: Make, tiny_llama_dir: Path, tmp_path: Path, bits: float
) -> None:
    pytest.importorskip("compressed_tensors")
    search = make(average_bits=bits)
    found = search.run(rounds=0)
    recipe = replace(found.recipe(search.recipe), method="rtn", calibration=Calibration(seqlen=32), max_kl=100.0)
    run = quantize(tiny_llama_dir, recipe, tmp_path / "run").run
    export(run, "compressed-tensors", tmp_path / "export")  # loads it with transformers and compares
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert export_violations(config, [site.name for site in search.sites]) == ()
    written = sum(file.stat().st_size for file in (tmp_path / "export").glob("*.safetensors"))
    assert written == pytest.approx(found.size_bytes, rel=0.01)
