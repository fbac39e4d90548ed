"""Compositions: what a name stands for, and what is refused with the reason."""

from dataclasses import dataclass

import pytest

from bitwright.errors import RecipeError, UnknownName
from bitwright.methods.composition import (
    EXCLUDES,
    check_composition,
    compose,
    needs_own_layout,
    needs_text,
    require_known,
)
from bitwright.methods.repairs import REPAIRS
from bitwright.methods.solvers import SOLVERS
from bitwright.methods.transforms import TRANSFORMS
from bitwright.recipe import Plan, Recipe, resolve


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


def test_what_works_without_text_is_known() -> None:
    for text in ("rtn", "hqq", "hadamard"):
        scheme = "W4A16-g32-asym"
        assert needs_text(recipe_of(text, scheme), plan_of(recipe_of(text, scheme))) is None
    for text, part in (("awq", "awq"), ("gptq", "gptq"), ("signround", "signround"), ("rtn+bias", "bias")):
        assert needs_text(recipe_of(text), plan_of(recipe_of(text))) == part


def test_what_only_our_own_layout_holds_is_known() -> None:
    assert needs_own_layout(recipe_of("awq+gptq")) is None
    assert needs_own_layout(recipe_of("hadamard")) == "hadamard"
    assert needs_own_layout(recipe_of("llm_int8", "W8A8")) == "llm_int8"


def test_every_part_says_what_it_is() -> None:
    for registry in (TRANSFORMS, SOLVERS, REPAIRS):
        for name in registry:
            assert registry[name].about, name
