"""Fisher information: how much the loss of the whole model minds an error in each single weight.

Near a minimum the loss grows by half of Σ F (w - ŵ)² to second order, with F = E[g²] the diagonal of the empirical
Fisher matrix and g the gradient of a window's loss. Unlike the mean square of the inputs it knows the rows apart, and
what later layers make of them. It takes a backward pass, so the whole model in float32 and as much again for gradients.

Reference: arXiv:2306.07629 (SqueezeLLM), section 3: k-means weighted by the diagonal Fisher information.
"""

from collections.abc import Iterable
from typing import cast

import psutil
import torch
from torch import Tensor

from bitwright.errors import ResourceError, VerificationError
from bitwright.model.checkpoint import Checkpoint
from bitwright.model.whole import load_whole
from bitwright.progress import Progress

COPIES = 3
"""Weights, gradients and their mean squares; mean squares only of the parameters asked for."""


def fisher_information(
    checkpoint: Checkpoint,
    parameters: Iterable[str],
    windows: Tensor,
    *,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return E[g²] over windows for each named parameter, in its shape, float32, on the CPU.

    Args:
        checkpoint: the unquantized model.
        parameters: names as the model calls them.
        windows: token ids [N, T]; the loss of each is that of predicting its next tokens.
    Raises:
        ResourceError: the model does not fit into memory three times in float32.
        VerificationError: a gradient is not finite.
    """
    _require_memory(checkpoint)
    model = load_whole(checkpoint.path, dtype=torch.float32, trust_remote_code=trust_remote_code).to(device).eval()
    wanted = {name: cast(Tensor, model.get_parameter(name)) for name in parameters}
    model.requires_grad_(False)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(parameter, device="cpu") for name, parameter in wanted.items()}
    for index in range(windows.shape[0]):
        ids = windows[index : index + 1].to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, parameter in wanted.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square().cpu()
                parameter.grad = None
        progress("Fisher information", index + 1, windows.shape[0])
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise VerificationError(f"{name}: its gradient is not finite. Check the model, or use importance: inputs.")
        total /= windows.shape[0]
    return sums


def _require_memory(checkpoint: Checkpoint) -> None:
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    needed, available = 4 * COPIES * weights, psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"Fisher information needs a backward pass over the whole model: {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are available. Use importance: inputs."
        )
