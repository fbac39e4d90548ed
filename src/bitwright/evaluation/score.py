"""Perplexity and divergence from logits, accumulated window by window.

Protocol: the text is tokenised once, cut into non-overlapping windows of T tokens (the remainder is dropped), and each
window predicts its tokens 2 … T from those before. Perplexity is exp(mean negative log-likelihood) over all
predictions. Divergence is KL(reference ‖ model) in nats per predicted token. Standard errors treat windows, not
tokens, as the independent sample, because tokens of one window are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.metrics import kl_divergence

TOKENS_PER_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a model scored on a text.

    Attributes:
        num_windows: windows evaluated.
        num_tokens: predictions made.
        perplexity: exp of the mean negative log-likelihood per token.
        perplexity_stderr: its standard error over windows; None for a single window.
        kl_mean: mean KL divergence from the reference in nats per token; None without a reference, as those below.
        kl_stderr: its standard error over windows; None for a single window.
        kl_p99: 99 % quantile over tokens.
        kl_p999: 99.9 % quantile over tokens.
        same_top1: fraction of tokens for which model and reference rank the same token first.
    """

    num_windows: int
    num_tokens: int
    perplexity: float
    perplexity_stderr: float | None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    same_top1: float | None = None


class Scorer:
    """Accumulates a Score. Shapes: T tokens of one window, V vocabulary."""

    def __init__(self) -> None:
        self._nll: list[float] = []
        self._kl: list[Tensor] = []
        self._agree: list[float] = []
        self._num_tokens = 0

    def add(self, input_ids: Tensor, logits: Tensor, reference: Tensor | None = None) -> None:
        """Add one window: input_ids [T], logits [T, V] and, for divergence, the reference's logits [T, V]."""
        targets = input_ids[1:].to(logits.device)
        losses, divergences, agreements = [], [], []
        for start in range(0, targets.shape[0], TOKENS_PER_CHUNK):
            end = min(start + TOKENS_PER_CHUNK, targets.shape[0])
            part = logits[start:end].float()
            losses.append(torch.nn.functional.cross_entropy(part, targets[start:end], reduction="none").double())
            if reference is not None:
                other = reference[start:end].float()
                divergences.append(kl_divergence(other, part))
                agreements.append((other.argmax(-1) == part.argmax(-1)).double())
        self._num_tokens += targets.shape[0]
        self._nll.append(float(torch.cat(losses).mean()))
        if reference is not None:
            self._kl.append(torch.cat(divergences).double().cpu())
            self._agree.append(float(torch.cat(agreements).mean()))

    @property
    def window_nll(self) -> list[float]:
        """Mean negative log-likelihood per token of each window."""
        return list(self._nll)

    @property
    def window_kl(self) -> list[float]:
        """Mean KL divergence per token of each window; empty without a reference."""
        return [float(window.mean()) for window in self._kl]

    def result(self) -> Score:
        """Return the score of all windows added so far."""
        nll, nll_stderr = mean_and_stderr(self._nll)
        perplexity = math.exp(nll) if math.isfinite(nll) and nll < 700 else math.inf
        base = Score(
            num_windows=len(self._nll),
            num_tokens=self._num_tokens,
            perplexity=perplexity,
            perplexity_stderr=None if nll_stderr is None else perplexity * nll_stderr,
        )
        if not self._kl:
            return base
        tokens = torch.cat(self._kl)
        _, kl_stderr = mean_and_stderr(self.window_kl)
        return Score(
            num_windows=base.num_windows,
            num_tokens=base.num_tokens,
            perplexity=base.perplexity,
            perplexity_stderr=base.perplexity_stderr,
            kl_mean=float(tokens.mean()),
            kl_stderr=kl_stderr,
            kl_p99=_quantile(tokens, 0.99),
            kl_p999=_quantile(tokens, 0.999),
            same_top1=sum(self._agree) / len(self._agree),
        )


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent values and its standard error, None for a single one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _quantile(values: Tensor, fraction: float) -> float:
    """The smallest value that at least `fraction` of the values do not exceed; torch.quantile stops at 16 M values."""
    rank = max(1, math.ceil(fraction * values.numel()))
    return float(torch.kthvalue(values, rank).values)
