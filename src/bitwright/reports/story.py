"""What a run's facts amount to, in sentences and groups: the part of the report that is not tables and charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bitwright.reports import training, wording
from bitwright.reports.entries import Figure, is_finite, mapping_or_empty
from bitwright.reports.facts import Facts, Results, SiteFact, TransformFact
from bitwright.reports.outlook import ranked_sites
from bitwright.reports.trials import REASON

NUM_WORST = 10
NUM_NAMED = 8
NUM_TAIL_TOKENS = 10
PLAIN_REASON = "recipe"
RECIPE_LABELS = {
    "scheme": "Scheme",
    "method": "Method",
    "range_method": "Range setting",
    "ragged": "Rows that no group size divides",
    "gptq": "GPTQ options",
    "calibration": "Calibration",
    "max_kl": "Gate",
    "text": "Trained on",
    "lora": "Adapters",
    "qat": "Quantizers",
    "start": "Training started at",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Sites that share what happened to them; `named` stands in the page, `others` behind a fold."""

    reason: str
    detail: str
    named: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformRow:
    """What a transform did, over all blocks where it did the same, and the most that anything moved by it."""

    transform: str
    what: str
    where: str
    invariance: Figure
    invariance_kl: Figure


def verdict(facts: Facts) -> list[str]:
    """The headline in sentences: what was done, what it saved, what was lost."""
    r = facts.results
    done = f"{wording.things(r.num_quantized, 'weight matrix', 'weight matrices')} now hold"
    if r.num_quantized == 1:
        done += "s"
    sentences = [
        f"{done} {wording.fixed(r.bits_per_weight, 3)} bits per weight, and the model went from "
        f"{wording.size(r.original_size_bytes)} to {wording.size(r.size_bytes)}{_saving(r)}."
    ]
    loss = (
        f"On {wording.count(r.gate_tokens)} predicted tokens that no method had seen, its next-token distribution "
        f"diverges from the original's by {wording.with_stderr(r.kl_mean, r.kl_stderr)} nats per token"
    )
    is_told = facts.max_kl is not None and within_gate(facts) == (facts.failure is None)
    gate = f" (the gate is {facts.max_kl:g})" if is_told else ""
    sentences.append(f"{loss}{gate}, and both put the same token first in {wording.percent(r.same_top1)} of cases.")
    if facts.findings.training is not None:
        sentences += training.verdict(facts.findings.training)
    return sentences


def trained_verdict(facts: Facts) -> list[str]:
    """The headline of a run that quantized nothing, in sentences."""
    trained = facts.findings.training
    merged = [training.merge_sentence(merge) for merge in facts.findings.merges]
    return (training.verdict(trained) if trained is not None else []) + merged


def heading(facts: Facts) -> str:
    """The run in a few words: the last part of the model's path or hub id, the scheme and the method."""
    name, trained = model_name(facts), facts.findings.training
    if trained is not None and facts.is_only_trained:
        base = trained.figures.scheme
        return f"{name} trained by {training.name(trained)}" + (f" over {base}" if base else "")
    scheme, method = facts.recipe.get("scheme"), facts.recipe.get("method")
    if trained is not None:
        method = training.name(trained)
    return name + (f" in {scheme}" if scheme else "") + (f" by {method}" if method else "")


def model_name(facts: Facts) -> str:
    """The last part of the model's path or hub id."""
    return str(facts.asked.get("model", "")).rstrip("/").rsplit("/", 1)[-1] or "a model"


def _saving(r: Results) -> str:
    if not (is_finite(r.original_size_bytes) and is_finite(r.size_bytes)):
        return ""
    if not r.original_size_bytes or not r.size_bytes:
        return ""
    return f", {wording.number(r.original_size_bytes / r.size_bytes)} times smaller"


def change(before: Figure, after: Figure) -> str:
    """A relative change with its sign, such as `+9.0 %`; empty where it cannot be told."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return ""
    relative = after / before - 1
    return ("+" if relative >= 0 else "") + wording.percent(relative)


def tail_note(facts: Facts) -> str:
    """How many tokens stand behind the 99.9 % quantile, where they are too few to trust it."""
    tokens = facts.results.gate_tokens
    if tokens is None or not math.isfinite(tokens) or tokens / 1000 >= NUM_TAIL_TOKENS:
        return ""
    above = max(1, round(tokens / 1000))
    return f"Only about {wording.things(above, 'token')} in {wording.count(tokens)} lie beyond 99.9 %: a rough figure."


def doubts(facts: Facts) -> list[str]:
    """What does not fit together in the run directory: signs that it was edited, lost a part or was judged again."""
    r, found = facts.results, list[str]()
    for name, expected, actual in (
        ("quantized sites", r.num_quantized, len(facts.sites)),
        ("kept sites", r.num_kept, len(facts.kept)),
    ):
        if expected is not None and expected != actual:
            found.append(f"run.json counts {wording.count(expected)} {name}, the records hold {wording.count(actual)}.")
    if facts.recorded is None:
        found.append("The records hold no headline figures to compare run.json with.")
    elif repr(facts.recorded) != repr(r):  # by text, because nan differs from itself
        found.append("The headline figures in run.json and in the records differ.")
    if facts.failure is None and not within_gate(facts):
        found.append(
            "The run counts as passed, though its KL divergence is not under the recipe's gate: "
            "it was judged again with another one, or the file was edited."
        )
    return found


def within_gate(facts: Facts) -> bool:
    """Whether the recorded loss is a number and not above the recorded gate, if there is one."""
    loss, gate = facts.results.kl_mean, facts.max_kl
    return loss is not None and math.isfinite(loss) and (gate is None or loss <= gate)


def asked(facts: Facts) -> list[tuple[str, str]]:
    """What the user asked for, as labels and values; keys this version does not know are shown as they are."""
    rows = [("Model", str(facts.asked.get("model", wording.ABSENT)))]
    for key, value in facts.recipe.items():
        label = _label(key)
        if key == "calibration":
            rows.append((label, _calibration(mapping_or_empty(value))))
        elif key == "max_kl":
            rows.append((label, _gate(facts)))
        else:
            rows.append((label, plain(value)))
    rows += [(_label(key), plain(value)) for key, value in facts.task.items()]
    for key, label in (("device", "Computed on"), ("dtype", "Activations computed in")):
        if facts.context.get(key) is not None:
            rows.append((label, str(facts.context[key])))
    return rows


def _label(key: object) -> str:
    return RECIPE_LABELS.get(str(key), str(key).replace("_", " ").capitalize())


def _gate(facts: Facts) -> str:
    return "none" if facts.max_kl is None else f"KL divergence at most {facts.max_kl:g} nats per token"


def _calibration(calibration: Mapping[str, Any]) -> str:
    text = calibration.get("text")
    if text is None:
        return "no data"
    source = "text written by the model itself" if text == "self" else str(text)
    return (
        f"{source}: {calibration.get('num_samples', wording.ABSENT)} windows of "
        f"{calibration.get('seqlen', wording.ABSENT)} tokens, seed {calibration.get('seed', wording.ABSENT)}"
    )


def plain(value: object) -> str:
    """A recipe's value in one line."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "; ".join(plain(item) for item in value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def worst(facts: Facts) -> list[SiteFact]:
    """The sites with the largest error, worst first."""
    return ranked_sites(facts)[:NUM_WORST]


def site_sentence(site: SiteFact) -> str:
    """One site's loss in words."""
    parts: list[str] = []
    for value, what in ((site.output_sqnr_db, "output"), (site.weight_sqnr_db, "weights")):
        if value is not None and math.isfinite(value):
            parts.append(f"{what} {wording.decibel(value)} (error energy {wording.noise_share(value)})")
    parts.append(f"{site.scheme} by {site.method} at {wording.fixed(site.bits_per_weight, 3)} bits per weight")
    if site.num_tokens == 0:
        parts.append("no calibration token reached it")
    return "; ".join(parts)


def depth(facts: Facts) -> str:
    """What becomes of the hidden state, in words."""
    known = [(b.block, b.hidden_sqnr_db) for b in facts.blocks if b.hidden_sqnr_db is not None]
    known = [(name, value) for name, value in known if math.isfinite(value)]
    if not known:
        return "No block changed the hidden state measurably, or nothing was recorded."
    last_name, last = known[-1]
    text = (
        f"After {last_name}, the last block with a figure, the hidden state stands {wording.decibel(last)} above its "
        f"error: the error has {wording.noise_share(last)} of the signal's energy."
    )
    steps = [(here - before, name) for (_, before), (name, here) in pairwise(known)]
    if steps and min(steps)[0] < 0:
        step, name = min(steps)
        text += f" The largest loss in one step after the first block is {wording.decibel(-step)}, at {name}."
    return text


def timing(facts: Facts) -> str:
    """How the time divides between the blocks and the rest, in words."""
    times = [block.seconds for block in facts.blocks if block.seconds is not None]
    total = facts.results.seconds
    if not times:
        return "No times were recorded."
    text = f"The blocks took {wording.duration(sum(times))} together, {wording.duration(sum(times) / len(times))} each."
    if total is not None and total > sum(times):
        text += f" The other {wording.duration(total - sum(times))} went into reading, checking, the gate and writing."
    return text


def kept_groups(facts: Facts) -> list[Group]:
    """Sites in 16 bit by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in facts.kept:
        reasons.setdefault(entry.reason, []).append(entry.site)
    return [_group(reason, wording.things(len(names), "site"), names) for reason, names in reasons.items()]


def transforms(facts: Facts) -> list[TransformRow]:
    """What transforms did, one row for what is alike."""
    alike: dict[tuple[str, str, bool], list[TransformFact]] = {}
    for fact in facts.transforms:
        if fact.transform:
            alike.setdefault((fact.transform, fact.what, not fact.block), []).append(fact)
    return [
        TransformRow(
            transform=name,
            what=what,
            where="the whole model" if whole else wording.things(len({fact.block for fact in members}), "block"),
            invariance=_largest([fact.invariance for fact in members]),
            invariance_kl=_largest([fact.invariance_kl for fact in members]),
        )
        for (name, what, whole), members in alike.items()
    ]


def _largest(values: Sequence[Figure]) -> Figure:
    return max((value for value in values if value is not None), default=None)


def changed_groups(facts: Facts) -> list[Group]:
    """Sites whose recorded reason is more than `recipe`: by a rule, with another group size, or by another method."""
    return [group for group in _groups_by_reason(facts) if not group.reason.startswith(REASON)]


def chosen_groups(facts: Facts) -> list[Group]:
    """Sites whose method auto chose, by its reason."""
    return [group for group in _groups_by_reason(facts) if group.reason.startswith(REASON)]


def _groups_by_reason(facts: Facts) -> list[Group]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for site in facts.sites:
        if site.reason != PLAIN_REASON:
            groups.setdefault((site.reason, site.scheme, site.method), []).append(site.site)
    return [
        _group(reason, f"{wording.things(len(names), 'site')}, {scheme} by {method}", names)
        for (reason, scheme, method), names in groups.items()
    ]


def _group(reason: str, detail: str, names: Sequence[str]) -> Group:
    shown = tuple(names) if len(names) <= NUM_NAMED else tuple(names[:3])
    return Group(reason=reason, detail=detail, named=shown, others=tuple(names[len(shown) :]))


def environment(facts: Facts) -> list[tuple[str, str]]:
    """The machine and the versions, as labels and values."""
    recorded = mapping_or_empty(facts.context.get("environment"))
    rows = [
        (str(key).replace("num_cores", "usable cores").capitalize(), plain(value))
        for key, value in recorded.items()
        if key != "versions"
    ]
    return rows + [(str(name), str(version)) for name, version in mapping_or_empty(recorded.get("versions")).items()]
