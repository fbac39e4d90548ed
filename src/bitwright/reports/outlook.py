"""The verdict's two last parts: where the loss arose, and what to do next, with the commands that do it."""

import shlex
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from bitwright.reports import wording
from bitwright.reports.charts import role
from bitwright.reports.entries import is_finite
from bitwright.reports.facts import Facts, SiteFact

ONE_BIT_DB = 6.02
"""What one more bit per weight gains."""
AMPLE = 10.0
"""A loss so many times below the gate leaves room for fewer bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Something to do: why, and the command; empty where no single command does it."""

    what: str
    command: str = ""


def where(facts: Facts) -> list[str]:
    """Where most was lost: by role, by site, through the depth."""
    sentences: list[str] = []
    ranked = ranked_sites(facts)
    what = "output" if facts.figure == "output_sqnr_db" else "weights"
    if ranked:
        by_role: dict[str, list[float]] = {}
        for site in ranked:
            by_role.setdefault(role(site.site), []).append(getattr(site, facts.figure))
        levels = {kind: median(values) for kind, values in by_role.items()}
        overall = median(getattr(site, facts.figure) for site in ranked)
        worst_role = min(levels, key=lambda kind: levels[kind])
        if len(levels) > 1:
            sentences.append(
                f"Most is lost in {worst_role}: its median site keeps {wording.decibel(levels[worst_role])} of signal "
                f"to noise in its {what}, the median of all sites {wording.decibel(overall)}."
            )
        first = ranked[0]
        value = getattr(first, facts.figure)
        sentences.append(
            f"The worst site is {first.site} with {wording.decibel(value)}: its error has {wording.noise_share(value)} "
            "of the signal's energy."
        )
    known = [(b.block, b.hidden_sqnr_db) for b in facts.blocks if b.hidden_sqnr_db is not None]
    steps = [(after - before, block) for (_, before), (block, after) in pairwise(known) if is_finite(after - before)]
    if steps and min(steps)[0] < 0:
        loss, block = min(steps)
        sentences.append(f"After the first block, the hidden state loses most at {block}: {wording.decibel(-loss)}.")
    return sentences or ["No site recorded a figure, so it cannot be told where."]


def ranked_sites(facts: Facts) -> list[SiteFact]:
    """Sites by `facts.figure`, the worst first; sites without that figure left out."""
    known = [site for site in facts.sites if is_finite(getattr(site, facts.figure))]
    return sorted(known, key=lambda site: getattr(site, facts.figure))


def next_steps(facts: Facts) -> list[Step]:
    """What to do next, the most useful first."""
    run, model = shlex.quote(str(facts.path)), shlex.quote(str(facts.asked.get("model") or "MODEL"))
    steps = _repairs(facts, model) if facts.failure is not None else []
    if facts.failure is None:
        if not any(evaluation.kl_mean is not None for evaluation in facts.evaluations):
            steps.append(
                Step(
                    what="Measure the loss on a text of your own: the gate's is short.",
                    command=f"bitwright evaluate {run} --text TEXT --reference {model}",
                )
            )
        steps += _room(facts, model)
        if not facts.exports:
            steps.append(
                Step(
                    what="Write it for an engine, and have the engine prove that it reads what was decided.",
                    command=f"bitwright export {run} --out DIRECTORY",
                )
            )
    if facts.failure is None and facts.findings.speeds.result is None:
        steps.append(
            Step(
                what="Measure how fast it runs, in what memory and on what energy, beside the original.",
                command=f"bitwright speed {run} --original {model}",
            )
        )
    if not facts.findings.generations:
        steps.append(
            Step(
                what="Read what it writes beside what the original writes.",
                command=f"bitwright report {run} --samples 3 --original {model}",
            )
        )
    return steps


def _repairs(facts: Facts, model: str) -> list[Step]:
    scheme, method = str(facts.recipe.get("scheme", "")), str(facts.recipe.get("method", ""))
    ranked = ranked_sites(facts)
    steps: list[Step] = []
    again = f"bitwright quantize {model} --scheme {scheme}"
    if method == "rtn":
        command = f"{again} --method gptq --calibration TEXT --out DIRECTORY"
        steps.append(Step(what="Round with the inputs in view, at the same size.", command=command))
    if ranked:
        pattern = f"*.{role(ranked[0].site)}"
        is_trained = facts.findings.training is not None  # by a command that the records do not know
        command = "" if is_trained else f"{again} --method {method} --ignore '{pattern}' --out DIRECTORY"
        what = f"Give the worst sites more bits by a rule of a recipe for {pattern}, or leave them in 16 bit"
        steps.append(Step(what=f"{what}, with the other options as they were.", command=command))
    return steps


def _room(facts: Facts, model: str) -> list[Step]:
    """Bits to give where single sites stand out, or to take where the loss is far below the gate."""
    ranked = ranked_sites(facts)
    values = [getattr(site, facts.figure) for site in ranked]
    if values and median(values) - values[0] >= ONE_BIT_DB:
        gap = wording.decibel(median(values) - values[0])
        return [
            Step(
                what=f"{ranked[0].site} is {gap} worse than the median site, more than a bit is worth: a rule of a "
                f"recipe can give *.{role(ranked[0].site)} more bits."
            )
        ]
    loss, gate = facts.results.kl_mean, facts.max_kl
    if loss is not None and gate is not None and is_finite(loss) and 0 <= loss * AMPLE <= gate:
        return [
            Step(
                what=f"The loss is more than {AMPLE:g} times below the gate: fewer bits may do. Compare several.",
                command=f"bitwright bench {model} --schemes W4A16-g128,W3A16-g128,W2A16-g64 --methods gptq "
                "--calibration TEXT --text OTHER_TEXT --out DIRECTORY",
            )
        ]
    return []
