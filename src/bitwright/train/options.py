"""How long and how fast to train. Needs no torch, so that the command line can say what the defaults are."""

import math
from dataclasses import dataclass
from typing import Literal

from bitwright.errors import RecipeError

Schedule = Literal["cosine", "linear", "constant_with_warmup"]
Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "adamw8bit"]
ADAMW_8BIT = "adamw8bit"
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
OPTIMIZERS = ("adamw", ADAMW_8BIT)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """What transformers' Trainer is told; batches and windows count per process.

    Attributes:
        steps: optimizer steps.
        batch: windows per step and process, `accumulation` times.
        accumulation: batches whose gradients are summed for one step.
        optimizer: adamw, or adamw8bit of bitsandbytes: states in 8 bit, with a scale for every 256 of them.
        learning_rate: the highest of the schedule.
        schedule: how the rate falls after it has risen.
        warmup: fraction of the steps over which the rate rises.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        precision: bfloat16 multiplies in bfloat16 (autocast) and keeps float32 parameters.
        checkpointing: recompute activations in the backward pass.
        save_every: steps between checkpoints, from which an interrupted training goes on.
        seed: of the order of windows and of dropout.
        tensorboard: also log for TensorBoard.
    """

    steps: int = 200
    batch: int = 8
    accumulation: int = 1
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    checkpointing: bool = False
    save_every: int = 50
    seed: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, " or ".join(OPTIMIZERS))
        _check(self.schedule in SCHEDULES, "schedule", self.schedule, ", ".join(SCHEDULES))
        for name in ("steps", "batch", "accumulation", "save_every"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        rate = self.learning_rate
        _check(rate > 0 and math.isfinite(rate), "learning_rate", rate, "a finite number above 0")
        _check(0 <= self.warmup < 1, "warmup", self.warmup, "from 0 to below 1")
        decay = self.weight_decay
        _check(decay >= 0 and math.isfinite(decay), "weight_decay", decay, "a finite number, at least 0")
        _check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")
        _check(self.seed >= 0, "seed", self.seed, "at least 0")


def _check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"{name} must be {wanted}, got {value!r}.")


FOR_ADAPTERS = TrainingOptions(steps=200, learning_rate=5e-4)
"""Adapters start at nothing and bear more than the weights themselves."""
FOR_QAT = TrainingOptions(steps=300, learning_rate=1e-3)
FOR_DISTILLATION = TrainingOptions(steps=300, learning_rate=1e-4)
