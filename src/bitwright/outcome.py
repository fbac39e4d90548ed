"""The end of a run: the gate, the artefacts of every stage, and the records that the report is made of."""

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitwright.automatic import trials
from bitwright.errors import VerificationError
from bitwright.evaluation.score import Score
from bitwright.evaluation.streamed import compare_heads
from bitwright.exporters.model_writer import reread_equals
from bitwright.model.activations import Activations
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.preparation import Job
from bitwright.process_memory import PeakMemory
from bitwright.records import Environment, append_jsonl, write_json_atomic, write_text_atomic
from bitwright.runs import RunDirectory
from bitwright.walk import Walk

CALIBRATION_TOKENS = "calibration_tokens"
GATE_TOKENS = "gate_tokens"
TRANSFORMS_FILE = "transforms.json"
"""In the work folder: what transforms of the whole model noted, by name."""


def conclude(
    job: Job,
    run: RunDirectory,
    walk: Walk,
    gate: Activations,
    reference: Activations,
    seconds: float,
    memory: PeakMemory,
) -> None:
    """Complete the model directory, measure the loss, write every artefact and mark the run finished.

    Args:
        job: what was asked.
        run: where to.
        walk: finished.
        gate: last hidden states of the gate text in the quantized model.
        reference: those in the original.
        seconds: of this process since the command.
        memory: since before the walk.

    Raises:
        VerificationError: what is on disk is not what was decided. A loss above the gate does not raise: the run is
        marked.
    """
    _write_rest(job, walk)
    _check_coverage(job, run, walk)
    score = compare_heads(walk.model, gate, job.gate, job.model, reference)
    original = compare_heads(job.model, reference, job.gate, None, None)
    blocks = [_read_block(run, index) for index in range(job.model.num_blocks)]
    seconds += sum(block["seconds"] for block in blocks[: walk.resumed_blocks])
    results = _results(job, run, blocks, score, original, seconds, memory)
    write_json_atomic(run.structure, {"blocks": [block["structure"] for block in blocks]})
    _write_stats(job, run)
    write_text_atomic(run.plan, job.plan.to_yaml())
    _write_records(job, run, blocks, results)
    run.make_loadable()
    run.finish(results, failure=gate_failure(results["kl_mean"], job.recipe.max_kl))


def _write_rest(job: Job, walk: Walk) -> None:
    skeleton = walk.model.skeleton
    inside = {name for block in job.model.block_names for name in skeleton.stored_names(block)}
    outside = [name for name in skeleton.checkpoint.names if name not in inside]
    written = walk.writer.write_shard(job.model.num_blocks, outside, {})
    different = reread_equals(walk.writer.shard_path(job.model.num_blocks), written)
    if different:
        raise VerificationError(f"{walk.writer.directory}: {different[0]} reads back differently. Check the disk.")
    walk.writer.finish(job.sites, dict(job.plan.sites))


def _check_coverage(job: Job, run: RunDirectory, walk: Walk) -> None:
    """Every tensor of the original is in the result, and exactly the planned ones are packed."""
    result = open_checkpoint(run.model)
    original = walk.model.skeleton.checkpoint
    missing = sorted(set(original.names) ^ set(result.names))
    if missing:
        raise VerificationError(
            f"{run.model}: {len(missing)} tensors differ from the original's list, first {missing[0]}."
        )
    planned = {
        stored
        for site in job.sites
        if job.plan.sites[site.name].scheme is not None
        for stored, index, _, _ in job.model.skeleton.stored_pieces(site.parameter)
        if index == site.index
    }
    astray = sorted(planned ^ set(result.packed_names()))
    if astray:
        raise VerificationError(f"{run.model}: {len(astray)} weights are not as planned, first {astray[0]}.")


def _read_block(run: RunDirectory, index: int) -> dict[str, Any]:
    return json.loads((run.work / f"block-{index:05d}.json").read_text(encoding="utf-8"))


def _results(
    job: Job,
    run: RunDirectory,
    blocks: list[dict[str, Any]],
    score: Score,
    original: Score,
    seconds: float,
    memory: PeakMemory,
) -> dict[str, Any]:
    checkpoint = job.model.skeleton.checkpoint
    sites = [site for block in blocks for site in block["sites"]]
    num_weights = sum(site["num_weights"] for site in sites)
    num_parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    result = open_checkpoint(run.model)
    return {
        **{key: value for key, value in asdict(score).items() if key.startswith(("kl", "same"))},
        "perplexity": score.perplexity,
        "reference_perplexity": original.perplexity,
        "gate_tokens": score.num_tokens,
        **{
            key: sum(site[key] * site["num_weights"] for site in sites) / num_weights
            for key in ("bits_per_weight", "ideal_bits_per_weight")
        },
        "layouts": sorted(set(job.layouts.values())),
        "model_bits_per_parameter": 8 * result.num_bytes / num_parameters,
        "size_bytes": result.num_bytes,
        "result_hash": result.audit(),
        "original_size_bytes": checkpoint.num_bytes,
        "num_quantized": len(job.plan.quantized),
        "num_kept": len(job.plan.kept),
        "quantized_weights": num_weights,
        "num_parameters": num_parameters,
        "seconds": seconds,
        "quantize_seconds": sum(block["seconds"] - block["checking_seconds"] for block in blocks),
        "peak_memory_bytes": memory.whole_bytes,
        "quantize_held_bytes": memory.held_bytes,
        "quantize_peak_bytes": memory.since_bytes,
    }


def gate_failure(loss: float, max_kl: float) -> str | None:
    """Why a KL divergence of `loss` nats per token fails the gate; None if it passes."""
    if math.isfinite(loss) and loss <= max_kl:
        return None
    return (
        f"KL divergence {loss:.3g} nats per token is above the gate of {max_kl:g}. "
        "Use more bits, smaller groups or method gptq, or raise --max-kl if this loss is intended."
    )


def _write_stats(job: Job, run: RunDirectory) -> None:
    stats: dict[str, Tensor] = {
        CALIBRATION_TOKENS: job.calibration.to(torch.int32),
        GATE_TOKENS: job.gate.to(torch.int32),
    }
    for index in range(job.model.num_blocks):
        stats.update(
            {
                f"{name}.mean_square": value
                for name, value in load_file(run.work / f"stats-{index:05d}.safetensors").items()
            }
        )
    save_tensors_atomic(run.stats, stats)


def _write_records(job: Job, run: RunDirectory, blocks: list[dict[str, Any]], results: dict[str, Any]) -> None:
    run.records.unlink(missing_ok=True)
    context = {
        "model": str(job.model.skeleton.checkpoint.path),
        "model_hash": job.model_hash,
        "data_hash": job.data_hash,
        "seed": job.recipe.calibration.seed,
        "recipe": job.recipe.to_mapping(),
        "device": str(job.model.device),
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "environment": asdict(Environment.capture()),
    }
    append_jsonl(run.records, {"kind": "context", **context})
    append_jsonl(run.records, {"kind": "quantize", **results})
    for trial in trials(run.work):
        append_jsonl(run.records, {"kind": "auto", **asdict(trial)})
    transforms = run.work / TRANSFORMS_FILE
    noted = json.loads(transforms.read_text(encoding="utf-8")) if transforms.is_file() else {}
    for name, notes in noted.items():
        append_jsonl(run.records, {**notes, "kind": "transform", "transform": name})
    for block in blocks:
        append_jsonl(
            run.records, {"kind": "block", **{key: block[key] for key in ("block", "seconds", "hidden_sqnr_db")}}
        )
        for notes in block["transforms"]:
            append_jsonl(run.records, {**notes, "kind": "transform", "block": block["block"]})
        for site in block["sites"]:
            histogram = site.pop("histogram", None)  # None, too, in blocks that an earlier version left
            append_jsonl(run.records, {"kind": "site", "block": block["block"], **site})
            if histogram is not None:
                append_jsonl(run.records, {"kind": "histogram", "site": site["site"], **histogram})
    for name in job.plan.kept:
        append_jsonl(run.records, {"kind": "kept", "site": name, "reason": job.plan.sites[name].reason})
