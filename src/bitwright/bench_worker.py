"""One cell of a grid, measured in a process of its own: peak memory is then the cell's, and a crash is nobody else's.

    python -m bitwright.bench_worker RECORD

Reads what is asked from the record and leaves the figures there; see `worker_process`.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.bench_grid import REFERENCE, BenchFolder, finish_record, read_record
from bitwright.data.windows import hash_tokens
from bitwright.errors import DataError, RecipeError, ShapeError, StructureError, UnknownName, VerificationError
from bitwright.evaluation.score import Scorer
from bitwright.evaluation.streamed import final_hidden, score_heads
from bitwright.model.activations import Activations
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import quantize
from bitwright.preparation import open_model, text_windows
from bitwright.progress import Progress
from bitwright.recipe import Recipe
from bitwright.records import Environment, write_json_atomic
from bitwright.runs import RunDirectory
from bitwright.worker_process import serve

RESULTS = (
    "bits_per_weight", "ideal_bits_per_weight", "model_bits_per_parameter", "size_bytes", "original_size_bytes",
    "seconds", "quantize_seconds", "peak_memory_bytes", "quantize_held_bytes", "quantize_peak_bytes", "layouts",
    "result_hash",
)  # fmt: skip


def measure(file: Path, progress: Progress) -> None:
    """Quantize and evaluate the cell of a record, and finish the record with its figures, or with why there are none.

    Raises:
        BitwrightError: what another start may mend (a full disk, say); the record stays unfinished.
    """
    record = read_record(file)
    asked, folder = record["asked"], BenchFolder(file.parent.parent)
    figures: dict[str, Any] = {}
    status, reason = "done", None
    try:
        figures, reason = _figures(asked, folder, record["slug"], progress)
    except (RecipeError, ShapeError, StructureError, UnknownName) as error:
        status, reason = "refused", str(error)
    except VerificationError as error:
        status, reason = "failed", str(error)
    finish_record(file, status, reason, machine=_machine(), figures=figures)


def _figures(
    asked: Mapping[str, Any], folder: BenchFolder, slug: str, progress: Progress
) -> tuple[dict[str, Any], str | None]:
    """Quantize, evaluate; return the figures and why the result failed its gate."""
    place = {key: asked[key] for key in ("device", "dtype", "trust_remote_code")}
    run = RunDirectory(folder.runs / slug)
    lost = run.is_complete and not any(run.model.glob("*.safetensors"))
    recipe = Recipe.from_mapping(asked["recipe"])
    result = quantize(asked["model"], recipe, run.path, fresh=lost, progress=progress, **place)
    start = time.perf_counter()
    original, model = open_model(asked["model"], **place), open_model(run.model, **place)
    windows = evaluation_windows(original, asked)
    if hash_tokens(windows) != asked["text_hash"]:
        raise DataError(f"{asked['text']}: has changed since the grid was started. Start it again with --fresh.")
    expected, reference = _reference(original, windows, asked, folder, progress)
    hidden = final_hidden(model, windows, folder.work / f"{slug}.bin", progress, "evaluate")
    scorer = score_heads(model, hidden, windows, original, expected)
    hidden.delete()
    return {
        **{key: result.results[key] for key in RESULTS},
        **_scores(scorer),
        "reference_perplexity": reference["perplexity"],
        "gate_kl_mean": result.results["kl_mean"],
        "evaluation_seconds": time.perf_counter() - start,
    }, result.failure


def evaluation_windows(model: StreamedModel, asked: Mapping[str, Any]) -> Tensor:
    """The windows [N, T] that every cell of a grid is evaluated on."""
    every = text_windows(model, asked["text"], asked["context"], trust_remote_code=asked["trust_remote_code"])
    return every[: asked["windows"]]


def _reference(
    model: StreamedModel, windows: Tensor, asked: Mapping[str, Any], folder: BenchFolder, progress: Progress
) -> tuple[Activations, dict[str, Any]]:
    """The last hidden states of the unquantized model, computed by the first cell that needs them, and its figures."""
    store, file = folder.work / "reference.bin", folder.record(REFERENCE)
    if store.exists() and file.exists():
        figures = read_record(file)["figures"]
        return Activations(store, tuple(figures["hidden_shape"]), model.dtype), figures
    unfinished = store.with_suffix(".part")
    hidden = final_hidden(model, windows, unfinished, progress, "reference")
    hidden.sync()
    figures = {
        **_scores(score_heads(model, hidden, windows, None, None)),
        "size_bytes": model.skeleton.checkpoint.num_bytes,
        "hidden_shape": list(hidden.shape),
    }
    hidden.move(store)
    record = {
        "kind": "reference", "slug": REFERENCE, "status": "done", "reason": None, "fingerprint": None,
        "asked": {**asked, "recipe": None, "calibration_hash": None}, "machine": _machine(), "figures": figures,
    }  # fmt: skip
    write_json_atomic(file, record)
    return hidden, figures


def _scores(scorer: Scorer) -> dict[str, Any]:
    return {**asdict(scorer.result()), "window_kl": scorer.window_kl, "window_nll": scorer.window_nll}


def _machine() -> dict[str, Any]:
    return {
        "environment": Environment.capture().to_mapping(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(serve(measure))
