"""What a training did: its figures, the loss of every step, and what merging an adapter into its model changed.

Kinds of records:

    training        the figures of one training (`adapter_run`, `qat_run`, `distill_run`); of two the later
    training_step   the loss and the learning rate of one step; of two for one step the later
    merge           what putting an adapter into the weights cost (`merging`)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.reports import wording
from bitwright.reports.entries import Figure, Records, figure, is_finite, mapping_or_empty, read_entry

NAMES = {"lora": "LoRA", "qlora": "QLoRA", "qat": "quantization-aware training", "distill": "distillation"}
LOSSES = {"kl": "KL divergence", "cross_entropy": "Cross-entropy"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFact:
    """The figures of one training; perplexities and divergences on the held-out text unless they say gate.

    Attributes:
        method: lora, qlora, qat or distill.
        scheme: of the weights, or of the frozen base.
        data: text that was trained on; `self` for what the original model, or the teacher, has written.
        loss: kl (from the original model, or the teacher) or cross_entropy.
        start: original where training began at the weights themselves, not at what another method made of them.
        temperature: of the kl loss; None is 1.
        labels: share of the text's cross-entropy in the kl loss; None is 0.
        perplexity_original: of the model in full precision, or of the teacher.
        perplexity_before: of the model that training began with.
        trainable: numbers that were trained, of `parameters`.
    """

    method: str
    scheme: str
    data: str
    loss: str
    start: str
    temperature: Figure
    labels: Figure
    rank: Figure
    perplexity_original: Figure
    perplexity_before: Figure
    perplexity: Figure
    perplexity_stderr: Figure
    kl_before: Figure
    kl_mean: Figure
    gate_kl_before: Figure
    gate_kl: Figure
    heldout_tokens: Figure
    trainable: Figure
    parameters: Figure
    peak_memory_bytes: Figure
    seconds: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFact:
    """One optimizer step."""

    step: Figure
    loss: Figure
    learning_rate: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeFact:
    """What putting an adapter into the weights changed; the divergence in nats per token."""

    how: str
    kl_mean: Figure
    kl_stderr: Figure
    perplexity_before: Figure
    perplexity: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training: figures, bytes by purpose, and steps in order."""

    figures: TrainingFact
    memory: Mapping[str, Figure]
    steps: tuple[StepFact, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One figure of the original, of the model before training, and after; its name as inside a sentence."""

    name: str
    original: Figure
    before: Figure
    after: Figure
    stderr: Figure = None

    @property
    def recovered(self) -> Figure:
        """Share of the distance to the original that training took back; None where there was none, or it is not known.

        Negative where training lost more.
        """
        original, before, after = self.original, self.before, self.after
        if original is None or before is None or after is None:
            return None
        if not (math.isfinite(before) and math.isfinite(after) and before > original):
            return None
        return (before - after) / (before - original)


def read_training(records: Records, task: Mapping[str, Any]) -> Training | None:
    """Read what a training left; None where there was none.

    Args:
        records: of the run.
        task: what was asked for, which says what a record may leave out.
    Raises:
        RunError: an entry is not what bitwright writes.
    """
    found = records.of("training")
    if not found:
        return None
    record, where = found[-1]
    memory = mapping_or_empty(record.get("memory"))
    implied = {
        "loss": "kl" if record.get("method") == "distill" else "cross_entropy",
        "perplexity_original": record.get("perplexity_teacher"),
        "start": task.get("start"),
        "temperature": task.get("temperature"),
        "labels": task.get("labels"),
    }
    steps = {fact.step: fact for fact in records.read(StepFact, "training_step") if is_finite(fact.step)}
    return Training(
        figures=read_entry(TrainingFact, {**implied, **record}, where),
        memory={str(name): figure(memory, str(name), f"{where}: memory") for name in memory},
        steps=tuple(steps[step] for step in sorted(steps, key=lambda step: step or 0.0)),
    )


def name(training: Training) -> str:
    """The method as people write it inside a sentence."""
    return NAMES.get(training.figures.method, training.figures.method) or "training"


def loss_name(training: Training) -> str:
    """What the loss is; empty where this version does not know it."""
    kind, labels = LOSSES.get(training.figures.loss, ""), training.figures.labels
    return f"{kind} with {wording.percent(labels, 0)} cross-entropy" if kind and labels else kind


def target(training: Training) -> str:
    """The model that this one is to be like."""
    return "teacher" if training.figures.method == "distill" else "original"


def compared(training: Training) -> list[Compared]:
    """The figures that training was to improve, as far as they were recorded."""
    f = training.figures
    rows = [
        Compared(
            name="perplexity", original=f.perplexity_original, before=f.perplexity_before, after=f.perplexity,
            stderr=f.perplexity_stderr,
        ),
        Compared(name="KL divergence", original=0.0, before=f.kl_before, after=f.kl_mean),
        Compared(name="KL divergence on the gate text", original=0.0, before=f.gate_kl_before, after=f.gate_kl),
    ]  # fmt: skip
    return [row for row in rows if row.before is not None or row.after is not None]


def levels(training: Training) -> list[tuple[str, float]]:
    """What the loss is on the held-out text without training, and of the target, where it has the loss's unit."""
    f = training.figures
    quantized_by_method = f.method == "qat" and f.start != "original"
    before = "post-training quantization" if quantized_by_method else "before training"
    best = "full precision" if target(training) == "original" else target(training)
    found: list[tuple[str, Figure]] = []
    if f.loss == "kl":
        # At another temperature the loss of equal models is still 0, but no other divergence can be compared with it.
        share, comparable = f.labels or 0.0, f.temperature in (None, 1.0)
        found = [
            (before, _mixed(f.kl_before, f.perplexity_before, share) if comparable else None),
            (best, _mixed(0.0, f.perplexity_original, share)),
        ]
    elif loss_name(training):
        found = [(before, _log(f.perplexity_before)), (best, _log(f.perplexity_original))]
    return [(label, value) for label, value in found if value is not None and math.isfinite(value)]


def verdict(training: Training) -> list[str]:
    """What training did to the perplexity, and how much of the loss it took back, in sentences."""
    f = training.figures
    after = wording.with_stderr(f.perplexity, f.perplexity_stderr)
    best = "" if f.perplexity_original is None else wording.number(f.perplexity_original, 4)
    sentences = [
        f"{capital(name(training))} took the perplexity on {wording.count(f.heldout_tokens)} predicted tokens of "
        f"held-out text from {wording.number(f.perplexity_before, 4)} to {after}"
        + (f"; the {target(training)} has {best}." if best else ".")
    ]
    shares = [
        f"{wording.percent(row.recovered)} in {row.name}" for row in compared(training) if row.recovered is not None
    ]
    if shares:
        sentences.append(f"Of the distance to the {target(training)}, training took back {', '.join(shares)}.")
    return sentences


def circumstances(training: Training) -> list[tuple[str, str]]:
    """What it took, as labels and values; without what was not recorded."""
    f = training.figures
    rows = [("Method", capital(name(training))), ("Steps", wording.count(len(training.steps)))]
    if f.data:
        rows.append(("Text", f"written by the {target(training)} itself" if f.data == "self" else f.data))
    if f.scheme:
        rows.append(("Scheme", f.scheme))
    if f.rank is not None:
        rows.append(("Rank", wording.count(f.rank)))
    if f.trainable is not None:
        rows.append(("Trainable parameters", _share(f.trainable, f.parameters)))
    if f.heldout_tokens is not None:
        rows.append(("Held-out text", f"{wording.count(f.heldout_tokens)} predictions"))
    used = [f"{label} {wording.size(value)}" for label, value in training.memory.items() if value]
    if used:
        rows.append(("Memory of the model", ", ".join(used)))
    rows += [("Time", wording.duration(f.seconds)), ("Peak memory", wording.size(f.peak_memory_bytes))]
    return rows


def merge_sentence(merge: MergeFact) -> str:
    """What one merge changed, in one line."""
    how = f" ({merge.how})" if merge.how else ""
    return (
        f"Merged into the weights{how}: KL divergence {wording.with_stderr(merge.kl_mean, merge.kl_stderr)} nats per "
        f"token from the model with its adapter, perplexity {wording.number(merge.perplexity_before, 4)} → "
        f"{wording.number(merge.perplexity, 4)}."
    )


def capital(words: str) -> str:
    """Words with a large first letter."""
    return words[:1].upper() + words[1:]


def _share(part: float, whole: Figure) -> str:
    if whole is None or not (math.isfinite(whole) and whole > 0):
        return wording.count(part)
    return f"{wording.count(part)} of {wording.count(whole)} ({wording.percent(part / whole, 2)})"


def _mixed(divergence: Figure, perplexity: Figure, share: float) -> Figure:
    """The loss of which so much is the text's cross-entropy."""
    if not share or divergence is None:
        return divergence
    text = _log(perplexity)
    return None if text is None else (1 - share) * divergence + share * text


def _log(perplexity: Figure) -> Figure:
    """Nats per token."""
    return None if perplexity is None or not perplexity > 0 else math.log(perplexity)
