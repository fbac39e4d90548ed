"""`bitwright search --apply`: quantize what was found, look at what it lost, and mend the worst until the gate holds.

Each round finds the items that cost the most: how much lower the divergence of the whole would be with that item alone
in 16 bit. They climb one rung, and the model is quantized again:

    a better method       rtn -> gptq -> gptaq
    smaller groups        128 -> 64 -> 32
    more bits             the next scheme of the menu that has them
    a low-rank addend     beside the codes, where the model is in bitwright's own layout, which alone holds one, and
                          both together are smaller than 16 bit
    16 bit

A rung that the budget has no room for is left out, and so is a site that the recipe fixes. The round with the least
loss is kept; its steps are records of the run, and so in its report. All rounds are runs of their own until one is
chosen, so that a killed command goes on where it stopped, and a finished one is seen to be finished: the record of the
search in the chosen run says what was asked.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.data.windows import hash_tokens
from bitwright.errors import RunError, ShapeError
from bitwright.methods.low_rank import LOW_RANK
from bitwright.mixture import Found, Measure, Search
from bitwright.model.layouts import own
from bitwright.pipeline import QuantizeResult
from bitwright.recipe import Recipe, Rule, pattern_of, resolve, rule_of
from bitwright.records import append_jsonl, deciding_versions, read_jsonl
from bitwright.runs import RunDirectory
from bitwright.schemes import Scheme
from bitwright.search.rungs import Rung, above, finer_groups

SHARE_PER_ROUND = 0.1
"""Of the items: so many climb before the model is quantized again."""
SMALL_ROUNDS = 4
"""Of that share; with each one more it doubles, so that a gate far away does not take days."""
CHOSEN = "run"
"""Folder of the run that is left in the end."""
REPLACED = "round-replaced"
"""Where a run of another search is until it is removed, as all rounds are."""
SEARCH, REPAIR = "search", "repair"
"""Kinds of records."""

Quantize = Callable[[Recipe, Path], QuantizeResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One item that climbed: the record of kind `repair`.

    Attributes:
        step: number of the round, from 1.
        site: first site of the item.
        sites: all of them.
        kl_before: of the finished model before the round, nats per token.
        kl_after: after it; all steps of a round share it.
        contribution: of the item to the divergence of weights rounded to nearest, nats per token.
    """

    step: int
    site: str
    sites: tuple[str, ...]
    before: str
    after: str
    contribution: float
    kl_before: float
    kl_after: float

    def to_record(self) -> dict[str, Any]:
        """The record, with the names that a report reads."""
        entry = asdict(self)
        return {"kind": REPAIR, "from": entry.pop("before"), "to": entry.pop("after"), **entry}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "Step":
        """Rebuild what `to_record` returned."""
        entry = {key: value for key, value in record.items() if key not in ("kind", "from", "to", "sites")}
        return Step(before=record["from"], after=record["to"], sites=tuple(record["sites"]), **entry)


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """A finished search: the run, and what was mended on the way.

    Attributes:
        recipe: of the run; with what was mended.
        failure: why the budget on quality does not hold; None if it does.
        was_finished: an earlier call had done all of it.
    """

    result: QuantizeResult
    steps: tuple[Step, ...]
    recipe: Recipe
    failure: str | None
    was_finished: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """A quantized model, how it came to be, and how many times what may be lost it loses."""

    recipe: Recipe
    result: QuantizeResult
    steps: tuple[Step, ...]
    gap: float


def apply(
    search: Search, found: Found, recipe: Recipe, folder: Path, quantize: Quantize, *, repair: bool, fresh: bool = False
) -> Applied:
    """Quantize what a search found into `folder`/run, and mend it; the same call again returns what it finds there.

    Args:
        search: that found it.
        found: which scheme for which site.
        recipe: that quantizes so; its methods are where the items begin.
        folder: of the search.
        quantize: a recipe into a run directory.
        repair: mend the worst sites while the gate does not hold.
        fresh: replace the run of another search.
    Raises:
        RunError: the folder has the run of another search.
        BitwrightError: whatever `quantize` raises.
    """
    asked = _identity(search, found, recipe, repair=repair)
    finished = _finished(folder, asked)
    if finished is not None:
        return finished
    if (folder / CHOSEN).exists() and not fresh:
        raise RunError(
            f"{folder / CHOSEN}: belongs to another search. Choose another --out, or --fresh to replace that run."
        )
    if fresh:
        _remove_rounds(folder)
    rounds, remark = _rounds(search, found, recipe, folder / f"round-{asked[:8]}", quantize, repair=repair)
    best = min(rounds, key=lambda each: each.gap)
    failure = None if best.gap <= 1 else f"{_lost_too_much(search, best.result)}{remark}"
    summary = {"kind": SEARCH, "asked": asked, "budget": _described(search), **asdict(found)}
    summary |= {"rounds": len(rounds), "failure": failure}
    _finish(search, summary, folder, best.result.run, best.steps)
    done = replace(best.result, run=folder / CHOSEN)
    return Applied(result=done, steps=best.steps, recipe=best.recipe, failure=failure)


def _rounds(
    search: Search, found: Found, recipe: Recipe, place: Path, quantize: Quantize, *, repair: bool
) -> tuple[list[_Round], str]:
    """Quantize and mend; return all rounds, and what to do should the best of them lose too much."""
    plan = resolve(recipe, search.sites).sites
    rungs = {
        site: Rung(scheme=scheme, method=plan[site].method or recipe.method, low_rank=LOW_RANK in plan[site].repairs)
        for site, scheme in found.schemes.items()
    }

    def quantized(wanted: Recipe, number: int) -> _Round:
        result = quantize(wanted, place.with_name(f"{place.name}-{number}"))
        return _Round(recipe=wanted, result=result, steps=(), gap=_gap(search, result))

    rounds = [quantized(recipe, 0)]
    if not repair:
        return rounds, ". Leave out --no-repair, raise a limit, or offer larger schemes."
    if rounds[0].gap <= 1:
        return rounds, ""
    with search.measuring(extra=finer_groups(search.menu)) as measure:
        while rounds[-1].gap > 1:
            last, number = rounds[-1], len(rounds)
            share = SHARE_PER_ROUND * 2 ** max(0, number - SMALL_ROUNDS)
            holds_addends = last.result.results["layouts"] == [own.NAME]
            climbed = _climb(search, rungs, measure, share, holds_addends=holds_addends)
            if not climbed:
                return rounds, ", and the budget leaves no room to mend it. Raise a limit, or offer larger schemes."
            rungs |= {site: after for sites, _, after, _ in climbed for site in sites}
            better = quantized(_recipe_of(recipe, rungs), number)
            steps = tuple(
                Step(
                    step=number, site=sites[0], sites=sites, before=str(before), after=str(after), contribution=loss,
                    kl_before=last.result.results["kl_mean"], kl_after=better.result.results["kl_mean"],
                )
                for sites, before, after, loss in climbed
            )  # fmt: skip
            rounds.append(replace(better, steps=(*last.steps, *steps)))
            _drop_weights(rounds)
    return rounds, ""


def _drop_weights(rounds: Sequence[_Round]) -> None:
    """Leave the weights of the best round alone; a resumed command needs no more than the records of the others."""
    best = min(rounds, key=lambda each: each.gap)
    for other in rounds:
        for file in RunDirectory(other.result.run).model.glob("*.safetensors") if other is not best else ():
            file.unlink()


def _identity(search: Search, found: Found, recipe: Recipe, *, repair: bool) -> str:
    """A hash of all that decides what becomes of a search."""
    model = search.model
    parts = {
        "model": model.skeleton.checkpoint.audit(), "calibration": hash_tokens(search.calibration),
        "device": model.device.type, "dtype": str(model.dtype), "schemes": dict(found.schemes), "menu": search.menu,
        "recipe": recipe.to_mapping(), "budget": _described(search), "repair": repair,
        "windows": search.num_windows, "sets": [[site.name for site in sites] for sites in search.sets],
        "versions": deciding_versions(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path, asked: str) -> Applied | None:
    """What an earlier call for the same left; None where there is nothing, or something else."""
    run = RunDirectory(folder / CHOSEN)
    if not run.is_complete:
        return None
    records = read_jsonl(run.records)
    summary = _summary_of(records, asked)
    if summary is None:
        return None
    _remove_rounds(folder)
    info = run.info
    assert info is not None
    result = QuantizeResult(run=run.path, results=info["results"], failure=info["failure"], resumed_blocks=0)
    steps = tuple(Step.from_record(record) for record in records if record["kind"] == REPAIR)
    recipe = Recipe.from_mapping(info["asked"]["recipe"])
    return Applied(result=result, steps=steps, recipe=recipe, failure=summary["failure"], was_finished=True)


def _summary_of(records: Sequence[Mapping[str, Any]], asked: str) -> Mapping[str, Any] | None:
    return next((each for each in records if each["kind"] == SEARCH and each.get("asked") == asked), None)


def _finish(search: Search, summary: Mapping[str, Any], folder: Path, best: Path, steps: Sequence[Step]) -> None:
    """Add the records of the search to the chosen run, put it in its place, and remove the others.

    The run takes its place when all is written, so that one in its place is finished.
    """
    records = RunDirectory(best).records
    if _summary_of(read_jsonl(records), summary["asked"]) is None:
        append_jsonl(records, *_sensitivities(search), *(step.to_record() for step in steps), summary)
    run = folder / CHOSEN
    if run.exists():  # in one step, so that no half of it is ever in its place
        run.rename(folder / REPLACED)
    best.rename(run)
    _remove_rounds(folder)


def _remove_rounds(folder: Path) -> None:
    for other in folder.glob("round-*"):
        shutil.rmtree(other)


def _sensitivities(search: Search) -> list[dict[str, Any]]:
    """What each site would lose in each scheme, as records."""
    found = search.sensitivity
    if found is None:
        return []
    return [
        {"kind": "sensitivity", "site": site, "scheme": scheme, "score": found.score, "value": value}
        for site, row in found.values.items()
        for scheme, value in row.items()
    ]


def _gap(search: Search, result: QuantizeResult) -> float:
    """How many times what may be lost was lost; at most 1 if the gate holds."""
    budget, lost, shares = search.budget, result.results, list[float]()
    if budget.max_kl is not None or budget.max_ppl_increase is None:
        shares.append(lost["kl_mean"] / (budget.max_kl or search.recipe.max_kl))
    if budget.max_ppl_increase is not None:
        shares.append((lost["perplexity"] / lost["reference_perplexity"] - 1) / budget.max_ppl_increase)
    return max(shares)


def _lost_too_much(search: Search, result: QuantizeResult) -> str:
    lost, budget = result.results, search.budget
    wanted = []
    if budget.max_kl is not None:
        wanted.append(f"KL {budget.max_kl:g} nats per token")
    if budget.max_ppl_increase is not None:
        wanted.append(f"{100 * budget.max_ppl_increase:g} % more perplexity")
    more = 100 * (lost["perplexity"] / lost["reference_perplexity"] - 1)
    return (
        f"lost KL {lost['kl_mean']:.3g} nats per token and {more:.2g} % of perplexity, where "
        f"{' and '.join(wanted) or f'KL {search.recipe.max_kl:g}'} were allowed"
    )


def _described(search: Search) -> dict[str, Any]:
    entry = asdict(search.budget)
    entry["hardware"] = None if search.budget.hardware is None else search.budget.hardware.name
    return entry


_Climbed = tuple[tuple[str, ...], Rung, Rung, float]


def _climb(
    search: Search, rungs: Mapping[str, Rung], measure: Measure, share: float, *, holds_addends: bool
) -> list[_Climbed]:
    """The items that cost most and have a rung above: their sites, where they were, where they go, what they cost.

    Args:
        share: of the items, at most so many.
    """
    schemes = {site: rung.scheme for site, rung in rungs.items()}
    choices = {tuple(site.name for site in sites): search.common(sites) for sites in search.sets}
    names = [sites for sites, common in choices.items() if schemes[sites[0]] is not None and len(common) > 1]
    without = [{**schemes, **dict.fromkeys(each, None)} for each in names]
    whole, *others = measure([schemes, *without])
    addends = {site for site, rung in rungs.items() if rung.low_rank}
    losses = sorted(zip([whole - other for other in others], names, strict=True), reverse=True)
    climbed: list[_Climbed] = []
    for loss, sites in losses:
        if len(climbed) >= max(1, round(share * len(names))):
            break
        before = rungs[sites[0]]
        is_smaller = search.size_bytes(sites, before.scheme, addend=True) < search.size_bytes(sites, None)
        for after in above(before, choices[sites], with_addend=holds_addends and is_smaller):
            trial = {**schemes, **dict.fromkeys(sites, after.scheme)}
            with_these = addends.union(sites if after.low_rank else ())
            if _fits(search, trial, with_these):
                climbed.append((sites, before, after, loss))
                schemes, addends = trial, with_these
                break
    return climbed


def _fits(search: Search, schemes: Mapping[str, str | None], addends: Collection[str]) -> bool:
    """Whether an assignment keeps the limits on cost."""
    try:
        return search.costs_fit(schemes, addends=addends)
    except ShapeError:
        return False


def _recipe_of(recipe: Recipe, rungs: Mapping[str, Rung]) -> Recipe:
    """A recipe with the schemes and methods of rungs; repairs stay those that it has, but for addends."""
    rules: list[Rule] = []
    for site, rung in rungs.items():
        pattern, given = pattern_of(site), rule_of(recipe, site)
        if rung.scheme is None:
            rules.append(Rule(pattern=pattern, scheme=None))
            continue
        repairs = recipe.repairs if given is None or given.repairs is None else given.repairs
        repairs = (LOW_RANK, *repairs) if rung.low_rank and LOW_RANK not in repairs else repairs
        rule = Rule(
            pattern=pattern,
            scheme=Scheme.parse(rung.scheme),
            method=None if rung.method == recipe.method else rung.method,
            repairs=None if repairs == recipe.repairs else repairs,
        )
        if rule != Rule(pattern=pattern, scheme=recipe.scheme):
            rules.append(rule)
    return replace(recipe, rules=tuple(rules))
