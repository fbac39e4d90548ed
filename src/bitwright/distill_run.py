"""Distillation as a run: a model trained towards the distributions of a teacher with the same vocabulary.

The run directory has, beside run.json and 5-records.jsonl:
    0-text/      what the teacher has written, where the student trains on that
    4-model/     a model directory like the student's
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.errors import CheckpointError, RecipeError
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.dense_copy import write_dense_copy
from bitwright.preparation import open_model, vocabulary_size
from bitwright.process_memory import PeakMemory
from bitwright.progress import Progress, no_progress
from bitwright.runs import RunDirectory
from bitwright.train.distillation import check_labels, distillation_loss, teacher_targets, towards, with_labels
from bitwright.train.engine import fit
from bitwright.train.heldout import score_in_memory
from bitwright.train.objective import Objective
from bitwright.train.options import FOR_DISTILLATION, TrainingOptions
from bitwright.train.processes import Processes
from bitwright.training_run import (
    TRAINING,
    TrainingResult,
    begin,
    carry_out,
    load_in_memory,
    read_text,
    task_identity,
    worsening,
    write_training_records,
)
from bitwright.training_text import DrawnText, TrainingText

TARGETS = "targets"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillTask:
    """What to train.

    Attributes:
        teacher: model directory or hub id.
        text: to train on and to judge by.
        training: how long and how fast.
        temperature: of both distributions.
        top_k: keep so many of the teacher's logits per token on disk; None runs the teacher at every step.
        labels: share of the text's own next tokens in the loss, from 0 to below 1.
        features: weight of the distance between hidden states of the same depth; 0 for none.
        device: where to train.
        gradient_bits: of gradients between processes; None for dense ones.
        shard: several processes share one model (FSDP2); each has a copy of it otherwise.
    """

    teacher: str
    text: TrainingText
    training: TrainingOptions = FOR_DISTILLATION
    temperature: float = 1.0
    top_k: int | None = None
    labels: float = 0.0
    features: float = 0.0
    device: str = "cpu"
    gradient_bits: int | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RecipeError(f"temperature must be a finite number above 0, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise RecipeError(f"top_k must be at least 1, got {self.top_k}.")
        check_labels(self.labels)
        if not (self.features >= 0 and math.isfinite(self.features)):
            raise RecipeError(f"features must be a finite number, at least 0, got {self.features}.")
        if self.features and self.top_k is not None:
            raise RecipeError("features need the teacher itself. Leave --top-k or --features out.")


def distill_model(
    model: str | Path,
    task: DistillTask,
    out: str | Path,
    *,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> TrainingResult:
    """Train a model towards a teacher into a run directory; the same call goes on with an interrupted run.

    Raises:
        CheckpointError: student and teacher have different vocabularies, or the student is quantized.
        RecipeError: more logits are to be kept than there are tokens.
        BitwrightError: see `errors`; TrainingDiverged where the loss is not finite.
    """
    run, processes = begin(out, task, shard=task.shard)
    student, teacher = open_checkpoint(model), open_checkpoint(task.teacher)
    _require_alike(model, task, student, trust_remote_code)
    text = task.text.draw(model, writer=task.teacher, trust_remote_code=trust_remote_code)
    asked = {
        "model": str(model), "model_hash": student.audit(), "teacher_hash": teacher.audit(),
        "data_hash": text.identity, "task": task_identity(task),
    }  # fmt: skip

    def work() -> None:
        _train(student, teacher, task, run, text, processes, trust_remote_code, progress)

    return carry_out(run, asked, work, processes, fresh=fresh)


def _train(
    source: Checkpoint, teacher_source: Checkpoint, task: DistillTask, run: RunDirectory, text: DrawnText,
    processes: Processes, trust_remote_code: bool, progress: Progress,
) -> None:  # fmt: skip
    begun, memory = time.perf_counter(), PeakMemory()
    windows, heldout = read_text(text, run, processes, progress)
    if task.top_k is not None:
        windows = _trained_on(windows, task.training, processes)
    student, teacher = (
        load_in_memory(each.path, processes.device, torch.float32, trust_remote_code=trust_remote_code)
        for each in (source, teacher_source)
    )
    teacher = teacher.requires_grad_(False).eval()
    before = score_in_memory(student, heldout, reference=teacher)
    objective = _objective(teacher, windows, task, run.work / TARGETS, processes, progress)
    curve = fit(
        student, windows, task.training, run.work / TRAINING, objective=objective,
        processes=processes, progress=progress,
    )  # fmt: skip
    if not processes.is_main:
        return
    after = score_in_memory(student, heldout, reference=teacher)
    streamed = open_model(source.path, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    shutil.rmtree(run.model, ignore_errors=True)  # of a start that was killed after writing it
    write_dense_copy(streamed.skeleton, {n: p.detach().cpu() for n, p in student.named_parameters()}, run.model)
    results = {
        "kind": "distill",
        "data": task.text.data,
        "labels": task.labels,
        "perplexity_teacher": score_in_memory(teacher, heldout).perplexity,
        "perplexity_before": before.perplexity,
        "perplexity": after.perplexity,
        "perplexity_stderr": after.perplexity_stderr,
        "kl_before": before.kl_mean,
        "kl_mean": after.kl_mean,
        "heldout_tokens": after.num_tokens,
        "memory": curve.memory,
        "gradient_share": processes.gradient_share,
        "peak_memory_bytes": memory.since_bytes,
        "seconds": time.perf_counter() - begun,
        "losses": list(curve.losses),
    }
    write_training_records(run, results)
    run.finish(results, failure=worsening(before, after, text_share=task.labels))


def _trained_on(windows: Tensor, training: TrainingOptions, processes: Processes) -> Tensor:
    """As many windows as the steps will see, drawn at random: the teacher need not speak of others."""
    count = training.steps * training.batch * training.accumulation * processes.count
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(training.seed))
    return windows[order[:count]]


def _objective(
    teacher: nn.Module, windows: Tensor, task: DistillTask, folder: Path, processes: Processes, progress: Progress
) -> Objective:
    """The loss, from logits kept on disk or from the teacher itself."""
    if task.top_k is None:
        return towards(teacher, task.temperature, features=task.features, labels=task.labels)
    if processes.is_main:
        teacher_targets(teacher, windows, folder, task.top_k, progress, temperatures=(task.temperature,))
    processes.wait()
    targets = teacher_targets(teacher, windows, folder, task.top_k, temperatures=(task.temperature,))

    def kept(model: nn.Module, ids: Tensor, index: Tensor) -> Tensor:
        read = [targets.read(int(window), task.temperature) for window in index]
        indices, log_probs = (torch.stack([pair[part] for pair in read]).to(ids.device) for part in (0, 1))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = distillation_loss(logits, indices[:, :-1], log_probs[:, :-1], task.temperature)
        return with_labels(loss, logits, ids, task.labels)

    return kept


def _require_alike(model: str | Path, task: DistillTask, student: Checkpoint, trust_remote_code: bool) -> None:
    if student.is_packed:
        raise CheckpointError(f"{model}: is quantized. Give the original, or train its codes with bitwright train qat.")
    sizes = [
        vocabulary_size(open_model(source, device="cpu", dtype="float32", trust_remote_code=trust_remote_code))
        for source in (model, task.teacher)
    ]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{task.teacher}: knows {sizes[1]} tokens, {model} knows {sizes[0]}. Give a teacher with the same "
            "tokenizer."
        )
    if task.top_k is not None and task.top_k > sizes[0]:
        raise RecipeError(f"--top-k {task.top_k}: the model knows {sizes[0]} tokens. Use {sizes[0]} or less.")
