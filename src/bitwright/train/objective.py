"""What a training minimises."""

from collections.abc import Callable

from torch import Tensor, nn

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, token ids [B, T], which windows they are [B]) -> the loss [], a mean over predicted tokens."""
