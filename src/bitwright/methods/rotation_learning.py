"""Learn rotations: gradient descent on the orthogonal matrices, on the end loss of the rounded model.

The loss is the divergence of the rounded, rotated model's predictions from the original's; rounding passes gradients
straight through. A step moves R along the skew part of its gradient by a Cayley transform, which keeps it orthogonal:

    A = G Rᵀ - R Gᵀ        R ← (1 + a/2 A)⁻¹ (1 - a/2 A) R        a = min(rate, 1 / |A|₁)

The whole model is in memory, as are its gradients; what counts in the end is the loss on windows that no step saw.

Reference: SpinQuant, arXiv:2405.16406, whose steps (100) and rate (1.5, to 0) these are. Differs: divergence from the
original instead of the text's own loss, and the best step by validation instead of the last.

Legend: N windows, T tokens, D hidden size, S channels of a head, V vocabulary.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import log_softmax

from bitwright.errors import ResourceError
from bitwright.methods.rotation_plan import rotated
from bitwright.methods.rotation_proof import Rotation, RotationPlan
from bitwright.methods.rotation_rounding import Rounding
from bitwright.model.products import ReplacedProducts
from bitwright.model.sites import block_sites
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress

RATE = 1.5
BATCH_TOKENS = 1024
VALIDATION_SHARE = 4
"""One window in so many is kept for validation."""
CHECKS = 10
COPIES = 6
"""Weights, rotated, coded, their gradients twice, and one to spare; activations come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What learning came to: the rotation, and the validation losses before and after, in nats per token."""

    rotation: Rotation
    loss_before: float
    loss: float
    best_step: int


def learn(
    model: StreamedModel,
    plan: RotationPlan,
    start: Rotation,
    rounding: Rounding,
    calibration: Tensor,
    *,
    steps: int,
    block: int | None = None,
    progress: Progress,
) -> Learned:
    """Improve a rotation; the result is never worse than the start on the validation windows.

    Args:
        model: computes in float32; whole in memory while this runs.
        plan: proven.
        start: where to begin.
        rounding: what becomes of weights and inputs.
        calibration: [N, T] tokens; some are kept for validation.
        steps: of gradient descent.
        block: size of the blocks within which the residual stream is turned, and stays so; None turns all of it.
        progress: called with (what, done, total).
    Raises:
        ResourceError: the model does not fit into memory often enough.
    """
    require_memory(model)
    held = max(1, calibration.shape[0] // VALIDATION_SHARE)
    validation, training = calibration[:held], calibration[held:]
    training = training if len(training) else calibration
    batch = max(1, BATCH_TOKENS // calibration.shape[1])
    with _whole_in_memory(model) as whole:
        loss_of = _Loss(model, whole, plan, rounding)
        current = start.to(model.device, torch.float32)
        best, best_step = current, 0
        before = least = loss_of.mean(current, validation, batch)
        for step in range(steps):
            chosen = [(step * batch + i) % len(training) for i in range(min(batch, len(training)))]
            current = _descend(loss_of, current, training[chosen], RATE * (1 - step / steps), block)
            if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
                loss = loss_of.mean(current, validation, batch)
                if loss < least:
                    best, least, best_step = current, loss, step + 1
            progress("rotation: learn", step + 1, steps)
    found = start if best_step == 0 else best.to(torch.device("cpu"), torch.float64)
    return Learned(rotation=_orthogonal(found, block), loss_before=before, loss=least, best_step=best_step)


def require_memory(model: StreamedModel) -> None:
    """Raises ResourceError where learning does not fit."""
    checkpoint = model.skeleton.checkpoint
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    needed, available = 4 * COPIES * weights, psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"learning a rotation takes the whole model: {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are "
            "available. Use rotation.kind: hadamard."
        )


@contextmanager
def _whole_in_memory(model: StreamedModel) -> Generator[nn.Module]:
    with model.outside():
        model.skeleton.load(model.blocks_path)
        try:
            yield model.skeleton.model
        finally:
            model.skeleton.free(model.blocks_path)


class _Loss:
    """KL divergence of the rotated, rounded model from the original, mean over tokens."""

    def __init__(self, model: StreamedModel, whole: nn.Module, plan: RotationPlan, rounding: Rounding) -> None:
        self._whole, self._plan, self._rounding, self._device = whole, plan, rounding, model.device
        self._tensors = {name: p.detach() for name, p in whole.named_parameters(remove_duplicate=False)}
        blocks = {name: whole.get_submodule(name) for name in model.block_names}
        self._sites = [site for name, block in blocks.items() for site in block_sites(block, name)]

    def __call__(self, rotation: Rotation, ids: Tensor) -> Tensor:
        ids = ids.to(self._device)
        with torch.no_grad():
            expected = log_softmax(self._whole(input_ids=ids, use_cache=False).logits.float(), -1)
        weights = {**self._tensors, **self._rotated(rotation)}
        with ReplacedProducts(self._rounding.products(self._sites, weights)):
            out = functional_call(self._whole, weights, (), {"input_ids": ids, "use_cache": False}, tie_weights=False)
        found = log_softmax(out.logits.float(), -1)
        return (expected.exp() * (expected - found)).sum(-1).mean()

    def mean(self, rotation: Rotation, windows: Tensor, batch: int) -> float:
        with torch.no_grad():
            losses = [float(self(rotation, part)) * len(part) for part in windows.split(batch)]
        return sum(losses) / len(windows)

    def _rotated(self, rotation: Rotation) -> Mapping[str, Tensor]:
        changed = rotated(self._tensors, self._plan.outside, rotation.residual)
        for roles, heads in zip(self._plan.blocks, rotation.heads, strict=True):
            changed |= rotated(self._tensors, roles, rotation.residual, heads)
        return changed


def _descend(loss_of: _Loss, rotation: Rotation, ids: Tensor, rate: float, block: int | None) -> Rotation:
    leaves = [rotation.residual, *(turn for turns in rotation.heads for turn in turns)]
    leaves = [leaf.detach().requires_grad_(True) for leaf in leaves]
    rest = iter(leaves[1:])
    heads = tuple(tuple(next(rest) for _ in turns) for turns in rotation.heads)
    loss = loss_of(Rotation(residual=leaves[0], heads=heads), ids)
    residual, *rest = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = (_within_blocks(residual, block), *rest)
    moved = [_cayley(leaf.detach(), gradient, rate) for leaf, gradient in zip(leaves, gradients, strict=True)]
    rest = iter(moved[1:])
    return Rotation(residual=moved[0], heads=tuple(tuple(next(rest) for _ in turns) for turns in rotation.heads))


def _within_blocks(matrix: Tensor, block: int | None) -> Tensor:
    """Zero what is outside the blocks along the diagonal of a square matrix."""
    if block is None:
        return matrix
    number = torch.arange(matrix.shape[0], device=matrix.device) // block
    return torch.where(number.unsqueeze(0) == number.unsqueeze(1), matrix, 0.0)


def _cayley(matrix: Tensor, gradient: Tensor | None, rate: float) -> Tensor:
    """Move an orthogonal matrix against its gradient; it stays orthogonal."""
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        return matrix
    skew = gradient @ matrix.T
    skew = skew - skew.T
    size = float(skew.abs().sum(0).max())
    if size == 0:
        return matrix
    half = 0.5 * min(rate, 1 / size) * skew
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(identity + half, (identity - half) @ matrix)


def _orthogonal(rotation: Rotation, block: int | None) -> Rotation:
    """Undo the rounding of many steps: the nearest orthogonal matrices, float64."""

    def nearest(matrix: Tensor) -> Tensor:
        u, _, v = torch.linalg.svd(matrix.double())
        return u @ v

    heads = tuple(tuple(nearest(turn) for turn in turns) for turns in rotation.heads)
    return Rotation(residual=_within_blocks(nearest(rotation.residual), block), heads=heads)
