"""Transforms of the whole model: they write another model, of the same function, which is quantized in its place."""

import json
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import VerificationError
from bitwright.evaluation.streamed import evaluate
from bitwright.group_solver import GroupSolver
from bitwright.methods.model_task import ModelChange, ModelTask
from bitwright.methods.transforms import TRANSFORMS
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.outcome import TRANSFORMS_FILE
from bitwright.preparation import Job
from bitwright.progress import Progress, no_progress
from bitwright.records import write_json_atomic
from bitwright.walk import FISHER

MOST_KL = 0.01
"""A transformed model that differs by more nats per token has not kept its function: rounding to 16 bit stays below."""


def transformed(job: Job, work: Path, progress: Progress) -> tuple[StreamedModel, Tensor | None]:
    """Apply a recipe's transforms of the whole model, one after the other, and measure that the function has stayed.

    A resumed run finds what is finished; a model is written under another name until it is.

    Returns:
        the model to quantize, and the frame [D, D] of its hidden states; the original and None without such transforms.
    Raises:
        VerificationError: the function has changed by more than rounding explains.
    """
    model, frame = job.model, None
    file = work / TRANSFORMS_FILE
    notes = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in job.recipe.transforms:
        transform = TRANSFORMS[name]
        if transform.apply_model is None or transform.read_change is None:
            continue
        out = work / f"model-{name}"
        if not out.is_dir():
            solver = GroupSolver(model.skeleton, job.recipe, job.plan, work / FISHER)
            transform.apply_model(
                ModelTask(
                    model=model, plan=job.plan, recipe=job.recipe, calibration=job.calibration, out=out,
                    progress=progress, fake_quantize=solver.fake_quantize, input_quantizer=solver.input_quantizer,
                )
            )  # fmt: skip
        change = transform.read_change(out)
        model = StreamedModel(
            open_checkpoint(out), device=str(model.device), dtype=model.dtype,
            trust_remote_code=model.skeleton.trust_remote_code,
        )  # fmt: skip
        if name not in notes:
            notes[name] = change.notes | _invariance(job, model, work, name)
            write_json_atomic(file, notes)
        frame = _joined(frame, change)
    return model, frame


def _invariance(job: Job, model: StreamedModel, work: Path, name: str) -> dict[str, float]:
    score = evaluate(model, job.gate, work, no_progress, reference=job.model)
    if not (score.kl_mean is not None and score.kl_mean <= MOST_KL):
        raise VerificationError(
            f"{name}: the transformed model differs from the original by {score.kl_mean} nats per token; its function "
            f"must stay (up to {MOST_KL}). Leave {name} out, and report this model."
        )
    return {"invariance_kl": score.kl_mean}


def _joined(frame: Tensor | None, change: ModelChange) -> Tensor | None:
    if frame is None or change.frame is None:
        return change.frame if frame is None else frame
    return (frame.to(torch.float64) @ change.frame.to(torch.float64)).to(frame.dtype)
