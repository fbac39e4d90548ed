"""A recipe from a YAML file and the options that override it: the one way for every command that quantizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.methods.composition import compose
from bitwright.recipe import Recipe, load_recipe


def build_recipe(
    file: Path | None, given: Mapping[str, Any], calibration: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> Recipe:
    """Return the file's recipe, or the default one, with everything replaced that is given; None is not given.

    Args:
        file: a YAML recipe; None for the defaults.
        given: options by their names in a recipe; `method` may be a composition such as `awq+gptq+bias`, and replaces
            the transforms and repairs of the file as well.
        calibration: likewise, of its `calibration`.
        ignore: patterns to add to those of the file.
    Raises:
        RecipeError, UnknownName: the file or an option holds something that a recipe does not know, or a composition
            does not go together.
    """
    mapping = (Recipe() if file is None else load_recipe(file)).to_mapping()
    mapping.update({key: value for key, value in given.items() if value is not None})
    if given.get("method") is not None:
        parts = compose(given["method"])
        mapping |= {"transforms": [*parts.transforms], "method": parts.method, "repairs": [*parts.repairs]}
    mapping["calibration"].update({key: value for key, value in calibration.items() if value is not None})
    mapping["ignore"] = [*mapping["ignore"], *ignore]
    return Recipe.from_mapping(mapping, where="options")
