"""Several processes that train one model, as torchrun starts them: one of them writes, the others wait for it."""

import os
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import RecipeError
from bitwright.train.gradient_codes import GradientOptions
from bitwright.train.gradients import GradientTraffic, register


class Processes:
    """The processes of this training; alone unless torchrun says otherwise.

    Args:
        device: where to train; with several GPUs each process takes its own.
    """

    def __init__(self, device: str) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self._state: Any = None
        if self.count > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu")
        self.device = device if self._state is None else str(self._state.device)

    def wait(self) -> None:
        """Until all processes have come as far."""
        if self._state is not None:
            self._state.wait_for_everyone()


class QuantizedGradients:
    """Makes a training send its gradients in few bits, once its model is wrapped.

    Attributes:
        traffic: what was sent; None before.
    """

    def __init__(self, bits: int | None, processes: Processes) -> None:
        if bits is not None and processes.count == 1:
            raise RecipeError("--gradient-bits: one process sends no gradients. Start several with torchrun.")
        self.options = None if bits is None else GradientOptions(bits=bits)
        self.traffic: GradientTraffic | None = None

    @property
    def wrapped(self) -> Callable[[nn.Module], None]:
        """What `engine.fit` calls with the wrapped model."""
        return self._wrapped

    def _wrapped(self, model: nn.Module) -> None:
        if self.options is not None:
            self.traffic = register(cast(DistributedDataParallel, model), self.options)
