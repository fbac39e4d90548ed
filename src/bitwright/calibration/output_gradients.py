"""How much the loss of the whole model minds an error in the output of each site, token by token.

A layer-wise method counts an output error the same wherever it occurs. The loss does not: to second order it grows by
Σ (g · error)², g the gradient of the loss with respect to the output. Averaging g² over a few groups of output channels
leaves a weight per token and group, and with it a Hessian per group: Σ g² x xᵀ in the place of Σ x xᵀ.

It takes a backward pass over the whole model in float32, but no gradients of weights.

Shapes: N windows, T tokens, O output channels, C groups of them.

Reference: arXiv:2505.07004 (GuidedQuant), section 3.2.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from bitwright.errors import ResourceError, StructureError, VerificationError
from bitwright.model.checkpoint import Checkpoint
from bitwright.model.sites import Site
from bitwright.model.whole import load_whole
from bitwright.progress import Progress

ACTIVATION_COPIES = 40
"""Hidden states per block and token that the backward pass keeps, roughly: what enters each product and each norm."""


def channel_groups(num_channels: int, num_groups: int) -> list[slice]:
    """Cut output channels into groups of equal size, the last ones a channel shorter; fewer where there are fewer."""
    bounds = [num_channels * index // num_groups for index in range(num_groups + 1)]
    return [slice(start, end) for start, end in pairwise(bounds) if start < end]


def output_gradients(
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    windows: Tensor,
    *,
    num_groups: int,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return, for each site, the weight of every token in the error of each group of output channels.

    Args:
        checkpoint: the model that is quantized, before it is.
        sites: those wanted; linears with a module of their own, no experts.
        windows: [N, T] token ids; the loss of each is that of predicting its next tokens.
        num_groups: C.
    Returns:
        site name -> [C, N·T] float32 on the CPU: g² averaged over the group's channels, 1 in the mean over tokens.
    Raises:
        ResourceError: the model and its activations do not fit into memory in float32.
        StructureError: a site is not called once per forward by a module of its own.
        VerificationError: a gradient is not finite.
    """
    _require_memory(checkpoint, windows.shape[1])
    model: Any = load_whole(checkpoint.path, dtype=torch.float32, trust_remote_code=trust_remote_code).to(device).eval()
    model.requires_grad_(False)
    squares: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for site in sites:
        module = model.get_submodule(site.parameter.rpartition(".")[0])
        module.register_forward_hook(_watch(squares[site.name], channel_groups(site.out_features, num_groups)))
    # Weights are frozen: without a leaf that wants a gradient there would be no graph.
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_(True))
    for index in range(windows.shape[0]):
        ids = windows[index : index + 1].to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        progress("output gradients", index + 1, windows.shape[0])
    return {name: _normalised(name, parts, windows.numel()) for name, parts in squares.items()}


def load_output_gradients(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read what `output_gradients` found for some sites from the file it was saved to; sites it lacks are left out."""
    with safe_open(path, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
        known = set(cast(list[str], handle.keys()))
        return {name: cast(Tensor, handle.get_tensor(name)) for name in names if name in known}


def _watch(parts: list[Tensor], groups: list[slice]) -> Callable[[Any, Any, Tensor], None]:
    """A forward hook that appends the mean square gradient [C, tokens] of every output it sees."""

    def on_gradient(gradient: Tensor) -> None:
        squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
        parts.append(torch.stack([squares[:, group].mean(-1) for group in groups]).cpu())

    def on_output(_module: Any, _args: Any, out: Tensor) -> None:
        out.register_hook(on_gradient)

    return on_output


def _normalised(name: str, parts: list[Tensor], num_tokens: int) -> Tensor:
    if sum(part.shape[-1] for part in parts) != num_tokens:
        raise StructureError(
            f"{name}: its module is not called once for every token, so its gradients are unknown. Use gptq for it."
        )
    squares = torch.cat(parts, dim=-1).double()
    if not bool(torch.isfinite(squares).all()):
        raise VerificationError(f"{name}: a gradient of its output is not finite. Check the model, or use gptq.")
    mean = squares.mean(-1, keepdim=True)
    # Channels that the loss does not depend on: every token counts the same.
    return torch.where(mean > 0, squares / mean, torch.ones_like(squares)).float().contiguous()


def _require_memory(checkpoint: Checkpoint, seqlen: int) -> None:
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    rows = max((checkpoint.shape(name)[0] for name in checkpoint.names if len(checkpoint.shape(name)) == 2), default=0)
    widths = sum(min(checkpoint.shape(name)) for name in checkpoint.names if len(checkpoint.shape(name)) == 2)
    needed = 4 * (weights + seqlen * (ACTIVATION_COPIES * widths // 7 + 3 * rows))
    available = psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"Output gradients need a backward pass over the whole model: {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are available. Use gptq, or shorter calibration windows."
        )
