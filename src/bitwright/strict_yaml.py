"""Frozen dataclasses from YAML and back, strictly: what is not understood is an error that names the key.

YAML forgives a great deal (a repeated key wins silently, a misspelt one is dropped by most loaders). A recipe decides
what happens to a model, so nothing is forgiven here. A dataclass with a static `parse(text)` is written as one string.
"""

import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from bitwright.errors import BitwrightError, RecipeError, did_you_mean

D = TypeVar("D")
_NAMES: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        RecipeError: the file cannot be read, is not YAML (with the line), repeats a key, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file. Check the path.") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Give a readable YAML file.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}. Give a YAML file.") from None
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"{path}{line}: malformed YAML: {problem}. Correct the file.") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: must hold keys and values, got {_describe(value)}.")
    return cast(dict[str, Any], value)


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, except that a repeated key is an error instead of a silent replacement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            simple = isinstance(key_node, yaml.ScalarNode)
            if not simple or key_node.value in seen:
                problem = f"key '{key_node.value}' appears twice" if simple else "a key must be one word"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def build(cls: type[D], value: object, where: str) -> D:
    """Build a dataclass from a mapping; `where` names the place in errors.

    Raises:
        RecipeError: an unknown or missing key, a value of the wrong type, or one that the class itself refuses.
    """
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: must hold keys and values, got {_describe(value)}.")
    mapping = cast(Mapping[Any, object], value)
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cast(Any, cls))}
    for key in mapping:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'.{did_you_mean(str(key), known)}")
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in mapping:
            raise RecipeError(f"{where}: key '{name}' is missing. Add it.")
    arguments = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in mapping.items()}
    try:
        return cls(**arguments)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def to_plain(value: object) -> Any:
    """Return the strings, numbers, lists and dicts that `build` reads back."""
    if hasattr(type(value), "parse"):
        return str(value)
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in cast(Mapping[object, object], value).items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in cast(tuple[object, ...], value)]
    return value


def _convert(hint: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_optional(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where}: unknown value {value!r}.{did_you_mean(str(value), arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where}: must be a list, got {_describe(value)}.")
        items = cast(list[object], value)
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: must hold keys and values, got {_describe(value)}.")
        entries = cast(dict[str, Any], value)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in entries.items()}
    if hasattr(hint, "parse"):
        return _parse(hint, value, where)
    if is_dataclass(hint):
        return build(cast(type[Any], hint), value, where)
    return _convert_scalar(hint, value, where)


def _convert_optional(arguments: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None:
        return None
    (hint,) = (argument for argument in arguments if argument is not types.NoneType)
    return _convert(hint, value, where)


def _parse(hint: Any, value: object, where: str) -> Any:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: must be text, got {_describe(value)}.")
    try:
        return hint.parse(value)
    except BitwrightError as error:
        raise type(error)(f"{where}: {error}") from None


def _convert_scalar(hint: Any, value: object, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise RecipeError(f"{where}: must be {_NAMES[hint]}, got {_describe(value)}.")
    return value


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    return f"the text {value!r}" if isinstance(value, str) else repr(value)
