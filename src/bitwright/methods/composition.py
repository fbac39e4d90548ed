"""Compositions: `awq+gptq+bias` names transforms, one solver and repairs; what does not go together is refused."""

from dataclasses import dataclass

from bitwright.errors import RecipeError, UnknownName, did_you_mean
from bitwright.methods.low_rank import LOW_RANK
from bitwright.methods.repairs import REPAIRS
from bitwright.methods.solvers import SOLVERS, Need
from bitwright.methods.transforms import TRANSFORMS
from bitwright.recipe import Plan, Recipe, SitePlan
from bitwright.schemes import MODEL_SCALE

DEFAULT_SOLVER = "rtn"
EXCLUDES = {
    ("llm_int8", "rotation"): "a rotation spreads outlier channels over all, so that none is left to keep apart",
    ("llm_int8", "hadamard"): "a rotation spreads outlier channels over all, so that none is left to keep apart",
    ("llm_int8", "smoothquant"): "both treat the same outlier channels; choose one",
    ("awq", "smoothquant"): "both scale the same edges, for different ends; choose one",
}
"""Transforms that undo each other, and why."""
TOO_LATE = {
    ("hadamard", "awq"): "inputs that are rotated at inference already are not scaled",
    ("hadamard", "smoothquant"): "inputs that are rotated at inference already are not scaled",
    ("llm_int8", "awq"): "inputs with columns that stay floats are not scaled",
}
"""Transforms of which the second finds nothing left to do after the first, and why."""
MISPLACED = {("bias", LOW_RANK): "the mean of what is left is known last"}
"""Repairs that must not come in this order, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """The parts of a recipe that choose codes, by the names of its fields."""

    transforms: tuple[str, ...]
    method: str
    repairs: tuple[str, ...]


def compose(text: str) -> Composition:
    """Return the parts that a name such as `awq+gptq+bias` stands for.

    Without a solver the weights are rounded to nearest.

    Raises:
        UnknownName: a part that is neither transform, solver nor repair.
        RecipeError: two solvers, parts out of order, or one given twice.
    """
    parts = text.split("+")
    kinds = [_kind(part, text) for part in parts]
    if kinds != sorted(kinds) or len(set(parts)) != len(parts):
        raise RecipeError(f"method '{text}': name each part once, transforms first, then a solver, then repairs.")
    by_kind = [tuple(p for p, kind in zip(parts, kinds, strict=True) if kind == wanted) for wanted in range(3)]
    if len(by_kind[1]) > 1:
        raise RecipeError(f"method '{text}': {' and '.join(by_kind[1])} both choose codes. Name one.")
    solver = by_kind[1][0] if by_kind[1] else DEFAULT_SOLVER
    return Composition(transforms=by_kind[0], method=solver, repairs=by_kind[2])


def require_known(recipe: Recipe) -> None:
    """Raises UnknownName for a transform, solver or repair that nobody registered."""
    for names, registry in ((recipe.transforms, TRANSFORMS), (recipe.methods, SOLVERS), (recipe.all_repairs, REPAIRS)):
        for name in names:
            _ = registry[name]


def check_composition(recipe: Recipe, plan: Plan) -> None:
    """Refuse what does not go together.

    Raises:
        RecipeError: says which parts, at which site, and why.
    """
    transforms = [TRANSFORMS[name] for name in recipe.transforms]
    for (first, second), reason in EXCLUDES.items():
        if {first, second} <= set(recipe.transforms):
            raise RecipeError(f"{first} and {second} do not go together: {reason}.")
    for (first, second), reason in TOO_LATE.items():
        if second in recipe.transforms and first in recipe.transforms[: recipe.transforms.index(second)]:
            raise RecipeError(f"{first} before {second}: {reason}. Name {second} first.")
    for site, entry in plan.sites.items():
        if entry.scheme is None or entry.method is None:
            continue
        solver = SOLVERS[entry.method]
        has_float_scales = entry.scheme.weights.scale in (MODEL_SCALE, "float32")
        if not solver.accepts(entry.scheme.weights.format) or (solver.moves_scales and not has_float_scales):
            raise RecipeError(f"{site}: method {entry.method} does not work on {entry.scheme}. {solver.hint}")
        if len(set(entry.repairs)) != len(entry.repairs):
            raise RecipeError(f"{site}: repairs {', '.join(entry.repairs)}: name each once.")
        for (first, second), reason in MISPLACED.items():
            if second in entry.repairs and first in entry.repairs[: entry.repairs.index(second)]:
                raise RecipeError(f"{site}: {first} before {second}: {reason}. Name {second} first.")
        for name, transform in zip(recipe.transforms, transforms, strict=True):
            reason = transform.refuses(site, entry, recipe)
            if reason is not None:
                raise RecipeError(f"{site}: {name} with {entry.scheme}: {reason}")


def needs_of_site(entry: SitePlan) -> frozenset[Need]:
    """Return what solver and repairs of a site must be given; nothing for one that is kept."""
    if entry.method is None:
        return frozenset()
    return SOLVERS[entry.method].needs.union(*(REPAIRS[name].needs for name in entry.repairs))


def needs_text(recipe: Recipe, plan: Plan) -> str | None:
    """Return the first part of a recipe that cannot work without calibration text; None if all can."""
    for name in recipe.transforms:
        if TRANSFORMS[name].needs_text:
            return name
    methods = sorted({entry.method for entry in plan.sites.values() if entry.method is not None})
    needing = [method for method in methods if SOLVERS[method].needs]
    return needing[0] if needing else next((name for name in recipe.all_repairs if REPAIRS[name].needs), None)


def needs_own_layout(recipe: Recipe) -> str | None:
    """Return the first part of a recipe whose result only bitwright's own layout holds; None if there is none."""
    for name in recipe.transforms:
        if TRANSFORMS[name].needs_own_layout(recipe):
            return name
    return next((name for name in recipe.all_repairs if REPAIRS[name].needs_own_layout), None)


def _kind(part: str, text: str) -> int:
    for kind, registry in enumerate((TRANSFORMS, SOLVERS, REPAIRS)):
        if part in registry:
            return kind
    known = [*TRANSFORMS.names, *SOLVERS.names, *REPAIRS.names]
    raise UnknownName(f"unknown method '{part}'{f' in {text!r}' if part != text else ''}.{did_you_mean(part, known)}")
