"""What to do to a model, as data: Rule, Recipe (a user's wishes), Plan (resolved); schemes have a file of their own.

A recipe is written by people, so its loader refuses what it does not understand. A plan is made by `resolve` from a
recipe and the sites of one model; it says for every site what happens and why, and the rest of bitwright obeys it.

Patterns are shell patterns over whole site names (`*.down_proj`, `model.layers.[01].*`), or `re:` and a regular
expression that must match the whole name. Precedence: sites that are neither a linear nor an expert stay in 16 bit;
then any ignore pattern; then the last matching rule; then the recipe's own scheme and method. Every pattern must match
some site, except one that matches `lm_head`: heads are kept whether or not a recipe says so.
"""

import difflib
import fnmatch
import glob
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import yaml

from bitwright.errors import RecipeError, ShapeError
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import IntegerFormat
from bitwright.options import (
    AutoOptions,
    AwqOptions,
    BlockApOptions,
    GptqOptions,
    HqqOptions,
    LlmInt8Options,
    LowRankOptions,
    RotationOptions,
    SignRoundOptions,
    SmoothQuantOptions,
)
from bitwright.schemes import MODEL_SCALE, Scheme
from bitwright.strict_yaml import build, read_yaml_mapping, to_plain

STANDARD_GROUP_SIZES = (16, 32, 64, 128, 256)
QUANTIZABLE_KINDS = ("linear", "expert")
HEAD_NAME = "lm_head"
# Range methods that place levels instead of covering a range, and the formats that have such levels.
LEVEL_METHODS = {"absmean": ("binary", "ternary"), "twn": ("ternary",)}

RangeMethod = Literal["auto", "minmax", "percentile", "mse", "importance", "absmean", "twn"]
Ragged = Literal["auto", "refuse", "divisor"]
Importance = Literal["inputs", "fisher"]
Layout = Literal["auto", "compressed-tensors", "bitwright"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """An exception for matching sites: a scheme (None leaves them in 16 bit), a method and repairs.

    Without a method or repairs of its own it takes the recipe's.
    """

    pattern: str
    scheme: Scheme | None
    method: str | None = None
    repairs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_pattern(self.pattern)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The text statistics are collected on (file, `stdlib`, `hub:...`, `self`; None: no data) and how much of it."""

    text: str | None = None
    num_samples: int = 128
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.num_samples >= 1, "calibration.num_samples", self.num_samples, "at least 1")
        _check(self.seqlen >= 2, "calibration.seqlen", self.seqlen, "at least 2")
        _check(self.seed >= 0, "calibration.seed", self.seed, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A user's wishes for one model.

    `transforms` change the model without changing its function, in their order; `method` then chooses codes, and
    `repairs` make up for errors that are left. A composition such as `awq+gptq+bias` says all three in one name.
    `range_method` "auto" is importance-weighted MSE where a site's method collects statistics, plain MSE where not;
    "absmean" (ternary, binary) and "twn" (ternary) take every scheme of the recipe to be of these formats.
    `importance` "fisher" weighs each weight of a codebook by its Fisher information, "inputs" by its column's mean
    square.
    `ragged` says what happens when a group size does not divide a row: "refuse"; "divisor" uses the divisor of the row
    nearest (in ratio) to the asked size; "auto" refuses when some standard size divides the row (the size was a poor
    choice) and uses the nearest divisor when none does (the row is odd). `layout` "auto" writes compressed-tensors
    where it holds every site and bitwright's own layout otherwise. `max_kl` is the mean KL divergence in nats per token
    above which the result counts as collapsed.
    """

    scheme: Scheme = field(default_factory=lambda: Scheme.parse("W4A16-g128"))
    transforms: tuple[str, ...] = ()
    method: str = "gptq"
    repairs: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = (HEAD_NAME,)
    range_method: RangeMethod = "auto"
    importance: Importance = "inputs"
    ragged: Ragged = "auto"
    layout: Layout = "auto"
    gptq: GptqOptions = field(default_factory=GptqOptions)
    awq: AwqOptions = field(default_factory=AwqOptions)
    smoothquant: SmoothQuantOptions = field(default_factory=SmoothQuantOptions)
    rotation: RotationOptions = field(default_factory=RotationOptions)
    llm_int8: LlmInt8Options = field(default_factory=LlmInt8Options)
    hqq: HqqOptions = field(default_factory=HqqOptions)
    low_rank: LowRankOptions = field(default_factory=LowRankOptions)
    signround: SignRoundOptions = field(default_factory=SignRoundOptions)
    block_ap: BlockApOptions = field(default_factory=BlockApOptions)
    auto: AutoOptions = field(default_factory=AutoOptions)
    calibration: Calibration = field(default_factory=Calibration)
    max_kl: float = 1.0

    def __post_init__(self) -> None:
        for pattern in self.ignore:
            _check_pattern(pattern)
        _check(self.max_kl > 0 and math.isfinite(self.max_kl), "max_kl", self.max_kl, "a finite number above 0")
        fitting = LEVEL_METHODS.get(self.range_method)
        for scheme in (self.scheme, *(rule.scheme for rule in self.rules)):
            if fitting and scheme is not None and scheme.weights.format.name not in fitting:
                raise RecipeError(
                    f"range_method '{self.range_method}' is for {' and '.join(fitting)} weights, and scheme {scheme} "
                    "has others. Use range_method auto."
                )

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method the recipe names, its own first; whoever knows the methods checks them before any work."""
        return tuple(dict.fromkeys([self.method, *(rule.method for rule in self.rules if rule.method is not None)]))

    @property
    def all_repairs(self) -> tuple[str, ...]:
        """Every repair that the recipe names, for all sites or by a rule."""
        named = (self.repairs, *(rule.repairs for rule in self.rules if rule.repairs is not None))
        return tuple(dict.fromkeys(name for repairs in named for name in repairs))

    def range_method_for(self, *, has_statistics: bool) -> RangeMethod:
        """Return the range method a site really uses; never "auto".

        Raises:
            RecipeError: importance was asked for by name and the site's method collects no statistics.
        """
        if self.range_method == "auto":
            return "importance" if has_statistics else "mse"
        if self.range_method == "importance" and not has_statistics:
            raise RecipeError(
                "range_method 'importance' needs statistics, which the method does not collect. Use range_method auto."
            )
        return self.range_method

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any], *, where: str = "recipe") -> "Recipe":
        """Build a recipe from plain data; an unknown key, a wrong type or an impossible value is a RecipeError."""
        return build(Recipe, mapping, where)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data (strings, numbers, lists, dicts) that `from_mapping` reads back to an equal recipe."""
        return cast(dict[str, Any], to_plain(self))

    def hash(self) -> str:
        """SHA-256 of all that determines the tensors, so not of the gate; a text source counts by name, not content."""
        mapping = self.to_mapping()
        del mapping["max_kl"]
        return hashlib.sha256(json.dumps(mapping, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or holds something a recipe does not know.
    """
    return Recipe.from_mapping(read_yaml_mapping(path), where=str(path))


class Site(Protocol):
    """What `resolve` needs to know of a weight site; `in_features` counts the inputs, however the weight is stored."""

    @property
    def name(self) -> str:
        """Module path, unique in the model."""
        ...

    @property
    def in_features(self) -> int:
        """Length of a row: the inputs that one output sums over."""
        ...

    @property
    def kind(self) -> str:
        """`linear` or `expert`; any other kind (`router`) stays in 16 bit."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePlan:
    """What happens to one site and why: scheme None = kept in 16 bit; `group_size` is the one really used."""

    scheme: Scheme | None
    group_size: int | None
    method: str | None
    reason: str
    repairs: tuple[str, ...] = ()

    @property
    def granularity(self) -> Granularity | None:
        """The scheme's granularity with the resolved group size; None for a kept site."""
        if self.scheme is None:
            return None
        granularity = self.scheme.weights.granularity
        return replace(granularity, group_size=self.group_size) if granularity.kind == "group" else granularity

    @property
    def effective(self) -> Scheme | None:
        """The scheme with the resolved group size."""
        if self.scheme is None or self.granularity is None:
            return None
        return self.scheme.with_granularity(self.granularity)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every site of a model, in the model's order, with what happens to it."""

    sites: Mapping[str, SitePlan]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the sites that will be quantized."""
        return tuple(name for name, site in self.sites.items() if site.scheme is not None)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the sites that stay in 16 bit."""
        return tuple(name for name, site in self.sites.items() if site.scheme is None)

    def to_yaml(self) -> str:
        """Return the text of `3-plan.yaml`."""
        return yaml.safe_dump(to_plain(self), sort_keys=False, width=120)

    @staticmethod
    def load(path: Path) -> "Plan":
        """Read a plan that `to_yaml` wrote; anything else is a RecipeError."""
        return build(Plan, read_yaml_mapping(path), str(path))


def resolve(recipe: Recipe, sites: Sequence[Site]) -> Plan:
    """Decide what happens to every site of a model.

    Raises:
        RecipeError: a pattern matches nothing, or nothing would be quantized.
        ShapeError: a group size does not fit a row and the recipe does not allow another.
    """
    _check_coverage(recipe, sites)
    plan = Plan(sites={site.name: _plan_site(recipe, site) for site in sites})
    if len(plan.sites) != len(sites):
        raise RecipeError(f"{len(sites)} sites share {len(plan.sites)} names. Each site needs its own name.")
    if not plan.quantized:
        raise RecipeError(f"the recipe quantizes nothing: all {len(sites)} sites are kept. Loosen its ignore patterns.")
    return plan


def matches(pattern: str, name: str) -> bool:
    """Say whether a recipe's pattern covers a site's name; case matters and the whole name must match."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def rule_of(recipe: Recipe, name: str) -> Rule | None:
    """Return the rule that decides about a site: the last one that matches."""
    return next((rule for rule in reversed(recipe.rules) if matches(rule.pattern, name)), None)


def pattern_of(name: str) -> str:
    """Return the pattern that a site alone matches; names of experts end in `[0]`, which would be a class."""
    return glob.escape(name)


def _check_coverage(recipe: Recipe, sites: Sequence[Site]) -> None:
    names = [site.name for site in sites]
    quantizable = [site.name for site in sites if site.kind in QUANTIZABLE_KINDS]
    for pattern in recipe.ignore:
        _check_matches("ignore pattern", pattern, [*names, HEAD_NAME], "site")
    for rule in recipe.rules:
        if rule.scheme is None:
            _check_matches("rule pattern", rule.pattern, [*names, HEAD_NAME], "site")
        else:
            _check_matches("rule pattern", rule.pattern, quantizable, "site that can be quantized")


def _check_matches(what: str, pattern: str, names: Sequence[str], noun: str) -> None:
    if any(matches(pattern, name) for name in names):
        return
    globs = sorted({f"*.{name.rsplit('.', 1)[-1]}" for name in names})
    close = difflib.get_close_matches(pattern, [*globs, *names], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise RecipeError(f"{what} '{pattern}' matches no {noun}.{hint} Known: {', '.join(globs)}.")


def _plan_site(recipe: Recipe, site: Site) -> SitePlan:
    if site.kind not in QUANTIZABLE_KINDS:
        return _kept(site.kind)
    for pattern in recipe.ignore:
        if matches(pattern, site.name):
            return _kept(f"ignored by pattern '{pattern}'")
    scheme, method, repairs, reason = recipe.scheme, recipe.method, recipe.repairs, "recipe"
    rule = rule_of(recipe, site.name)
    if rule is not None:
        if rule.scheme is None:
            return _kept(f"kept by rule '{rule.pattern}'")
        scheme, method, reason = rule.scheme, rule.method or recipe.method, f"rule '{rule.pattern}'"
        repairs = recipe.repairs if rule.repairs is None else rule.repairs
    group_size = _group_size(scheme, site, recipe.ragged)
    asked = scheme.weights.granularity.group_size
    if group_size != asked:
        reason += f"; group_size {group_size} in place of {asked}, which does not divide in_features {site.in_features}"
    return SitePlan(scheme=scheme, group_size=group_size, method=method, reason=reason, repairs=repairs)


def _kept(reason: str) -> SitePlan:
    return SitePlan(scheme=None, group_size=None, method=None, reason=reason)


def _group_size(scheme: Scheme, site: Site, ragged: Ragged) -> int | None:
    """The group size to use: only integers must divide the row, since other formats may have a shorter last group."""
    granularity, row = scheme.weights.granularity, site.in_features
    asked = granularity.group_size
    is_integer = isinstance(scheme.weights.format, IntegerFormat) and scheme.weights.scale == MODEL_SCALE
    if granularity.kind != "group" or asked is None or row % asked == 0 or not is_integer:
        return asked
    standard = [size for size in STANDARD_GROUP_SIZES if row % size == 0]
    usable = sorted(sorted(standard, key=lambda size: (abs(size - asked), size))[:3])
    if asked > row:
        per_row = scheme.with_granularity(Granularity(kind="channel"))
        problem, remedy = f"smaller than group_size {asked}", f"scheme {per_row}"
    elif ragged == "divisor" or (ragged == "auto" and not standard):
        return _nearest_divisor(row, asked)
    else:
        problem, remedy = f"not divisible by group_size {asked}", "ragged: divisor"
    sizes = usable or [_nearest_divisor(row, min(asked, row))]
    raise ShapeError(f"{site.name}: in_features {row} is {problem}. Use {_either(sizes)}, or {remedy}.")


@cache
def _nearest_divisor(row: int, asked: int) -> int:
    # Nearest in ratio, because the cost of scales is one: for 32 in a prime row of 37 that is 37, never 1.
    divisors = [size for size in range(1, row + 1) if row % size == 0]
    return min(divisors, key=lambda size: (max(size, asked) / min(size, asked), size))


def _either(sizes: Sequence[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last


def _check_pattern(pattern: str) -> None:
    _check(pattern not in ("", "re:"), "pattern", pattern, "a shell pattern, or re: and a regular expression")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise RecipeError(f"pattern '{pattern}' is not a regular expression: {error}. Correct it.") from None


def _check(holds: bool, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"{key} must be {wanted}, got {value!r}.")
