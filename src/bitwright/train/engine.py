"""The training loop: transformers' Trainer on accelerate, which goes on where an interrupted training stopped.

Folder of a training:
    checkpoints/checkpoint-<step>/   trainable.safetensors and the Trainer's own state; the last two are kept
    losses.jsonl                     one line per step
    memory.json                      bytes by purpose, after the first step

A checkpoint counts once `trainer_state.json` is in it, which the Trainer writes last. Lines of steps after the one that
training goes on from are dropped, so that a killed and resumed training leaves the same curve.

Shapes: N windows, B windows per batch, T tokens.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from bitwright.data.windows import hash_tokens
from bitwright.errors import DataError, MissingDependency
from bitwright.progress import Progress, no_progress
from bitwright.records import read_jsonl, write_json_atomic, write_text_atomic
from bitwright.train.memory_ledger import measure_memory
from bitwright.train.objective import Objective
from bitwright.train.options import ADAMW_8BIT, TrainingOptions
from bitwright.train.processes import Processes

MEMORY = "memory.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What a training leaves beside the parameters.

    Attributes:
        losses: of every step, in nats per token or what the objective is.
        resumed_at: steps that an earlier, interrupted start had done.
        memory: bytes by purpose (`MemoryLedger`), after the first step.
    """

    losses: tuple[float, ...]
    resumed_at: int
    memory: dict[str, int]


def next_token_loss(model: nn.Module, ids: Tensor, _index: Tensor) -> Tensor:
    """Cross-entropy of each next token, in nats per token."""
    return cast(Tensor, model(input_ids=ids, labels=ids, use_cache=False).loss)


def fit(
    model: nn.Module,
    windows: Tensor,
    options: TrainingOptions,
    folder: Path,
    *,
    objective: Objective = next_token_loss,
    rate: Callable[[str], float] = lambda _: 1.0,
    buffers: Collection[str] = (),
    after_step: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
    progress: Progress = no_progress,
) -> Curve:
    """Train the parameters that require gradients; the same call goes on with an interrupted training.

    Args:
        model: as transformers loads it, on the device to train on; changed in place.
        windows: token ids [N, T].
        folder: of this training alone.
        objective: what is minimised.
        rate: factor on the learning rate of a parameter, by its name.
        buffers: names of buffers that training changes.
        after_step: called with the number of steps done before the next one, also where a training goes on.
        processes: those that train together; None for this one alone.
        progress: called with ("train", steps done, steps).
    Raises:
        TrainingDiverged: the loss, or what a quantizer is given, is not finite; the last good checkpoint stays.
        DataError: processes were given different windows, or none.
        CheckpointError: the folder's checkpoints belong to another model.
        MissingDependency: accelerate (or tensorboard or bitsandbytes, where asked for) is not installed.
    """
    if windows.shape[0] == 0:
        raise DataError("training needs at least one window of text. Give more text, or a smaller --seqlen.")
    require_packages(options)
    from bitwright.train.sharding import gather_into, sharded_copy
    from bitwright.train.trainer import LOSSES, Engine, Loop, last_checkpoint, step_of

    folder.mkdir(parents=True, exist_ok=True)
    processes = processes or Processes(next(model.parameters()).device.type)
    last = last_checkpoint(folder, processes)
    done, losses = step_of(last), folder / LOSSES
    if processes.is_main:
        _forget_after(losses, done)
    device = next(model.parameters()).device
    student = sharded_copy(model) if processes.shard else model
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    state: dict[str, Tensor] = {**trained, **{name: student.get_buffer(name) for name in buffers}}
    loop = Loop(
        folder=folder, state=state, objective=objective, rate=rate, after_step=after_step,
        processes=processes, measure=partial(_measure, folder / MEMORY, processes), progress=progress,
    )  # fmt: skip
    engine = Engine(student, windows, options, loop)
    _require_same_data(engine, windows)
    progress("train", done, options.steps)
    if done < options.steps:
        engine.go_on(last)
        # accelerate leaves its autocast around `forward`: what is measured later is the model, not its training.
        engine.accelerator.unwrap_model(cast(Any, engine.model), keep_fp32_wrapper=False)
    elif last is not None:
        engine.restore(last)
    if processes.shard:
        gather_into(model, student, device)
    return Curve(
        losses=tuple(float(entry["loss"]) for entry in read_jsonl(losses)), resumed_at=done,
        memory=json.loads((folder / MEMORY).read_text(encoding="utf-8")),
    )  # fmt: skip


def _measure(file: Path, processes: Processes, model: nn.Module, optimizer: Any, activations: int) -> None:
    if not file.is_file() and processes.is_main:
        own = getattr(optimizer, "optimizer", optimizer)
        write_json_atomic(file, asdict(measure_memory(model, own, activations=activations)))


def require_packages(options: TrainingOptions) -> None:
    """Raises MissingDependency, before anything is written, where training cannot run."""
    needed = {"accelerate": "train"}
    if options.tensorboard:
        needed["tensorboard"] = "train"
    if options.optimizer == ADAMW_8BIT:
        needed["bitsandbytes"] = "bitsandbytes"
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise MissingDependency(f"training needs {package}. Install bitwright[{extra}].")


def _forget_after(losses: Path, step: int) -> None:
    kept = [entry for entry in read_jsonl(losses) if entry["step"] <= step] if losses.is_file() else []
    write_text_atomic(losses, "".join(json.dumps(entry) + "\n" for entry in kept))


def _require_same_data(engine: Any, windows: Tensor) -> None:
    if engine.args.world_size == 1:
        return
    from accelerate.utils import gather_object

    if len(set(gather_object([hash_tokens(windows)]))) > 1:
        raise DataError("processes were given different windows. Give every process the same --data and --seed.")
