"""How far a result is from its reference. Legend: T tokens, V vocabulary."""

import math

import torch
from torch import Tensor

from bitwright.errors import ShapeError
from bitwright.numerics.granularity import row_chunks
from bitwright.numerics.linalg import wide_dtype


def mse(reference: Tensor, result: Tensor) -> float:
    """Mean squared error, in squared units of the tensors.

    Raises:
        ShapeError: the shapes differ.
    """
    return _squared_sums(reference, result)[1] / reference.numel()


def sqnr_db(reference: Tensor, result: Tensor) -> float:
    """Signal to quantization noise ratio `10 log10(Σx² / Σ(x - y)²)` in dB; inf when equal, -inf for a zero reference.

    Raises:
        ShapeError: the shapes differ.
    """
    signal, noise = _squared_sums(reference, result)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def relative_error(reference: Tensor, result: Tensor) -> float:
    """Frobenius norm of the error over that of the reference; 0 when equal, inf for a zero reference.

    Raises:
        ShapeError: the shapes differ.
    """
    signal, noise = _squared_sums(reference, result)
    if noise == 0:
        return 0.0
    return math.sqrt(noise / signal) if signal > 0 else math.inf


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) per token in nats: what is lost when q stands in for the reference p.

    Args:
        logits_p: reference logits [T, V], any float dtype; -inf masks an entry.
        logits_q: logits [T, V] of the model under test.
    Returns:
        [T], float64 where the device has it: the KL of near-lossless models is below the float32 noise of a sum over V.
    Raises:
        ShapeError: the shapes differ or are not [T, V].
    """
    _check_logits(logits_p, logits_q)
    dtype = wide_dtype(logits_p.device)
    result = torch.empty(logits_p.shape[0], dtype=dtype, device=logits_p.device)
    for rows in row_chunks(logits_p):
        log_p = torch.log_softmax(logits_p[rows].to(dtype), dim=-1)
        log_q = torch.log_softmax(logits_q[rows].to(dtype), dim=-1)
        p = log_p.exp()
        # p log p -> 0 as p -> 0, where the difference of two infinities would be NaN.
        terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
        # Rounding may leave -1e-17 where the exact sum is 0.
        result[rows] = terms.sum(-1).clamp_(min=0)
    return result


def top1_agreement(logits_p: Tensor, logits_q: Tensor) -> float:
    """Share of tokens whose most likely next token is the same; logits [T, V].

    Raises:
        ShapeError: the shapes differ or are not [T, V].
    """
    _check_logits(logits_p, logits_q)
    return (logits_p.argmax(-1) == logits_q.argmax(-1)).float().mean().item()


def _squared_sums(reference: Tensor, result: Tensor) -> tuple[float, float]:
    if reference.shape != result.shape:
        raise ShapeError(f"metrics: cannot compare {list(reference.shape)} with {list(result.shape)}.")
    dtype = wide_dtype(reference.device)
    x, y = reference.reshape(-1, reference.shape[-1]), result.reshape(-1, reference.shape[-1])
    signal = noise = 0.0
    for rows in row_chunks(x):
        exact = x[rows].to(dtype)
        signal += exact.square().sum().item()
        noise += (exact - y[rows].to(dtype)).square_().sum().item()
    return signal, noise


def _check_logits(logits_p: Tensor, logits_q: Tensor) -> None:
    if logits_p.ndim != 2 or logits_p.shape != logits_q.shape:
        raise ShapeError(f"metrics: logits {list(logits_p.shape)} and {list(logits_q.shape)} must both be [T, V].")
