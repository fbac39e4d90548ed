"""The recipes that ship: each can be read, names what exists, and goes together with its own scheme."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from bitwright.methods.composition import check_composition, require_known
from bitwright.recipe import load_recipe, resolve

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class FakeSite:
    name: str = "model.layers.0.mlp.down_proj"
    in_features: int = 256
    kind: str = "linear"


def test_there_is_one_for_every_budget() -> None:
    assert {file.stem for file in RECIPES} == {"w8a8", "w4", "w3", "w2", "w4a8", "w4a4", "data-free", "fast"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_goes_together(file: Path) -> None:
    recipe = load_recipe(file)
    require_known(recipe)
    check_composition(recipe, resolve(recipe, [FakeSite()]))
    assert file.read_text().startswith("# "), "says what chose it"
