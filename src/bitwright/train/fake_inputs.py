"""Inputs and the key-value cache under quantization-aware training: what the kernels would see, differentiable.

Dynamic scales are found from every call's inputs, as at inference. Where they cover the range (plain float scales)
nothing is clipped and gradients pass unchanged; scales rounded to powers of two or FP8 may clip the largest inputs,
whose gradient is then 0. Static scales are parameters (LSQ, arXiv:1902.08153); the level above NVFP4's dynamic scales
follows the largest input seen. Both start from the inputs of the first training call unless calibrated ones are given.
LSQ's factor 1 / sqrt(N · Qp) counts the features that share a scale, not the tokens, as in the paper.

Legend: B windows, T tokens, I in features, C channels of keys or values, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitwright.errors import RecipeError, StructureError, VerificationError
from bitwright.model.layouts.own import input_scale
from bitwright.numerics.block_scales import FixedFp8Scale
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import InputQuantizer
from bitwright.numerics.integer import MAX_BITS, MIN_BITS, IntegerFormat
from bitwright.numerics.ranges import FLOAT32, fit_grid
from bitwright.numerics.scales import FloatScale
from bitwright.numerics.ste import straight_through
from bitwright.schemes import ActivationScheme, group
from bitwright.train.fake_weights import SMALLEST_SHARE, bounded_scale, fake_quantize, gradient_factor

KEYS, VALUES = "k_proj", "v_proj"


class FakeInputs(nn.Module):
    """The quantizer of the inputs [..., I] of one site.

    Args:
        scheme: what the inputs become.
        in_features: I.
        dtype: the checkpoint's; calibrated scales are rounded to it, since engines keep them in it.
        start: calibrated scales to start from; None to start from the first call.
        learned: whether static scales are trained.
    """

    def __init__(
        self,
        scheme: ActivationScheme,
        in_features: int,
        dtype: torch.dtype,
        *,
        start: InputQuantizer | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__()
        self.scheme, self.in_features, self.dtype, self.learned = scheme, in_features, dtype, learned
        self.has_level = scheme.observer is not None and not scheme.is_static
        shape = (1, scheme.granularity.num_groups(in_features))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.frozen: Tensor
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        if scheme.is_static:
            self.scale = nn.Parameter(torch.ones(shape), requires_grad=learned)
            self.register_buffer("smallest", torch.ones(shape) * SMALLEST_SHARE)
            zero_point = None if scheme.format.symmetric else torch.zeros(shape, dtype=torch.int32)
            self.register_buffer("zero_point", zero_point)
        elif self.has_level:
            self.register_buffer("amax", torch.zeros(()))
        if start is not None:
            self._start_from(start)

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs [..., I] that the codes stand for, in float32, as a kernel feeds them to its product.

        Raises:
            VerificationError: NaN or Inf in the inputs.
        """
        if x.numel() == 0:
            return x.float()
        rows = x.reshape(-1, x.shape[-1])
        self._observe(rows.detach())
        quantizer = self.quantizer()
        if quantizer.static is not None:
            scale = self.scale if self.learned else None
            factor = gradient_factor(quantizer.static, 1)
            return fake_quantize(rows, quantizer.static, scale=scale, factor=factor).view(x.shape)
        if quantizer.scale == FLOAT32:
            return straight_through(rows.float(), lambda each: quantizer.quantize(each).dequantize()).view(x.shape)
        grid = fit_grid(rows.detach(), quantizer.format, quantizer.granularity, method="minmax", scale=quantizer.scale)
        return fake_quantize(rows, grid).view(x.shape)

    def quantizer(self) -> InputQuantizer:
        """Return the quantizer as it is exported.

        Raises:
            VerificationError: scales that need inputs, and no input yet.
        """
        acts, scale = self.scheme, input_scale(self.scheme)
        if (acts.is_static or self.has_level) and not bool(self.seen):
            raise VerificationError(
                "inputs: no token has gone through, so that there is no static scale. Train, or give calibrated ones."
            )
        if self.has_level:
            scale = FixedFp8Scale.for_largest(self.get_buffer("amax") / acts.format.max_value)
        return InputQuantizer(
            format=acts.format,
            granularity=acts.granularity,
            scale=scale,
            static=self._static_grid() if acts.is_static else None,
        )

    def freeze(self) -> None:
        """Leave all scales where they are now."""
        self.frozen.fill_(True)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _static_grid(self) -> Grid:
        rounded = bounded_scale(self.scale.detach(), self.get_buffer("smallest"), self.dtype).float()
        return Grid(
            format=self.scheme.format,
            granularity=self.scheme.granularity,
            in_features=self.in_features,
            scale=rounded,
            zero_point=self._buffers["zero_point"],
        )

    @torch.no_grad()
    def _observe(self, rows: Tensor) -> None:
        """Start from the first inputs; follow the largest of all later ones where a level is above dynamic scales."""
        if self.has_level and self.training and not bool(self.frozen):
            amax = self.get_buffer("amax")
            amax.copy_(torch.maximum(amax, rows.abs().amax().float()))
            self.seen.fill_(True)
        elif self.scheme.is_static and self.training and not bool(self.seen):
            format, granularity = self.scheme.format, self.scheme.granularity
            self._take(fit_grid(rows, format, granularity, method="mse", scale=FloatScale(self.dtype)))

    @torch.no_grad()
    def _start_from(self, start: InputQuantizer) -> None:
        if start.static is not None and self.scheme.is_static:
            self._take(start.static)
        elif isinstance(start.scale, FixedFp8Scale) and self.has_level:
            # The largest magnitude that this level was made for: 448 · 6 over it.
            unit = FixedFp8Scale.for_largest(torch.ones(()) / self.scheme.format.max_value).bound.global_scale
            self.get_buffer("amax").copy_((unit / start.scale.bound.global_scale).reshape(()))
            self.seen.fill_(True)
        elif self.scheme.is_static or self.has_level:
            raise RecipeError("inputs: the scheme has calibrated scales, and the start has none. Calibrate it first.")

    def _take(self, grid: Grid) -> None:
        self.scale.copy_(grid.scale.float())
        self.get_buffer("smallest").copy_(grid.scale.float() * SMALLEST_SHARE)
        if grid.zero_point is not None:
            self.get_buffer("zero_point").copy_(grid.zero_point)
        self.seen.fill_(True)


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeKeyValue:
    """Asymmetric integers for cached keys and values: keys per channel, values per token.

    Keys have a few channels that are large for all tokens, so that tokens share a scale within a channel; values have
    none, so that channels share a scale within a token.

    Args:
        bits: 2 to 8.
        group: tokens (keys) or channels (values) that share a scale.
    Raises:
        RecipeError: another number of bits.
    Reference:
        KIVI, arXiv:2402.02750. Differs: keys are quantized before their rotary embedding, as in KVQuant
        (arXiv:2401.18079), since that is where their projection ends; and the latest tokens are quantized too.
    """

    bits: int
    group: int

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise RecipeError(f"the KV cache takes {MIN_BITS} to {MAX_BITS} bits in training, not {self.bits}.")

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys [B, T, C] as the cache gives them back, in their dtype."""
        return self._rounded(x.transpose(1, 2)).transpose(1, 2)

    def values(self, x: Tensor) -> Tensor:
        """Return the values [B, T, C] as the cache gives them back, in their dtype."""
        return self._rounded(x)

    def _rounded(self, x: Tensor) -> Tensor:
        """Round groups of the last dimension; min-max clips nothing, so that gradients pass."""
        format = IntegerFormat(bits=self.bits, symmetric=False)
        quantizer = InputQuantizer(format=format, granularity=group(self.group))

        def rounded(each: Tensor) -> Tensor:
            return quantizer.quantize(each.reshape(-1, each.shape[-1])).dequantize(each.dtype).reshape(each.shape)

        return straight_through(x, rounded)


def add_fake_cache(model: nn.Module, bits: int, group: int) -> list[RemovableHandle]:
    """Fake-quantize the outputs of all key and value projections; `remove()` of the handles undoes it.

    Modules that are replaced later lose their hook: prepare the model first.

    Args:
        model: with modules named k_proj and v_proj.
        bits: 2 to 8.
        group: see `FakeKeyValue`.
    Raises:
        StructureError: the model has no such modules, as where query, key and value are one weight.
    """
    cache = FakeKeyValue(bits=bits, group=group)
    roles = {KEYS: cache.keys, VALUES: cache.values}
    return [module.register_forward_hook(_hook(roles[role])) for module, role in cached_projections(model)]


def cached_projections(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules whose outputs a cache keeps, and which they are: k_proj or v_proj.

    Raises:
        StructureError: the model has no such modules, as where query, key and value are one weight.
    """
    named = [(module, name.rpartition(".")[2]) for name, module in model.named_modules()]
    found = [(module, role) for module, role in named if role in (KEYS, VALUES)]
    if not found:
        raise StructureError(
            "the model has no modules k_proj and v_proj, so its cache cannot be fake-quantized. Leave it."
        )
    return found


def _hook(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Tensor]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        return change(cast(Tensor, output))

    return hook
