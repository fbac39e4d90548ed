"""What number formats would cost a group of sites that share an input: measured on a sample of tokens, and predicted.

Two measures, because one alone deceives. The SQNR of a tensor weighs every number by its own size: with a channel a
hundred times larger than the rest it stays high while all the rest is rounded to zero. The SQNR of the outputs asks
what the sites compute with the rounded tensor, y = x Wᵀ, relative to each token's own output, and then averages the
relative errors over tokens, so that neither loud channels nor loud tokens hide the others. Advice is drawn from it.

Predictions know only the scales and the power. Inputs: a uniform grid of step s errs by s²/12; a float by its relative
step, averaged over the mantissas, plus s²/12 of its finest step; zeros are exact. A prediction fails where numbers are
not spread evenly over a step. Weights: independent Gaussians, scaled group by group by their own extremes
(`numerics.group_theory`).

Legend: T tokens of the sample, I in features, O out features, S channels of the producer.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from bitwright.numerics.distributions import GAUSSIAN
from bitwright.numerics.formats import FORMATS, LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.group_theory import absmax_mse, minmax_mse
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.minifloat import MinifloatFormat
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.table import TableFormat
from bitwright.numerics.theory import rounding_mse

TENSOR, TOKEN, CHANNEL = (Granularity(kind=kind) for kind in ("tensor", "token", "channel"))
G64, G128 = (Granularity(kind="group", group_size=size) for size in (64, 128))

INPUT_FORMATS = (
    ("int8", TENSOR), ("uint8", TENSOR), ("int8", TOKEN), ("int4", TOKEN), ("fp8-e4m3", TENSOR), ("fp8-e4m3", TOKEN)
)  # fmt: skip
"""Per tensor with the smallest and largest input of all calibration tokens; per token with the token's own."""
WEIGHT_FORMATS = (("int8", CHANNEL), ("int4", CHANNEL), ("int4", G128), ("nf4", G64))


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatLoss:
    """What remains of a tensor in a number format; None where there is no error, or no signal.

    Attributes:
        format: name of the number format.
        granularity: what shares a scale: tensor, token, channel, or g64 for groups of 64.
        sqnr_db: of the tensor itself.
        predicted_db: of the tensor itself, from its range and power (inputs) or for Gaussian weights.
        output_sqnr_db: of the sites' outputs, averaged over tokens.
    """

    format: str
    granularity: str
    sqnr_db: float | None
    predicted_db: float | None
    output_sqnr_db: float | None


class TokenSample:
    """A uniform sample of at most `size` tokens [T, I] of a stream, the same for any split into batches.

    Every token draws a random key and the smallest keys stay: one pass, and no need to know how many will come.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.tokens: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Offer tokens [..., I]; those that stay are kept in float32."""
        rows = x.detach().reshape(-1, x.shape[-1])
        keys = torch.cat([self._keys, torch.rand(rows.shape[0], dtype=torch.float64, generator=self._generator)])
        kept = keys.argsort(stable=True)[: self.size].sort().values
        known = self._keys.numel()
        new = rows[(kept[kept >= known] - known).to(rows.device)].float()
        old = kept[kept < known]
        self.tokens = new if self.tokens is None else torch.cat([self.tokens[old.to(new.device)], new])
        self._keys = keys[kept]


class OutputBench:
    """The outputs of sites that share an input, and how far they move when input and weights are rounded.

    Args:
        inputs: sample [T, I], float32.
        weights: of each site, [O, I], float32.
    """

    def __init__(self, inputs: Tensor, weights: Sequence[Tensor]) -> None:
        self.inputs, self.weights = inputs, weights
        self._outputs = [inputs @ weight.T for weight in weights]
        self._power = _summed(self._outputs)

    def output_sqnr_db(self, inputs: Tensor, weights: Iterable[Tensor]) -> float | None:
        """Return the SQNR in dB of the outputs with other inputs and weights, averaged over tokens that have any."""
        errors = (inputs @ weight.T - output for weight, output in zip(weights, self._outputs, strict=True))
        noise, heard = _summed(errors), self._power > 0
        share = float((noise[heard] / self._power[heard]).mean()) if bool(heard.any()) else 0.0
        return _decibels(1.0, share)

    def input_loss(self, name: str, granularity: Granularity, low: float, high: float) -> FormatLoss:
        """Return what rounding the inputs costs; per tensor, the range is low … high."""
        format = level_format(name)
        x = self.inputs
        if granularity.kind == "tensor":
            ends = torch.tensor([[low, high]], device=x.device)
            grid = replace(fit_grid(ends, format, granularity), in_features=x.shape[1])
        else:
            grid = fit_grid(x, format, granularity)
        rounded = grid.fake_quantize(x)
        wide = wide_dtype(x.device)
        power = float(x.to(wide).square().mean())
        steps = grid.scale.to(wide).square() * (x != 0).to(wide).mean(1, keepdim=True)  # zeros are exact
        return FormatLoss(
            format=name,
            granularity=granularity_name(granularity),
            sqnr_db=_decibels(power, float((rounded - x).to(wide).square().mean())),
            predicted_db=_decibels(power, input_mse(format, power=power, rms_scale=float(steps.mean().sqrt()))),
            output_sqnr_db=self.output_sqnr_db(rounded, self.weights),
        )

    def weight_loss(self, name: str, granularity: Granularity) -> FormatLoss:
        """Return what rounding all weights to the nearest costs."""
        signal = noise = 0.0

        def rounded() -> Iterator[Tensor]:
            nonlocal signal, noise
            for weight in self.weights:
                result = _round(weight, name, granularity)
                wide = wide_dtype(weight.device)
                signal += float(weight.square().sum(dtype=wide))
                noise += float((result - weight).square_().sum(dtype=wide))
                yield result

        output_db = self.output_sqnr_db(self.inputs, rounded())
        return FormatLoss(
            format=name,
            granularity=granularity_name(granularity),
            sqnr_db=_decibels(signal, noise),
            predicted_db=gaussian_weight_db(name, granularity.columns_per_group(self.inputs.shape[1])),
            output_sqnr_db=output_db,
        )

    def w8a8_sqnr_db(self, *, scale: Tensor | None = None, kept: Tensor | None = None) -> float | None:
        """Return the SQNR of the outputs with int8 inputs per token and int8 weights per channel.

        Args:
            scale: [I], what the inputs are divided by and the weights multiplied with before they are rounded.
            kept: channels that stay as they are, in inputs and weights.
        """

        def rounded(tensor: Tensor, granularity: Granularity, factor: Tensor | None) -> Tensor:
            changed = tensor.clone() if factor is None else tensor * factor
            if kept is not None:
                changed[:, kept] = 0
            changed = _round(changed, "int8", granularity)
            if factor is not None:
                changed /= factor
            if kept is not None:
                changed[:, kept] = tensor[:, kept]
            return changed

        inputs = rounded(self.inputs, TOKEN, None if scale is None else 1 / scale)
        return self.output_sqnr_db(inputs, (rounded(weight, CHANNEL, scale) for weight in self.weights))


def level_format(name: str) -> LevelFormat:
    """Return a number format that has levels of its own (all in `FORMATS` but learned codebooks)."""
    return cast(LevelFormat, FORMATS[name])


def granularity_name(granularity: Granularity) -> str:
    """`tensor`, `token`, `channel`, or `g64`."""
    return granularity.kind if granularity.group_size is None else f"g{granularity.group_size}"


def smoothing_scale(
    inputs_absmax: Tensor, weights: Iterable[Tensor], channels: Sequence[int], *, alpha: float
) -> Tensor:
    """Return what SmoothQuant divides the inputs by: max|x_j|^alpha / max|w_j|^(1 - alpha), 1 for dead channels: [I].

    Args:
        inputs_absmax: largest magnitude per channel, [I], on the CPU.
        weights: of all sites that read the inputs, [O, I].
        channels: for each column the producer's channel; columns that share a channel share its scale.
        alpha: how much of the difficulty moves into the weights; 0 to 1.
    Reference:
        SmoothQuant, arXiv:2211.10438, equation 4.
    """
    device = inputs_absmax.device
    index = torch.tensor(channels, device=device)
    weights_absmax = torch.stack([weight.abs().amax(0).to(device).double() for weight in weights]).amax(0)
    nothing = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=device)
    x = nothing.scatter_reduce(0, index, inputs_absmax.double(), "amax")
    w = nothing.scatter_reduce(0, index, weights_absmax, "amax")
    scale = x.pow(alpha) / w.pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), scale, torch.ones_like(scale))[index].float()


def input_mse(format: LevelFormat, *, power: float, rms_scale: float) -> float:
    """Predict the mean squared error of inputs of a mean square `power` from the scales that cover them.

    A float x = u 2^f in a binade that starts at u rounds with the step u / 2^M: its squared error is x² 4^-(M + f) / 12
    on average. With f uniform, E[4^-f] = 3 / (8 ln 2).
    """
    if isinstance(format, MinifloatFormat):
        relative = rounding_mse(2.0**-format.mantissa_bits) * 3 / (8 * math.log(2))
        return power * relative + rounding_mse(rms_scale * format.min_normal * 2.0**-format.mantissa_bits)
    return rounding_mse(rms_scale)


@lru_cache(maxsize=256)
def gaussian_weight_db(name: str, group_size: int) -> float:
    """Predict the SQNR in dB of Gaussian weights rounded to the nearest, with min-max scales per `group_size`."""
    format = FORMATS[name]
    if isinstance(format, TableFormat):
        return -10 * math.log10(absmax_mse(GAUSSIAN, format.levels, group_size))
    assert isinstance(format, IntegerFormat)
    kind = "symmetric" if format.symmetric else "asymmetric"
    return -10 * math.log10(minmax_mse(GAUSSIAN, bits=format.bits, group_size=group_size, kind=kind))


def _round(tensor: Tensor, name: str, granularity: Granularity) -> Tensor:
    return fit_grid(tensor, level_format(name), granularity).fake_quantize(tensor)


def _summed(outputs: Iterable[Tensor]) -> Tensor:
    """Σ over sites and features of the squares per token: [T] float64 on the CPU."""
    return torch.stack([each.square().sum(1).cpu().double() for each in outputs]).sum(0)


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
