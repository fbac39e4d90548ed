"""How fast a result and its original run, in what memory and on what energy: records of kind `speed`, and their words.

A record is of one model (`speed_run.MeasuredSpeed`) and holds a list of measurements. Of several records of a model the
latest counts. A figure that was not measured is None and never zero; why there is no energy stands in `energy_note`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from bitwright.reports import wording
from bitwright.reports.entries import Figure, Records, figure, is_finite, mapping_or_empty, text

UNPACKED = 0.9
"""Weights that take at least this share of the original's memory are as good as unpacked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasurementFact:
    """One figure; `slowest` and `fastest` of its repetitions where it is a rate."""

    value: Figure
    slowest: Figure
    fastest: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table: a figure, what it is called, and its unit or `size`."""

    name: str
    label: str
    unit: str


ROWS = (
    Row(name="prefill_tokens_per_s", label="Prompt, tokens per second", unit=""),
    Row(name="decode_tokens_per_s", label="New text, tokens per second", unit=""),
    Row(name="weight_bytes", label="Weights in memory", unit="size"),
    Row(name="memory_bytes", label="Peak of loading and running", unit="size"),
    Row(name="process_bytes", label="Peak of the whole process", unit="size"),
    Row(name="load_seconds", label="Time to load", unit="s"),
    Row(name="decode_j_per_token", label="Energy per new token", unit="J"),
)
NOTHING = MeasurementFact(value=None, slowest=None, fastest=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedFact:
    """The speed of one model.

    Attributes:
        of: original or result.
        figures: by name, such as `decode_tokens_per_s`.
        circumstances: device, threads, dtype and lengths in words; figures under others do not compare.
    """

    of: str
    energy_note: str
    figures: Mapping[str, MeasurementFact]
    circumstances: str

    def of_name(self, name: str) -> MeasurementFact:
        """A figure by its name; all None where it was not measured."""
        return self.figures.get(name, NOTHING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """The latest figures of the result and, measured under the same circumstances, of the original; None for none."""

    result: SpeedFact | None
    original: SpeedFact | None

    def ratio(self, name: str) -> Figure:
        """The result's figure over the original's."""
        pair = [None if each is None else each.of_name(name).value for each in (self.result, self.original)]
        result, original = pair
        if result is None or original is None or not is_finite(result) or not is_finite(original) or original <= 0:
            return None
        return result / original


def read_speeds(records: Records) -> Speeds:
    """Read them.

    Raises:
        RunError: an entry is not what bitwright writes.
    """
    found = [_read(record, where) for record, where in records.of("speed")]
    result = next((fact for fact in reversed(found) if fact.of != "original"), None)
    if result is None:
        return Speeds(result=None, original=None)
    originals = [fact for fact in found if fact.of == "original" and fact.circumstances == result.circumstances]
    return Speeds(result=result, original=originals[-1] if originals else None)


def _read(record: Mapping[str, Any], where: str) -> SpeedFact:
    given: object = record.get("measurements")
    measurements = [mapping_or_empty(each) for each in cast(Sequence[object], given)] if isinstance(given, list) else []
    figures: dict[str, MeasurementFact] = {}
    for each in measurements:
        name, details = text(each, "name"), mapping_or_empty(each.get("details"))
        place = f"{where}: {name}"
        figures[name] = MeasurementFact(
            value=figure(each, "value", place),
            slowest=figure(details, "slowest", place),
            fastest=figure(details, "fastest", place),
        )
    return SpeedFact(
        of=text(record, "of"), energy_note=text(record, "energy_note"), figures=figures,
        circumstances=_circumstances(measurements[0]) if measurements else "",
    )  # fmt: skip


def _circumstances(measurement: Mapping[str, Any]) -> str:
    details = mapping_or_empty(measurement.get("details"))
    return (
        f"{details.get('prompt_tokens', wording.ABSENT)} tokens of prompt, {details.get('new_tokens', wording.ABSENT)} "
        f"new ones, batch 1, {details.get('dtype', wording.ABSENT)}, on {measurement.get('device', wording.ABSENT)} "
        f"with {details.get('num_threads', wording.ABSENT)} threads"
    )


def sentences(speeds: Speeds) -> list[str]:
    """What it takes to run the result, beside the original; empty where nothing was measured."""
    if speeds.result is None:
        return []
    found: list[str] = []
    rate = speeds.result.of_name("decode_tokens_per_s")
    if rate.value is not None:
        words = f"Transformers writes {wording.number(rate.value)} tokens per second with it"
        if speeds.original is not None:
            words += f", {wording.number(speeds.original.of_name('decode_tokens_per_s').value)} with the original"
        found.append(f"{words}{_overlap(speeds)}.")
    found += _weights(speeds)
    energy = speeds.result.of_name("decode_j_per_token").value
    if energy is None:
        found.append("The energy of a token was not measured: no meter.")
    else:
        before = None if speeds.original is None else speeds.original.of_name("decode_j_per_token").value
        beside = "" if before is None else f", with the original {wording.number(before)} J"
        found.append(f"A token takes {wording.number(energy)} J{beside}, whatever else ran on the machine included.")
    return found


def _overlap(speeds: Speeds) -> str:
    """A warning where the repetitions of the two models overlap, so that they may be equally fast."""
    if speeds.original is None or speeds.result is None:
        return ""
    one, other = (each.of_name("decode_tokens_per_s") for each in (speeds.result, speeds.original))
    ends = (one.slowest, one.fastest, other.slowest, other.fastest)
    if any(end is None for end in ends):
        return ""
    low, high, other_low, other_high = cast(tuple[float, float, float, float], ends)
    return "; the repetitions overlap, so it may be chance" if low <= other_high and other_low <= high else ""


def _weights(speeds: Speeds) -> list[str]:
    """What the weights take in memory, and whether they are packed there."""
    assert speeds.result is not None
    held = speeds.result.of_name("weight_bytes").value
    if held is None:
        return []
    words = f"While it runs, its weights take {wording.size(held)} of memory"
    ratio = speeds.ratio("weight_bytes")
    if speeds.original is None or ratio is None:
        return [f"{words}."]
    words += f", the original's {wording.size(speeds.original.of_name('weight_bytes').value)}"
    if ratio >= UNPACKED:
        words += ": transformers unpacks this layout at the first use, where an engine made for it does not"
    return [f"{words}."]


def cell(fact: SpeedFact, row: Row) -> str:
    """One figure of the table in words."""
    found = fact.of_name(row.name)
    if found.value is None:
        return "no meter" if row.unit == "J" else wording.ABSENT
    if row.unit == "size":
        return wording.size(found.value)
    words = wording.number(found.value) + (f" {row.unit}" if row.unit else "")
    if found.slowest is None or found.fastest is None:
        return words
    return f"{words} ({wording.number(found.slowest)} to {wording.number(found.fastest)})"


def change(speeds: Speeds, row: Row) -> str:
    """The quantized model's figure as a multiple of the original's."""
    ratio = speeds.ratio(row.name)
    return wording.ABSENT if ratio is None else f"{wording.number(ratio)} times"
