import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import BitwrightError, RecipeError, ShapeError
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.ranges import RANGE_METHODS
from bitwright.options import GptqOptions
from bitwright.recipe import (
    LEVEL_METHODS,
    Calibration,
    Plan,
    RangeMethod,
    Recipe,
    Rule,
    load_recipe,
    matches,
    resolve,
)
from bitwright.schemes import FAMILIES, Scheme


@dataclass(frozen=True, kw_only=True)
class FakeSite:
    name: str
    in_features: int = 256
    out_features: int = 256
    kind: str = "linear"
    transposed: bool = False


def block_sites(in_features: int = 256) -> list[FakeSite]:
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    sites = [FakeSite(name=f"model.layers.{i}.{name}", in_features=in_features) for i in range(2) for name in names]
    return [*sites, FakeSite(name="model.layers.1.mlp.gate", kind="router")]


def scheme(name: str) -> Scheme:
    return Scheme.parse(name)


# Recipes

FULL = """
scheme: W3A16-g64-asym
method: gptq
rules:
  - pattern: "*.down_proj"
    scheme: W8A16
    method: rtn
  - {pattern: 're:.*layers\\.0\\..*', scheme: null}
ignore: [lm_head, "*.o_proj"]
range_method: mse
importance: fisher
ragged: divisor
layout: bitwright
gptq: {damp: 0.05, block: 64, act_order: false}
calibration: {text: calib.txt, num_samples: 16, seqlen: 256, seed: 7}
max_kl: 1
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_full_recipe_is_read_exactly(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, FULL)) == Recipe(
        scheme=scheme("W3A16-g64-asym"),
        method="gptq",
        rules=(
            Rule(pattern="*.down_proj", scheme=scheme("W8A16-channel"), method="rtn"),
            Rule(pattern=r"re:.*layers\.0\..*", scheme=None),
        ),
        ignore=("lm_head", "*.o_proj"),
        range_method="mse",
        importance="fisher",
        ragged="divisor",
        layout="bitwright",
        gptq=GptqOptions(damp=0.05, block=64, act_order=False),
        calibration=Calibration(text="calib.txt", num_samples=16, seqlen=256, seed=7),
        max_kl=1.0,
    )


@pytest.mark.parametrize("source", ["{}", FULL, "{scheme: kmeans4-g64-o0.45}", "{scheme: W4A8-static-entropy-actasym}"])
def test_a_recipe_survives_the_round_trip_through_json(source: str, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, source))
    again = Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping())))
    assert again == recipe
    assert again.hash() == recipe.hash()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shceme: W4A16", r"recipe.yaml: unknown key 'shceme'. Did you mean 'scheme'\?"),
        ("gptq: {dampp: 1.0}", r"recipe.yaml: gptq: unknown key 'dampp'. Did you mean 'damp'\?"),
        ("scheme: W4A16-g", r"recipe.yaml: scheme: unknown scheme 'W4A16-g'. .*Did you mean 'W4A16-g"),
        ("scheme: W9A16", r"recipe.yaml: scheme: scheme 'W9A16': 9 weight bits are out of range. Use 2 to 8."),
        ("scheme: 4", r"recipe.yaml: scheme: must be text, got 4."),
        ("scheme:", r"recipe.yaml: scheme: must be text, got nothing."),
        ("gptq: {damp: 1e-2}", r"recipe.yaml: gptq: damp: must be a number, got the text '1e-2'."),
        ("gptq: {damp: 0}", r"recipe.yaml: gptq: gptq.damp must be a finite number above 0, got 0.0."),
        ("gptq: {damp: .nan}", r"gptq.damp must be a finite number above 0, got nan."),
        ("gptq: {block: 12.5}", r"recipe.yaml: gptq: block: must be a whole number, got 12.5."),
        ("gptq: {block: true}", r"recipe.yaml: gptq: block: must be a whole number, got True."),
        ("gptq: {act_order: 1}", r"recipe.yaml: gptq: act_order: must be true or false, got 1."),
        ("gptq: static", r"recipe.yaml: gptq: must hold keys and values, got the text 'static'."),
        ("layout: gguf", r"recipe.yaml: layout: unknown value 'gguf'. Known: auto, bitwright, compressed-tensors."),
        ("importance: fishre", r"recipe.yaml: importance: unknown value 'fishre'. Did you mean 'fisher'\?"),
        ("scheme: nf4-asym", r"recipe.yaml: scheme: scheme 'nf4-asym': only integers have a zero point"),
        ("scheme: ternry", r"recipe.yaml: scheme: unknown scheme 'ternry'. .*Did you mean 'ternary'\?"),
        ("range_method: twm", r"recipe.yaml: range_method: unknown value 'twm'. Did you mean 'twn'\?"),
        (
            "range_method: twn",
            r"recipe.yaml: range_method 'twn' is for ternary weights, and scheme W4A16-g128 has others. "
            "Use range_method auto.",
        ),
        ("ragged: pad", r"recipe.yaml: ragged: unknown value 'pad'. Known: auto, divisor, refuse."),
        ("range_method: minmx", r"recipe.yaml: range_method: unknown value 'minmx'. Did you mean 'minmax'\?"),
        ("ignore: lm_head", r"recipe.yaml: ignore: must be a list, got the text 'lm_head'."),
        ("ignore: [3]", r"recipe.yaml: ignore\[0\]: must be text, got 3."),
        ("ignore: ['re:(']", r"recipe.yaml: pattern 're:\(' is not a regular expression"),
        ("ignore: ['']", r"recipe.yaml: pattern must be a shell pattern"),
        ("rules: [{pattern: 'a'}]", r"recipe.yaml: rules\[0\]: key 'scheme' is missing. Add it."),
        ("max_kl: -1", r"recipe.yaml: max_kl must be a finite number above 0, got -1.0."),
        ("calibration: {seqlen: 0}", r"calibration.seqlen must be at least 2, got 0."),
        (
            "scheme: W4A16\nscheme: W8A16",
            r"recipe.yaml:2: malformed YAML: key 'scheme' appears twice. Correct the file.",
        ),
        ("scheme: W4A16\nignore: [a", r"recipe.yaml:2: malformed YAML: "),
        ("method: gptq\n\tx: 1", r"recipe.yaml:2: malformed YAML: "),
        ("!!python/object/apply:os.getcwd []", r"recipe.yaml:1: malformed YAML: "),
        ("? [a, b]\n: 1", r"recipe.yaml:1: malformed YAML: "),
        ("", r"recipe.yaml: must hold keys and values, got nothing."),
        ("- a", r"recipe.yaml: must hold keys and values, got a list."),
    ],
)
def test_every_flaw_is_one_line_that_names_the_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"scheme: \xff")
    with pytest.raises(RecipeError, match="not UTF-8 text at byte 8"):
        load_recipe(tmp_path / "binary.yaml")


def test_the_hash_follows_what_determines_the_tensors() -> None:
    base = Recipe()
    assert len(base.hash()) == 64
    assert base.hash() == dataclasses.replace(base, max_kl=9.0).hash()
    changed = [
        dataclasses.replace(base, scheme=scheme("W3A16")),
        dataclasses.replace(base, method="rtn"),
        dataclasses.replace(base, rules=(Rule(pattern="*", scheme=None),)),
        dataclasses.replace(base, ignore=()),
        dataclasses.replace(base, range_method="mse"),
        dataclasses.replace(base, importance="fisher"),
        dataclasses.replace(base, ragged="divisor"),
        dataclasses.replace(base, layout="bitwright"),
        dataclasses.replace(base, gptq=GptqOptions(damp=0.02)),
        dataclasses.replace(base, calibration=Calibration(seed=1)),
    ]
    assert len({base.hash(), *(recipe.hash() for recipe in changed)}) == len(changed) + 1


def test_the_automatic_range_method_depends_on_statistics_and_a_named_one_never_falls_back() -> None:
    assert Recipe().range_method_for(has_statistics=True) == "importance"
    assert Recipe().range_method_for(has_statistics=False) == "mse"
    assert Recipe(range_method="percentile").range_method_for(has_statistics=True) == "percentile"
    with pytest.raises(RecipeError, match="'importance' needs statistics"):
        Recipe(range_method="importance").range_method_for(has_statistics=False)


def test_every_range_method_has_its_name_in_recipes() -> None:
    assert set(get_args(RangeMethod)) == {*RANGE_METHODS, "auto", "importance"}
    for method in RANGE_METHODS:
        given = scheme("ternary") if method in LEVEL_METHODS else scheme("W4A16")
        assert Recipe(scheme=given, range_method=method).range_method_for(has_statistics=True) == method  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "formats"), [("absmean", {"ternary", "binary"}), ("twn", {"ternary"})])
def test_methods_that_place_levels_are_refused_for_other_formats_before_any_work(
    method: RangeMethod, formats: set[str]
) -> None:
    assert set(LEVEL_METHODS[method]) == formats <= set(FORMATS)
    fitting = Recipe(scheme=scheme("ternary-g64"), range_method=method)
    assert dataclasses.replace(fitting, rules=(Rule(pattern="*", scheme=None),)).range_method == method
    for name in (*FAMILIES, "W2A16-g64", "W8A8"):
        if name in formats:
            assert Recipe(scheme=scheme(name), range_method=method).range_method == method
            continue
        says = f"range_method '{method}' is for .*ternary weights, and scheme {scheme(name)} has others"
        with pytest.raises(RecipeError, match=says):
            Recipe(scheme=scheme(name), range_method=method)
        with pytest.raises(RecipeError, match=says):
            dataclasses.replace(fitting, rules=(Rule(pattern="*.down_proj", scheme=scheme(name)),))


def test_all_named_methods_are_listed_once() -> None:
    rules = tuple(Rule(pattern="*", scheme=scheme("W8A16"), method=method) for method in ("rtn", None, "rtn"))
    assert Recipe(method="gptq", rules=rules).methods == ("gptq", "rtn")


# Patterns and plans


def test_patterns_cover_whole_names_and_mind_case() -> None:
    assert matches("*.down_proj", "model.layers.0.mlp.down_proj")
    assert not matches("down_proj", "model.layers.0.mlp.down_proj")
    assert not matches("*.DOWN_proj", "model.layers.0.mlp.down_proj")
    assert matches(r"re:.*\.[0-3]\..*_proj", "model.layers.2.mlp.down_proj")
    assert not matches("re:model", "model.layers.2")


def test_every_site_is_accounted_for_with_its_reason() -> None:
    recipe = Recipe(
        scheme=scheme("W4A16-g64"),
        rules=(
            Rule(pattern="*.down_proj", scheme=scheme("W8A16"), method="rtn"),
            Rule(pattern="model.layers.1.mlp.down_proj", scheme=scheme("W2A16-g32")),
            Rule(pattern="*.up_proj", scheme=None),
        ),
        ignore=("lm_head", "*.0.self_attn.*"),
    )
    sites = block_sites()
    plan = resolve(recipe, sites)
    assert list(plan.sites) == [site.name for site in sites]
    told = {
        name: (str(entry.scheme) if entry.scheme else None, entry.group_size, entry.method, entry.reason)
        for name, entry in plan.sites.items()
    }
    ignored = (None, None, None, "ignored by pattern '*.0.self_attn.*'")
    kept = (None, None, None, "kept by rule '*.up_proj'")
    assert told == {
        "model.layers.0.self_attn.q_proj": ignored,
        "model.layers.0.self_attn.o_proj": ignored,
        "model.layers.0.mlp.up_proj": kept,
        "model.layers.0.mlp.down_proj": ("W8A16-channel", None, "rtn", "rule '*.down_proj'"),
        "model.layers.1.self_attn.q_proj": ("W4A16-g64", 64, "gptq", "recipe"),
        "model.layers.1.self_attn.o_proj": ("W4A16-g64", 64, "gptq", "recipe"),
        "model.layers.1.mlp.up_proj": kept,
        "model.layers.1.mlp.down_proj": ("W2A16-g32", 32, "gptq", "rule 'model.layers.1.mlp.down_proj'"),
        "model.layers.1.mlp.gate": (None, None, None, "router"),
    }
    assert set(plan.quantized) | set(plan.kept) == set(plan.sites)
    assert len(plan.quantized) == 4
    assert plan.sites["model.layers.1.self_attn.q_proj"].granularity == Granularity(kind="group", group_size=64)
    assert plan.sites["model.layers.0.mlp.down_proj"].granularity == Granularity(kind="channel")
    assert plan.sites["model.layers.1.mlp.gate"].granularity is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe(ignore=("*.dwn_proj",)),
            r"ignore pattern '\*.dwn_proj' matches no site. Did you mean '\*.down_proj'\?",
        ),
        (Recipe(ignore=("model.layers.7.mlp.up_proj",)), r"matches no site. Did you mean 'model.layers.1.mlp.up_proj'"),
        (Recipe(rules=(Rule(pattern="*.q", scheme=None),)), r"rule pattern '\*.q' matches no site."),
        (
            Recipe(rules=(Rule(pattern="*.gate", scheme=Scheme.parse("W8A16")),)),
            r"rule pattern '\*.gate' matches no site that can be quantized.",
        ),
        (
            Recipe(rules=(Rule(pattern="lm_head", scheme=Scheme.parse("W8A16")),)),
            r"rule pattern 'lm_head' matches no site that can be quantized.",
        ),
        (Recipe(ignore=("*_proj",)), "the recipe quantizes nothing: all 9 sites are kept"),
    ],
)
def test_patterns_without_effect_are_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(recipe, block_sites())


@pytest.mark.parametrize("pattern", ["lm_head", "*lm_head", "re:.*lm_head"])
def test_a_head_may_be_ignored_although_it_is_no_site(pattern: str) -> None:
    assert len(resolve(Recipe(ignore=(pattern,)), block_sites()).quantized) == 8


def test_two_sites_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="2 sites share 1 names"):
        resolve(Recipe(), [FakeSite(name="a"), FakeSite(name="a")])


@pytest.mark.parametrize(
    ("name", "in_features", "effective"),
    [
        ("W4A8-g32-static-mse", 172, "W4A8-g43-static-mse"),
        ("W4A8-g32", 64, "W4A8-g32"),
        ("W8A8", 172, "W8A8-channel"),
        ("fp8-block128", 172, "fp8-block128"),
        ("kmeans4-g32-o0.45", 172, "kmeans4-g32-o0.45"),
    ],
)
def test_the_effective_scheme_has_the_resolved_group_size(name: str, in_features: int, effective: str) -> None:
    (entry,) = resolve(Recipe(scheme=scheme(name)), [FakeSite(name="a", in_features=in_features)]).sites.values()
    assert str(entry.effective) == effective
    assert entry.effective is not None
    assert entry.granularity == entry.effective.weights.granularity
    assert str(entry.scheme) == str(scheme(name))


DOWN = "model.layers.3.mlp.down_proj"


def group_size(name: str, in_features: int, ragged: str) -> int | None:
    recipe = Recipe.from_mapping({"scheme": name, "ragged": ragged})
    sites: Sequence[FakeSite] = [FakeSite(name=DOWN, in_features=in_features)]
    return resolve(recipe, sites).sites[DOWN].group_size


@pytest.mark.parametrize(
    ("name", "in_features", "ragged", "expected"),
    [
        ("W4A16-g128", 11008, "refuse", 128),
        ("W4A16-g32", 172, "auto", 43),
        ("W4A16-g32", 172, "divisor", 43),
        ("W4A16-g96", 11008, "divisor", 86),
        ("W4A16-g32", 37, "auto", 37),
        ("W4A16-channel", 37, "refuse", None),
        ("W4A16-tensor", 37, "refuse", None),
        ("W4A16-g37", 37, "refuse", 37),
        # Formats with a shorter last group need no substitute.
        *((name, 100, "refuse", 64) for name in ("nf4", "nf4-dq", "lut4", "kmeans4-g64", "ternary-g64", "fp8-g64")),
        *((name, 100, "refuse", 32) for name in ("mxfp4", "mxint8", "fp4-e2m1")),
        ("nvfp4", 100, "refuse", 16),
        ("nf4-g128", 100, "refuse", 128),
        ("fp8-block128", 100, "refuse", 128),
        ("W8A8-block32", 100, "refuse", 32),
    ],
)
def test_resolved_group_sizes(name: str, in_features: int, ragged: str, expected: int | None) -> None:
    assert group_size(name, in_features, ragged) == expected


@pytest.mark.parametrize(
    ("name", "in_features", "ragged", "message"),
    [
        ("W4A16-g96", 11008, "auto", "in_features 11008 is not divisible by group_size 96. Use 32, 64 or 128, or "),
        ("W4A16-g96", 11008, "refuse", "in_features 11008 is not divisible by group_size 96. Use 32, 64 or 128, or "),
        ("W4A16-g32", 172, "refuse", "in_features 172 is not divisible by group_size 32. Use 43, or "),
        ("W4A16-g32", 48, "auto", "in_features 48 is not divisible by group_size 32. Use 16, or "),
    ],
)
def test_ragged_rows_that_are_refused(name: str, in_features: int, ragged: str, message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        group_size(name, in_features, ragged)
    assert str(caught.value) == f"{DOWN}: {message}ragged: divisor."


@pytest.mark.parametrize("ragged", ["auto", "refuse", "divisor"])
def test_a_group_longer_than_the_row_is_refused(ragged: str) -> None:
    with pytest.raises(ShapeError) as caught:
        group_size("W4A16-g128-asym", 64, ragged)
    assert str(caught.value) == (
        f"{DOWN}: in_features 64 is smaller than group_size 128. Use 16, 32 or 64, or scheme W4A16-channel-asym."
    )


@given(row=st.integers(1, 3000), asked=st.integers(1, 300))
def test_a_substitute_divides_the_row_and_is_recorded(row: int, asked: int) -> None:
    recipe = Recipe.from_mapping({"scheme": f"W4A16-g{asked}", "ragged": "divisor"})
    if asked > row:
        with pytest.raises(ShapeError):
            resolve(recipe, [FakeSite(name=DOWN, in_features=row)])
        return
    entry = resolve(recipe, [FakeSite(name=DOWN, in_features=row)]).sites[DOWN]
    assert entry.group_size is not None
    assert row % entry.group_size == 0
    assert entry.group_size == asked or f"group_size {entry.group_size} in place of {asked}" in entry.reason
    assert (entry.group_size == asked) == (row % asked == 0)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    rules = (
        Rule(pattern="*.down_proj", scheme=scheme("W8A16"), method="rtn"),
        Rule(pattern="*.up_proj", scheme=scheme("W4A8-g64-static-entropy-actasym")),
        Rule(pattern="*.o_proj", scheme=scheme("kmeans4-channel-o0.45")),
    )
    plan = resolve(Recipe(scheme=scheme("W4A16-g64"), rules=rules), block_sites())
    (tmp_path / "3-plan.yaml").write_text(plan.to_yaml())
    again = Plan.load(tmp_path / "3-plan.yaml")
    assert again == plan
    assert list(again.sites) == list(plan.sites)


def test_a_plan_with_a_stray_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "3-plan.yaml").write_text("sites:\n  a: {scheme: W4A16, group_size: 128, method: rtn, why: x}\n")
    with pytest.raises(RecipeError, match=r"sites.a: unknown key 'why'"):
        Plan.load(tmp_path / "3-plan.yaml")
