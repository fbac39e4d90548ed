"""Compositions: what a name stands for, and what is refused with the reason."""

from dataclasses import dataclass, replace

import pytest

from bitwright.errors import RecipeError, UnknownName
from bitwright.methods.composition import (
    EXCLUDES,
    TOO_LATE,
    check_composition,
    compose,
    needs_of_site,
    needs_own_layout,
    needs_text,
    require_known,
)
from bitwright.methods.repairs import REPAIRS
from bitwright.methods.solvers import SOLVERS
from bitwright.methods.transforms import TRANSFORMS
from bitwright.recipe import Plan, Recipe, Rule, resolve
from bitwright.schemes import Scheme


@dataclass(frozen=True)
class FakeSite:
    name: str = "model.layers.0.mlp.down_proj"
    in_features: int = 128
    kind: str = "linear"


def plan_of(recipe: Recipe) -> Plan:
    return resolve(recipe, [FakeSite()])


def recipe_of(text: str, scheme: str = "W4A16-g32") -> Recipe:
    parts = compose(text)
    return Recipe.from_mapping(
        {"scheme": scheme, "transforms": [*parts.transforms], "method": parts.method, "repairs": [*parts.repairs]}
    )


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_solver_stands_for_itself(name: str) -> None:
    parts = compose(name)
    assert (parts.transforms, parts.method, parts.repairs) == ((), name, ())


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_a_transform_alone_rounds_to_nearest(name: str) -> None:
    parts = compose(name)
    assert (parts.transforms, parts.method, parts.repairs) == ((name,), "rtn", ())


def test_a_composition_has_its_parts_in_their_places() -> None:
    parts = compose("awq+gptq+bias")
    assert (parts.transforms, parts.method, parts.repairs) == (("awq",), "gptq", ("bias",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptq+awq", "transforms first"),
        ("bias+gptq", "transforms first"),
        ("awq+awq", "each part once"),
        ("rtn+gptq", "both choose codes"),
    ],
)
def test_parts_that_do_not_follow_each_other_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compose(text)


@pytest.mark.parametrize("text", ["gtpq", "awq+gtpq", "", "gptq+"])
def test_an_unknown_part_is_named_with_what_is_known(text: str) -> None:
    with pytest.raises(UnknownName, match=r"unknown method .*Known: .*awq.*gptq"):
        compose(text)


def test_a_recipe_with_an_unknown_part_is_refused() -> None:
    for changes in ({"transforms": ["awk"]}, {"method": "gtpq"}, {"repairs": ["biass"]}):
        with pytest.raises(UnknownName, match="Did you mean"):
            require_known(Recipe.from_mapping(changes))


@pytest.mark.parametrize("pair", list(EXCLUDES))
def test_transforms_that_undo_each_other_are_refused_with_the_reason(pair: tuple[str, str]) -> None:
    recipe = Recipe.from_mapping({"scheme": "W8A8", "transforms": [*pair], "method": "gptq"})
    with pytest.raises(RecipeError, match=f"{pair[0]} and {pair[1]} do not go together: "):
        check_composition(recipe, plan_of(recipe))


@pytest.mark.parametrize("text", ["smoothquant", "llm_int8"])
def test_a_transform_for_quantized_inputs_is_refused_without_them(text: str) -> None:
    recipe = recipe_of(text)
    with pytest.raises(RecipeError, match=rf"down_proj: {text} with W4A16-g32: "):
        check_composition(recipe, plan_of(recipe))


@pytest.mark.parametrize(("first", "second"), list(TOO_LATE))
def test_a_transform_that_would_find_nothing_left_is_refused(first: str, second: str) -> None:
    scheme = "W8A8-channel"
    recipe = recipe_of(f"{first}+{second}", scheme)
    with pytest.raises(RecipeError, match=f"{first} before {second}.*Name {second} first"):
        check_composition(recipe, plan_of(recipe))
    other = recipe_of(f"{second}+{first}", scheme)
    check_composition(other, plan_of(other))


def test_what_works_without_text_is_known() -> None:
    for text in ("rtn", "hqq", "hadamard"):
        scheme = "W4A16-g32-asym"
        assert needs_text(recipe_of(text, scheme), plan_of(recipe_of(text, scheme))) is None
    for text, part in (
        ("awq", "awq"),
        ("gptq", "gptq"),
        ("signround", "signround"),
        ("rtn+bias", "bias"),
        ("rtn+low_rank", "low_rank"),
    ):
        assert needs_text(recipe_of(text), plan_of(recipe_of(text))) == part


def test_repairs_in_an_order_in_which_one_undoes_the_other_are_refused() -> None:
    for text in ("rtn+bias+low_rank", "gptq+bias+low_rank"):
        with pytest.raises(RecipeError, match=r"bias before low_rank: .*Name low_rank first"):
            check_composition(recipe_of(text), plan_of(recipe_of(text)))
    check_composition(recipe_of("rtn+low_rank+bias"), plan_of(recipe_of("rtn+low_rank+bias")))
    twice = Recipe(repairs=("low_rank", "low_rank"))
    with pytest.raises(RecipeError, match="repairs low_rank, low_rank: name each once"):
        check_composition(twice, resolve(twice, [FakeSite()]))


def test_repairs_of_a_rule_count_as_those_of_the_recipe() -> None:
    rule = Rule(pattern="*.down_proj", scheme=Scheme.parse("W4A16-g32"), repairs=("low_rank",))
    recipe = Recipe(scheme=rule.scheme, method="rtn", repairs=("bias",), rules=(rule,))
    plan = resolve(recipe, [FakeSite(), FakeSite(name="model.layers.0.mlp.up_proj")])
    assert recipe.all_repairs == ("bias", "low_rank")
    assert [entry.repairs for entry in plan.sites.values()] == [("low_rank",), ("bias",)]
    assert [needs_of_site(entry) for entry in plan.sites.values()] == [{"hessian"}, {"moments"}]
    assert needs_text(replace(recipe, repairs=()), plan) == "low_rank"
    assert needs_own_layout(replace(recipe, repairs=())) == "low_rank"
    with pytest.raises(UnknownName, match="Did you mean 'low_rank'"):
        require_known(replace(recipe, rules=(replace(rule, repairs=("low_rnk",)),)))


def test_what_only_our_own_layout_holds_is_known() -> None:
    assert needs_own_layout(recipe_of("awq+gptq")) is None
    assert needs_own_layout(recipe_of("hadamard")) == "hadamard"
    assert needs_own_layout(recipe_of("llm_int8", "W8A8")) == "llm_int8"


def test_every_part_says_what_it_is() -> None:
    for registry in (TRANSFORMS, SOLVERS, REPAIRS):
        for name in registry:
            assert registry[name].about, name
