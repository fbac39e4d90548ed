"""The verb of `bitwright speed`: how fast a result and its original run, in what memory and on what energy.

Each model is measured in a process of its own, one after the other, so that only one is ever in memory and its memory
is its own. A run keeps what was measured as records of kind `speed`, one per model:

    of            original or result
    model         its directory
    energy_note   the counters, or why there are none
    measurements  figures (`records.Measurement`); one that could not be measured is not among them
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitwright.errors import RecipeError, VerificationError
from bitwright.evaluation.generation_speed import Rate, Speed, check_lengths, check_positions, require_memory
from bitwright.model.stream import StreamedModel
from bitwright.preparation import max_length, open_model, open_original
from bitwright.progress import Progress, no_progress
from bitwright.records import Measurement, append_jsonl, write_json_atomic
from bitwright.runs import model_directory, run_behind
from bitwright.worker_process import run_worker

Role = Literal["original", "result"]
UNITS = {
    "prefill_tokens_per_s": "tokens/s", "decode_tokens_per_s": "tokens/s", "decode_j_per_token": "J/token",
    "memory_bytes": "bytes", "process_bytes": "bytes", "weight_bytes": "bytes", "load_seconds": "s",
}  # fmt: skip
REPEATED = ("prefill_tokens_per_s", "decode_tokens_per_s", "decode_j_per_token")
"""Medians of the repetitions; the others were measured once."""
PROMPT_SEED = 0
PROMPT_TOKENS, NEW_TOKENS = 128, 64

Measure = Callable[[Mapping[str, Any], Progress], Speed]
"""Measures a model by the arguments of `measure_speed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSpeed:
    """The speed of one model.

    Attributes:
        of: what it is to the other one.
        model: its directory.
        model_hash: SHA-256 of its weights as they are stored.
        speed: the figures.
    """

    of: Role
    model: Path
    model_hash: str
    speed: Speed

    def to_record(self) -> dict[str, Any]:
        """The record of kind `speed`."""
        return {
            "kind": "speed",
            "of": self.of,
            "model": str(self.model),
            "energy_note": self.speed.energy_note,
            "measurements": [each.to_mapping() for each in self.measurements()],
        }

    def measurements(self) -> list[Measurement]:
        """Every figure that could be measured, with its circumstances."""
        circumstances = ("prompt_tokens", "new_tokens", "dtype", "num_threads")
        details = {name: getattr(self.speed, name) for name in circumstances}
        found: list[Measurement] = []
        for name, unit in UNITS.items():
            value, spread = getattr(self.speed, name), dict[str, float]()
            if value is None:
                continue
            if isinstance(value, Rate):
                spread = {"slowest": value.slowest, "fastest": value.fastest}
                value = value.median
            found.append(
                Measurement(
                    name=name, value=value, unit=unit, n=self.speed.repeats if name in REPEATED else 1,
                    seed=PROMPT_SEED, device=self.speed.device, model_hash=self.model_hash, details=details | spread,
                )
            )  # fmt: skip
        return found


def measure_in_process(asked: Mapping[str, Any], progress: Progress) -> Speed:
    """Measure a model in a new process.

    Raises:
        VerificationError: the process could not.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        file = Path(folder) / "speed.json"
        write_json_atomic(file, asked)
        problem = run_worker("bitwright.speed_worker", file, Path(folder) / "speed.log", progress)
        if problem is not None:
            raise VerificationError(f"{asked['model_dir']}: its speed could not be measured: {problem}")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    figures: dict[str, Any] = {name: Rate(**x) if isinstance(x, dict) else x for name, x in found.items()}
    return Speed(**figures)


def run_speed(
    target: str | Path,
    *,
    original: str | None = None,
    alone: bool = False,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    measure: Measure = measure_in_process,
) -> list[MeasuredSpeed]:
    """Measure how fast a model runs, and before it its original; a run directory records both.

    Args:
        target: model directory, hub id or run directory.
        original: the model to set beside it; that of a run, where the run found it, unless given.
        alone: measure no original.
        prompt_tokens: of the prompt; PROMPT_TOKENS, or what the models have positions for, unless given.
        new_tokens: to write; NEW_TOKENS, or a third of the positions, unless given.
        repeats: that count.
        device: where.
        progress: called with (original or result, done, total).
        measure: how one model is measured.
    Raises:
        BitwrightError: see `errors`; whatever can be checked of both models is checked before either is measured.
    """
    if alone and original is not None:
        raise RecipeError(f"--original {original}: contradicts --alone. Leave one of them out.")
    run = run_behind(target)
    place: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    opened: dict[Role, StreamedModel] = {}
    if run is not None and not alone:
        opened["original"] = open_original(run, original, **place)
    elif original is not None:
        opened["original"] = open_model(model_directory(original), dtype="float32", **place)
    opened["result"] = open_model(model_directory(target), dtype="float32", **place)
    prompt_tokens, new_tokens = _lengths([max_length(model) for model in opened.values()], prompt_tokens, new_tokens)
    check_lengths(prompt_tokens, new_tokens, repeats)
    for model in opened.values():
        checkpoint = model.skeleton.checkpoint
        check_positions(model.skeleton.model.config, checkpoint.path, prompt_tokens + new_tokens)
        require_memory(checkpoint)
    asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, **place}
    found: list[MeasuredSpeed] = []
    for role, model in opened.items():
        checkpoint = model.skeleton.checkpoint
        speed = measure({"model_dir": str(checkpoint.path), **asked}, _labelled(progress, role))
        found.append(MeasuredSpeed(of=role, model=checkpoint.path, model_hash=checkpoint.audit(), speed=speed))
    if run is not None:
        append_jsonl(run.records, *(each.to_record() for each in found))
    return found


def _lengths(positions: Sequence[int | None], prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """The lengths given; what is not given fits into the positions of the models."""
    longest = min((each for each in positions if each is not None), default=PROMPT_TOKENS + NEW_TOKENS)
    if new_tokens is None:
        new_tokens = min(NEW_TOKENS, max(2, longest // 3))
    if prompt_tokens is None:
        prompt_tokens = min(PROMPT_TOKENS, max(1, longest - new_tokens))
    return prompt_tokens, new_tokens


def _labelled(progress: Progress, role: Role) -> Progress:
    """Report what a worker does as the measuring of one of the two models."""
    return lambda _, done, total: progress(role, done, total)
