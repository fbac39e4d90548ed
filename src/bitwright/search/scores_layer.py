"""What one site's error is worth, from sums over tokens.

To second order a model whose site errs by Δy_t at token t loses, in KL divergence summed over a window,
½ E[(Σ_t g_t · Δy_t)²], g the gradient of the log-likelihood of labels drawn from the model's own predictions: that is
the Fisher information. There is no first-order term: the divergence from the original is smallest at the original. (The
loss on a text's own labels has one, but it says how this text's loss moves by the chance of its labels, not how far the
model does.) The scores are this with less and less of it:

    window_gradient   all of it, one sample per window:     ½ Σ_windows (G · ΔW)² / tokens, G a window's gradient
    output_gradient   tokens count by themselves:           ½ Σ_t (g_t · Δy_t)² / tokens
    fisher            single weights count by themselves:   ½ Σ_w Σ_windows G² ΔW² / tokens
    trace             all weights of a site count the same: ½ tr(∇²L) mean(ΔW²), L the loss per token of the text
    hessian           all outputs count the same:           Σ_t |Δy_t|² / tokens = tr(ΔW H ΔWᵀ)
    output_sqnr       relative to the outputs:              Σ_t |Δy_t|² / Σ_t |y_t|²
    weight_sqnr       no data but for the choice of ranges: |ΔW|² / |W|²

The first four are nats per token. The SQNRs are noise over signal, the inverse of the usual ratio, so that every score
grows with the harm and is 0 in 16 bit.

Shapes: T tokens of one call, O out features, I in features.

Reference: HAWQ-v2, arXiv:1911.03852 (trace). Differs: ½, so that it is a loss.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.errors import VerificationError
from bitwright.numerics.inputs import InputQuantizer
from bitwright.numerics.linalg import wide_dtype
from bitwright.search.rounding import fake_quantize_rows


class Tally(Protocol):
    """Sums over the tokens of one site."""

    def add(self, x: Tensor, gradient: Tensor | None) -> None:
        """Add inputs [T, I] of one call and the gradients [T, O] of its outputs."""
        ...

    def end_window(self) -> None:
        """All calls of a window have been added."""
        ...

    def values(self, score: str, num_tokens: int) -> dict[str, float]:
        """Return scheme -> score, per token of `num_tokens` of the text."""
        ...


class WeightTally:
    """Weighs the errors of a site's weight.

    Args:
        weight: [O, I] float32.
        rounded: scheme -> [O, I], what the weight becomes.
        stats: of the inputs, with Σ x xᵀ where `output_sqnr` or `hessian` is asked for.
        trace: of the loss's Hessian over the site's weights, where `trace` is asked for.
        scores: those asked for.
    """

    def __init__(
        self,
        weight: Tensor,
        rounded: Mapping[str, Tensor],
        stats: SiteStats,
        trace: float | None,
        scores: frozenset[str],
    ) -> None:
        self._weight, self._stats, self._trace = weight, stats, trace
        self._errors = {scheme: result - weight for scheme, result in rounded.items()}
        self._window = torch.zeros_like(weight) if scores & {"fisher", "window_gradient"} else None
        self._fisher = torch.zeros_like(weight) if "fisher" in scores else None
        self._windows = dict.fromkeys(rounded, 0.0) if "window_gradient" in scores else None
        self._products = dict.fromkeys(rounded, 0.0) if "output_gradient" in scores else None

    def add(self, x: Tensor, gradient: Tensor | None) -> None:
        """See `Tally`."""
        if gradient is None:
            return
        if self._window is not None:
            self._window += gradient.T @ x
        if self._products is not None:
            for scheme, error in self._errors.items():
                self._products[scheme] += _power(((x @ error.T) * gradient).sum(1))

    def end_window(self) -> None:
        """See `Tally`."""
        if self._window is None:
            return
        if self._fisher is not None:
            self._fisher += self._window.square()
        if self._windows is not None:
            for scheme, error in self._errors.items():
                self._windows[scheme] += float((self._window * error).sum()) ** 2
        self._window.zero_()

    def values(self, score: str, num_tokens: int) -> dict[str, float]:
        """See `Tally`."""
        return {scheme: self._value(score, scheme, error, num_tokens) for scheme, error in self._errors.items()}

    def _value(self, score: str, scheme: str, error: Tensor, num_tokens: int) -> float:
        if score == "weight_sqnr":
            return _ratio(_power(error), _power(self._weight))
        if score == "output_sqnr":
            return _ratio(self._output_power(error), self._output_power(self._weight))
        if score == "hessian":
            return self._output_power(error) / num_tokens
        if score == "trace":
            assert self._trace is not None
            return 0.5 * self._trace * _power(error) / error.numel()
        if score == "fisher":
            assert self._fisher is not None
            return 0.5 * float((self._fisher * error.square()).sum(dtype=wide_dtype(error.device))) / num_tokens
        products = self._products if score == "output_gradient" else self._windows
        assert products is not None
        return 0.5 * products[scheme] / num_tokens

    def _output_power(self, weight: Tensor) -> float:
        """Σ |weight x|² over the tokens that reached the site."""
        assert self._stats.gram is not None
        wide = weight.to(self._stats.gram.dtype)
        return float(((wide @ self._stats.gram) * wide).sum())


class InputTally:
    """Weighs the errors of a site's inputs by what they do to its outputs.

    Args:
        weight: [O, I] float32.
        quantizers: scheme -> what rounds the inputs.
    """

    def __init__(self, weight: Tensor, quantizers: Mapping[str, InputQuantizer]) -> None:
        self._weight, self._quantizers = weight, quantizers
        self._signal = 0.0
        self._noise = dict.fromkeys(quantizers, 0.0)
        self._products = dict.fromkeys(quantizers, 0.0)

    def add(self, x: Tensor, gradient: Tensor | None) -> None:
        """See `Tally`."""
        self._signal += _power(x @ self._weight.T)
        for scheme, quantizer in self._quantizers.items():
            error = (fake_quantize_rows(quantizer, x) - x) @ self._weight.T
            self._noise[scheme] += _power(error)
            if gradient is not None:
                self._products[scheme] += _power((error * gradient).sum(1))

    def end_window(self) -> None:
        """See `Tally`."""

    def values(self, score: str, num_tokens: int) -> dict[str, float]:
        """See `Tally`."""
        if score == "output_sqnr":
            return {scheme: _ratio(noise, self._signal) for scheme, noise in self._noise.items()}
        sums, factor = (self._noise, 1.0) if score == "hessian" else (self._products, 0.5)
        return {scheme: factor * total / num_tokens for scheme, total in sums.items()}


def require_reached(site: str, stats: SiteStats) -> None:
    """Refuse a site that no token reached: nothing is known of it.

    Raises:
        VerificationError: it is one.
    """
    if stats.num_tokens == 0:
        raise VerificationError(
            f"{site}: no calibration token reached it, so its sensitivity is unknown. Use more text, or leave it out."
        )


def _power(values: Tensor) -> float:
    return float(values.square().sum(dtype=wide_dtype(values.device)))


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if noise > 0 else 0.0
