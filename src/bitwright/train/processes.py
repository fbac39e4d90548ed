"""Several processes that train one model, as torchrun starts them: one of them writes, the others wait for it."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import RecipeError
from bitwright.train.gradient_codes import GradientOptions
from bitwright.train.gradients import GradientTraffic, register


class Processes:
    """The processes of this training; one alone unless torchrun says otherwise.

    Args:
        device: where to train; of several GPUs each process takes its own.
        gradient_bits: of the gradients that they send each other; None for dense ones.
        shard: each keeps a share of the model in training (FSDP2), in place of a copy of it (DDP).
    Attributes:
        traffic: what quantized gradients have sent; None before the first step, and for dense ones.
    Raises:
        RecipeError: quantized gradients or shares of one process, both together, or a GPU that is not the first.
    """

    def __init__(self, device: str, gradient_bits: int | None = None, *, shard: bool = False) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.is_main = self.rank == 0
        if gradient_bits is not None and self.count == 1:
            raise RecipeError("--gradient-bits: one process sends no gradients. Start several with torchrun.")
        if shard and self.count == 1:
            raise RecipeError("--shard: one process has nobody to share a model with. Start several with torchrun.")
        if shard and gradient_bits is not None:
            raise RecipeError("--shard: sends gradients in its own way. Leave --gradient-bits or --shard out.")
        if device.startswith("cuda:") and device != "cuda:0":
            raise RecipeError(f"--device {device}: training takes the first GPU. Choose it by CUDA_VISIBLE_DEVICES.")
        self._gradients = None if gradient_bits is None else GradientOptions(bits=gradient_bits)
        self.shard = shard
        self.traffic: GradientTraffic | None = None
        self._state: Any = None
        if self.count > 1:
            from accelerate import PartialState

            # Others wait while the main process quantizes, which may take hours.
            self._state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
        self.device = device if self._state is None else str(self._state.device)

    @property
    def gradient_share(self) -> float | None:
        """Bytes that quantized gradients have sent, of those that dense ones would have; None without."""
        return None if self.traffic is None else self.traffic.share

    def wait(self) -> None:
        """Until all processes have come as far."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def wrapped(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Quantize the gradients of a model that DDP has wrapped, from where a checkpoint has left them.

        Raises:
            CheckpointError: the checkpoint is of another number of processes, or another model.
        """
        if self._gradients is not None:
            self.traffic = register(cast(DistributedDataParallel, model), self._gradients)
            if checkpoint is not None:
                self.traffic.load(self._file(checkpoint, self.rank))

    def save(self, checkpoint: Path) -> None:
        """Write what this process alone knows into a checkpoint: what its quantized gradients have not sent yet."""
        if self.traffic is not None:
            self.traffic.save(self._file(checkpoint, self.rank))

    def have_saved(self, checkpoint: Path) -> bool:
        """Whether all processes have written what they alone know."""
        return self._gradients is None or all(self._file(checkpoint, rank).is_file() for rank in range(self.count))

    def _file(self, checkpoint: Path, rank: int) -> Path:
        return checkpoint / f"gradients-{rank}.safetensors"
