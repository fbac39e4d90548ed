"""The decision trees of advice: each question has an answer and the figures that decided it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bitwright.numerics.integer import IntegerFormat
from bitwright.schemes import Scheme
from bitwright.search.cost import Memory, Speed, Workload
from bitwright.search.hardware import GIGA, Hardware
from bitwright.search.scenarios import Q4, Q8_BOTH, SCENARIOS

Data = Literal["none", "some", "lots"]
MEMORY_SHARE = 0.9
"""Of a device's memory that a model may fill; the rest is the system's."""
WORTH = 1.1
"""How many times faster fewer bits must be to be chosen."""
DENSE = "16 bit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One scheme for the whole model; `scheme` None leaves it as it is.

    Attributes:
        size_bytes: of its files; None where it does not fit the shapes, and `note` says why.
        bits_per_weight: of the quantized weights, scales included.
        memory: with the full cache; None where there is no size.
        fits: into the device; None without a device.
        speed: bounds; None without a device.
        has_kernel: the device multiplies the codes; None without a device.
        sqnr_db: of a sample of its weights, rounded to nearest; None without weights.
        note: what is special.
    """

    scheme: str | None
    size_bytes: int | None
    bits_per_weight: float | None
    memory: Memory | None
    fits: bool | None
    speed: Speed | None
    has_kernel: bool | None
    sqnr_db: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question, its answer, and why."""

    question: str
    answer: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What the answers are about."""

    scenario: str
    work: Workload
    hardware: Hardware | None
    data: Data
    options: Sequence[Option]
    instead: Mapping[str, str] = field(default_factory=dict[str, str])
    """Schemes whose groups do not fit the rows -> the same in smaller groups that do."""

    def option(self, scheme: str | None) -> Option:
        """The option with a scheme, or with what is offered instead."""
        wanted = None if scheme is None else self.instead.get(scheme, scheme)
        return next(option for option in self.options if option.scheme == wanted)


def choose(now: Situation) -> Option | None:
    """Return the scheme to use: of the candidates that fit, the most faithful that is not much slower than the fastest.

    Where no candidate can be used, the first of the scenario's smaller schemes that can; None where none can.
    """
    scenario = SCENARIOS[now.scenario]
    usable = _usable(now, scenario.candidates)
    if not usable:
        return next(iter(_usable(now, scenario.smaller)), None)
    with_kernel = [option for option in usable if option.has_kernel]
    if now.scenario == "finetune" or not with_kernel:
        return usable[-1]
    times = {option.scheme: _request_seconds(now, option) for option in with_kernel}
    fastest = min(times.values())
    return next(option for option in with_kernel if times[option.scheme] <= WORTH * fastest)


def _usable(now: Situation, schemes: Sequence[str]) -> list[Option]:
    """Options that the shapes allow and that are not known to be too large."""
    options = [now.option(scheme) for scheme in schemes]
    return [option for option in options if option.size_bytes is not None and option.fits is not False]


def method_for(scheme: str, data: Data) -> tuple[str, str]:
    """Return a method, as `--method` takes it, and why."""
    parsed = Scheme.parse(scheme)
    bits, is_integer = float(parsed.weights.format.bits), isinstance(parsed.weights.format, IntegerFormat)
    if is_integer and parsed.activations is not None:
        if data == "none":
            return "rtn", "without text nothing can be calibrated, and outliers of the inputs stay where they are"
        return "smoothquant+gptq", "moves outliers of the inputs into the weights, which text must show"
    if bits >= 6:
        return "rtn", "8 bits leave rounding to nearest so little error that nothing else pays"
    if scheme.startswith("nf4"):
        return "rtn", "QLoRA's base is rounded to nearest: the adapters make up for it"
    if data == "none":
        return "rtn", "with ranges of the least squared error, which hqq on the demo model did not beat; needs no text"
    if bits >= 4:
        if data == "lots":
            return "awq+gptq", "scales that protect what the inputs make large, then rounding column by column"
        return "gptq", "makes up for each column's error in the next ones, in minutes"
    if data == "lots" and is_integer:
        return "block_ap", "below 4 bits training the weights of whole blocks beats rounding them"
    return "gptq", "the best that little text allows; with lots of it, block_ap trains whole blocks of integers"


def answers_of(now: Situation, chosen: Option | None) -> list[Answer]:
    """Return the answers in the order in which the questions come up."""
    answers = [_needed(now), _weights_or_both(now), _which(now, chosen)]
    if chosen is not None and chosen.scheme is not None:
        answers += [_training(now, chosen.scheme), _method(now, chosen.scheme), _fits(now, chosen), _lost(chosen)]
    return answers


def _needed(now: Situation) -> Answer:
    dense = now.option(None)
    assert dense.memory is not None
    question = "Is quantization needed?"
    total = gigabytes(dense.memory.total_bytes)
    if now.hardware is None:
        reason = f"in its own dtype it takes {total} with the cache; name the device (--hardware) to know if that fits"
        return Answer(question=question, answer="not known without a device", reason=reason)
    room = gigabytes(MEMORY_SHARE * now.hardware.memory_bytes)
    if not dense.fits:
        return Answer(question=question, answer="yes", reason=f"{total} are needed and {room} can be used")
    reason = f"{total} are needed and {room} can be used; what it buys is speed and room for longer contexts"
    return Answer(question=question, answer="no: it fits", reason=reason)


def _weights_or_both(now: Situation) -> Answer:
    """W4A16 or W8A8: what decides is whether the device waits for memory or for arithmetic."""
    question = "Weights alone (W4A16), or activations too (W8A8)?"
    weights, both = now.option(Q4), now.option(Q8_BOTH)
    if weights.size_bytes is None:
        answer = "neither" if both.size_bytes is None else "activations too"
        return Answer(question=question, answer=answer, reason=f"W4A16 is not possible: {weights.note}")
    if both.size_bytes is None:
        return Answer(question=question, answer="weights alone", reason=f"W8A8 is not possible: {both.note}")
    if weights.speed is None or both.speed is None or now.hardware is None:
        reason = (
            "one sequence at a time waits for memory, which fewer bits of weights relieve; name a device for figures"
        )
        return Answer(question=question, answer="weights alone for one user", reason=reason)
    batch = now.work.batch
    figures = (
        f"a step of {_count(batch, 'token')} takes at least {duration(weights.speed.decode_s)} (W4A16) or "
        f"{duration(both.speed.decode_s)} (W8A8)"
    )
    if weights.speed.prefill_s is not None and both.speed.prefill_s is not None:
        figures += (
            f", {_count(batch, 'prompt')} of {_count(now.work.prompt_tokens, 'token')} "
            f"{duration(weights.speed.prefill_s)} or {duration(both.speed.prefill_s)}"
        )
    if not (weights.has_kernel or both.has_kernel):
        return Answer(
            question=question, answer="either, for size", reason=f"no kernel is known for this device; {figures}"
        )
    faster = _request_seconds(now, weights) < _request_seconds(now, both)
    return Answer(question=question, answer="weights alone" if faster else "activations too", reason=figures)


def _which(now: Situation, chosen: Option | None) -> Answer:
    question = "Which scheme?"
    place = SCENARIOS[now.scenario]
    refused = [now.option(scheme).note for scheme in (*place.candidates, *place.smaller)]
    if chosen is None and all(refused):
        return Answer(question=question, answer="none is possible", reason=refused[0])
    if chosen is None:
        least = min((o.memory.total_bytes for o in now.options if o.memory is not None), default=0)
        reason = (
            f"the least that any needs is {gigabytes(least)}. Shorten --context, store the cache in fewer bits "
            "(--kv-bits), or take a larger device"
        )
        return Answer(question=question, answer="none fits", reason=reason)
    assert chosen.scheme is not None
    if now.hardware is None:
        usual = place.candidates[-1]
        why = "usual for this scenario" if chosen.scheme == usual else f"these shapes do not allow {usual}, usual here"
        reason = f"{why}; {gigabytes(chosen.size_bytes or 0)} of files"
    elif not chosen.has_kernel:
        saved = "memory and disk" if now.hardware.stays_packed else "disk"
        reason = f"it fits, but no kernel is known for this device: it saves {saved}, and no time"
    else:
        requests = "a request" if now.work.batch == 1 else f"{now.work.batch} requests at once"
        seconds = duration(_request_seconds(now, chosen))
        reason = f"the most faithful within {WORTH - 1:.0%} of the fastest: at least {seconds} for {requests}"
    return Answer(question=question, answer=chosen.scheme, reason=reason)


def _training(now: Situation, scheme: str) -> Answer:
    question = "PTQ or QAT?"
    bits = float(Scheme.parse(scheme).weights.format.bits)
    if now.scenario == "finetune":
        return Answer(
            question=question, answer="adapters", reason="the base stays frozen; only the adapters are trained"
        )
    if bits >= 4:
        reason = "at 4 bits in groups or more, training buys little over a good PTQ method; measure before you train"
        return Answer(question=question, answer="PTQ", reason=reason)
    if now.data == "lots":
        reason = (
            "below 4 bits training pays, and block by block it needs one block in memory, not the optimiser's states"
        )
        return Answer(question=question, answer="block-wise training", reason=reason)
    return Answer(question=question, answer="PTQ", reason="below 4 bits training would pay, but needs lots of text")


def _method(now: Situation, scheme: str) -> Answer:
    method, reason = method_for(scheme, now.data)
    return Answer(question="Which method?", answer=method, reason=reason)


def _fits(now: Situation, chosen: Option) -> Answer:
    assert chosen.memory is not None
    used = chosen.memory
    parts = (
        f"weights {gigabytes(used.weight_bytes)}, cache of {now.work.batch} × {now.work.context} tokens "
        f"{gigabytes(used.cache_bytes)}, workspace {gigabytes(used.workspace_bytes)}"
    )
    answer = {True: "yes", False: "no", None: "not known without a device"}[chosen.fits]
    return Answer(question="Does it fit?", answer=answer, reason=parts)


def _lost(chosen: Option) -> Answer:
    question = "What will be lost?"
    if chosen.sqnr_db is None:
        reason = "no formula gives it from a configuration; quantize and evaluate"
        return Answer(question=question, answer="not known without weights", reason=reason)
    reason = "of a sample of weights, rounded to nearest; what the model loses is known after evaluation on text"
    return Answer(question=question, answer=f"{chosen.sqnr_db:.1f} dB SQNR", reason=reason)


def _request_seconds(now: Situation, option: Option) -> float:
    """Prompt and answers of one batch; the answer is what the prompt leaves of the context."""
    assert option.speed is not None
    answer = now.work.context - now.work.prompt_tokens
    return (option.speed.prefill_s or 0.0) + answer * option.speed.decode_s


def gigabytes(value: float) -> str:
    """10^9 bytes, to three digits."""
    return f"{three_digits(value / GIGA)} GB"


def duration(seconds: float) -> str:
    """Milliseconds below a second, to three digits."""
    return f"{three_digits(seconds)} s" if seconds >= 1 else f"{three_digits(1e3 * seconds)} ms"


def three_digits(value: float) -> str:
    """At least three digits, and never an exponent for a large number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
