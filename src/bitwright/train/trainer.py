"""transformers' Trainer, told to save only what is trained, to keep the curve, and to stop where it is not finite.

Apart from the rest because importing the Trainer takes long, and needs accelerate.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from bitwright.errors import CheckpointError, TrainingDiverged, VerificationError
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.progress import Progress
from bitwright.records import append_jsonl, read_jsonl
from bitwright.train.memory_ledger import KeptActivations
from bitwright.train.objective import Objective
from bitwright.train.options import ADAMW_8BIT, TrainingOptions
from bitwright.train.processes import Processes
from bitwright.train.sharding import load_optimizer_state, optimizer_state, put, whole

TRAINABLE = "trainable.safetensors"
STATE = "trainer_state.json"
CHECKPOINTS, LOSSES = "checkpoints", "losses.jsonl"
NUM_KEPT = 2
MOST_RISE, LEAST_LOSS = 10.0, 0.1
"""A checkpoint is no good where the loss is above so many times the first, or times this where the first is below."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loop:
    """What the Trainer does not know; see `engine.fit`. `state`: the tensors that make up a checkpoint, by name."""

    folder: Path
    state: Mapping[str, Tensor]
    objective: Objective
    rate: Callable[[str], float]
    after_step: Callable[[int], None]
    processes: Processes
    measure: Callable[[nn.Module, Any, int], None]
    progress: Progress


def last_checkpoint(folder: Path, processes: Processes) -> Path | None:
    """The newest complete checkpoint of a training; None where there is none."""
    return max(_complete_checkpoints(folder, processes), key=step_of, default=None)


def last_good_checkpoint(folder: Path, processes: Processes) -> Path | None:
    """The newest complete checkpoint of finite numbers, made where the loss had not run away; None where none is."""
    file = folder / LOSSES
    losses = {int(e["step"]): float(e["loss"]) for e in read_jsonl(file)} if file.is_file() else {}
    highest = MOST_RISE * max(losses.get(1, 0.0), LEAST_LOSS)

    def is_good(checkpoint: Path) -> bool:
        step = step_of(checkpoint)
        around = (losses.get(each, 0.0) for each in (step, step + 1))  # of the weights before, and of those in it
        return all(loss <= highest for loss in around) and _is_finite(checkpoint / TRAINABLE)

    found = sorted(_complete_checkpoints(folder, processes), key=step_of, reverse=True)
    return next(filter(is_good, found), None)


def diverged(loop: Loop, step: int, what: str) -> TrainingDiverged:
    """Return what stops a training whose numbers are not finite, with where to go on from."""
    kept = last_good_checkpoint(loop.folder, loop.processes)
    rest = "There is no good checkpoint." if kept is None else f"The last good checkpoint is {kept}."
    return TrainingDiverged(f"step {step}: {what} not finite. {rest} Use a lower learning rate.")


def _complete_checkpoints(folder: Path, processes: Processes) -> list[Path]:
    return [
        path
        for path in (folder / CHECKPOINTS).glob("checkpoint-*")
        if (path / TRAINABLE).is_file() and _is_json(path / STATE) and processes.have_saved(path)
    ]


def _is_finite(file: Path) -> bool:
    with safe_open(file, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
        names = list(cast(Any, handle).keys())
        return all(bool(cast(Tensor, handle.get_tensor(name)).isfinite().all()) for name in names)


def _is_json(file: Path) -> bool:
    """Whether a file was written to its end."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def step_of(checkpoint: Path | None) -> int:
    """Steps done when a checkpoint was made."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


class Recorder(TrainerCallback):
    """Keeps the curve, stops where it is not finite, and tells how far training has come."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.activations = loop, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        """Keep the loss of a step."""
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not (math.isfinite(loss) and math.isfinite(float(logs.get("grad_norm", 0.0)))):
            raise diverged(self.loop, state.global_step, "the loss or its gradient is")
        if state.is_world_process_zero:
            rate = float(logs["learning_rate"])
            append_jsonl(self.loop.folder / LOSSES, {"step": state.global_step, "loss": loss, "learning_rate": rate})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Bring back what changes on the way."""
        self.loop.after_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Measure, while gradients are there."""
        self.loop.measure(given["model"], given["optimizer"], self.activations)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Tell how far it has come."""
        self.loop.after_step(state.global_step)
        self.loop.progress("train", state.global_step, args.max_steps)


class Engine(Trainer):
    """Saves and loads what is trained, and nothing else."""

    def __init__(self, model: nn.Module, windows: Tensor, options: TrainingOptions, loop: Loop) -> None:
        device = next(model.parameters()).device
        # The Trainer refuses packed models unless PEFT has put adapters around them; ours it does not know.
        cast(Any, model).is_quantized = False
        if options.checkpointing:
            cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rows = [{"input_ids": window, "index": index} for index, window in enumerate(windows)]
        self.recorder = Recorder(loop)
        super().__init__(
            model=cast(Any, model), args=_arguments(options, loop.folder, device), train_dataset=cast(Any, rows),
            callbacks=[self.recorder],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the objective is a mean: the Trainer divides by `accumulation`
        self.options, self.loop, self.is_wrapped = options, loop, False
        self.restored: Path | None = None
        # So that the Trainer wraps nothing around a model that is sharded. To say so before would forbid checkpoints,
        # since its own do not hold the states of a sharded optimizer; these do.
        self.is_distributed_loading_by_transformers = loop.processes.shard

    def go_on(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint or the start.

        Raises:
            TrainingDiverged: a loss, a gradient, or what a quantizer is given is not finite.
        """
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except TrainingDiverged:
            raise
        except VerificationError:  # what quantizers raise knows of checkpoints to repair, and of no step
            raise diverged(self.loop, self.state.global_step + 1, "weights or inputs to quantize are") from None

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW, with a group for every learning rate; only matrices decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in cast(nn.Module, model or self.model).named_parameters():
            if parameter.requires_grad:
                decay = self.args.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((self.loop.rate(name.removeprefix("module.")), decay), []).append(parameter)
        self.optimizer = optimizer_class(self.options.optimizer)(
            [
                {"params": found, "lr": self.args.learning_rate * factor, "weight_decay": decay}
                for (factor, decay), found in groups.items()
            ]
        )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """The objective."""
        if not self.is_wrapped:
            self.loop.processes.wrapped(model, self.restored)
            self.is_wrapped = True
        ids, index = inputs["input_ids"].long(), inputs["index"]
        if self.recorder.activations or self.loop.processes.shard:  # of shards, gathered weights would count
            return self.loop.objective(model, ids, index)
        with KeptActivations(model) as kept:
            loss = self.loop.objective(model, ids, index)
        self.recorder.activations = kept.num_bytes
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        target = Path(output_dir or self.args.output_dir or ".")
        target.mkdir(parents=True, exist_ok=True)
        self.loop.processes.save(target)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.loop.state.items():
            found = whole(tensor.detach())  # of shards by all processes, whom the Trainer all asks
            if self.args.should_save:
                tensors[name] = found.cpu().contiguous()
        if self.args.should_save:
            save_tensors_atomic(target / TRAINABLE, tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.loop.processes.shard:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(cast(nn.Module, self.model), self._own_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.loop.processes.shard or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_optimizer_state(cast(nn.Module, self.model), self._own_optimizer(), state)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)

    def _own_optimizer(self) -> Optimizer:
        """Ours, inside accelerate's."""
        return cast(Any, self.optimizer).optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.restore(Path(resume_from_checkpoint))

    def restore(self, checkpoint: Path) -> None:
        """Put what a checkpoint holds into its place.

        Raises:
            CheckpointError: it belongs to another model.
        """
        file, state = checkpoint / TRAINABLE, self.loop.state
        found = load_file(file)
        if different := sorted(set(state) ^ set(found)):
            raise CheckpointError(f"{file}: its tensors are not the model's, first {different[0]}. Start with --fresh.")
        with torch.no_grad():
            for name, tensor in found.items():
                if tensor.shape != state[name].shape:
                    raise CheckpointError(f"{file}: {name} is {list(tensor.shape)}, not {list(state[name].shape)}.")
                put(state[name], tensor)
        self.restored = checkpoint


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """Return AdamW, or that of bitsandbytes with states in 8 bit."""
    if name == ADAMW_8BIT:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    return torch.optim.AdamW


def _arguments(options: TrainingOptions, folder: Path, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=math.ceil(options.warmup * options.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bfloat16",
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=NUM_KEPT,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if options.tensorboard else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=True,  # grids that are frozen on the way have no gradient
        use_cpu=device.type == "cpu",
        seed=options.seed,
    )
    # One process, one GPU: otherwise the Trainer splits batches itself. There is no public way to say so.
    cast(Any, arguments)._n_gpu = min(arguments.n_gpu, 1)
    return arguments
