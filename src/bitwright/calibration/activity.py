"""How a site's inputs are spread over channels and tokens: one pass over calibration text, mergeable, nothing kept.

What makes activations hard to quantize is that a few numbers are far larger than the rest, and where they sit decides
what helps:

- a few channels, the same for every token: a scale per token does not separate them. Smooth them into the weights, or
  keep them in 16 bit.
- a few tokens, in every channel: a scale per token is all that is needed.
- one side of zero (after ReLU and the like): a symmetric range wastes half its codes; a zero point gives them back.

Per channel the state holds smallest and largest value and the sums of x, x², x³ and x⁴; per token only a count in a
histogram of the token's largest magnitude, whose bins have equal widths in log2, so that merging is exact addition.

Legend: T tokens, I channels (input features), B bins.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import DataError, ShapeError, VerificationError
from bitwright.numerics.granularity import row_chunks
from bitwright.numerics.linalg import wide_dtype

BINS_PER_OCTAVE = 8
MIN_EXPONENT, MAX_EXPONENT = -64, 64
"""Tokens below 2^-64 count in the first bin, above 2^64 in the last; no sensible activation is there."""
NUM_BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE

OUTLIER_RATIO = 6.0
"""An outlier channel's largest magnitude exceeds that of the median channel by more than this."""
OUTLIER_QUANTILE, OUTLIER_QUANTILE_RATIO = 0.9, 3.0
"""And this quantile by more than this: where most channels are dead, the live ones are no outliers."""
CONSTANT_VARIANCE = 1e-6
"""A channel whose variance is below this share of its mean square hardly varies around its mean. Its fourth central
moment, a difference of sums, would keep fewer than four digits in float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierChannel:
    """A channel that is far larger than the median channel.

    Attributes:
        index: the channel.
        absmax: its largest magnitude.
        ratio: of that to the median channel's.
    """

    index: int
    absmax: float
    ratio: float


@dataclass(slots=True, eq=False)
class ActivityStats:
    """Statistics of inputs [T, I]; `observe` adds batches, `merge` adds statistics. The state is on the CPU.

    Attributes:
        num_tokens: T.
        num_negative: how many of the T · I values are below 0.
        low: smallest value per channel, [I] float64; +Inf before the first token.
        high: largest value per channel, [I] float64; -Inf before the first token.
        power_sums: Σ x^k per channel for k = 1, 2, 3, 4: [4, I] float64.
        token_counts: [B] int64; bin i counts the tokens with floor(8 · log2(largest magnitude)) = i - 512.
    """

    num_tokens: int
    num_negative: int
    low: Tensor
    high: Tensor
    power_sums: Tensor
    token_counts: Tensor

    @classmethod
    def empty(cls, num_channels: int) -> "ActivityStats":
        """Return the statistics of nothing."""
        infinite = torch.full((num_channels,), math.inf, dtype=torch.float64)
        return cls(
            num_tokens=0,
            num_negative=0,
            low=infinite,
            high=-infinite,
            power_sums=torch.zeros(4, num_channels, dtype=torch.float64),
            token_counts=torch.zeros(NUM_BINS, dtype=torch.int64),
        )

    def observe(self, x: Tensor) -> None:
        """Add a batch; an empty one changes nothing, nor does one that raises.

        Args:
            x: [..., I], any float dtype, on any device.
        Raises:
            ShapeError: x has not I channels.
            VerificationError: NaN or Inf.
        """
        if x.ndim < 1 or x.shape[-1] != self.num_channels:
            raise ShapeError(f"activity: inputs {list(x.shape)} must be [..., {self.num_channels}].")
        if x.numel() == 0:
            return
        x = x.detach().reshape(-1, self.num_channels)
        if wide_dtype(x.device) != torch.float64:
            x = x.cpu()
        low, high = (end.cpu().double() for end in torch.aminmax(x, dim=0))
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise VerificationError(
                "activity: inputs hold NaN or Inf. Run the model in bfloat16 or float32, as float16 ends at 65504; if "
                "they persist, check the checkpoint."
            )
        sums = torch.zeros(4, self.num_channels, dtype=torch.float64, device=x.device)
        for rows in row_chunks(x):
            values = x[rows].double()
            powers = values.clone()
            for k in range(4):
                sums[k] += powers.sum(0)
                powers *= values
            self.num_negative += int((values < 0).sum())
            self.token_counts = self.token_counts + _bin_counts(values.abs().amax(1))
        self.num_tokens += x.shape[0]
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.power_sums = self.power_sums + sums.cpu()

    def merge(self, other: "ActivityStats") -> "ActivityStats":
        """Return the statistics of the tokens of both; modifies neither. Counts and ends are exact in any order.

        Raises:
            ShapeError: different numbers of channels.
        """
        if self.num_channels != other.num_channels:
            raise ShapeError(f"activity: {self.num_channels} and {other.num_channels} channels do not merge.")
        return ActivityStats(
            num_tokens=self.num_tokens + other.num_tokens,
            num_negative=self.num_negative + other.num_negative,
            low=torch.minimum(self.low, other.low),
            high=torch.maximum(self.high, other.high),
            power_sums=self.power_sums + other.power_sums,
            token_counts=self.token_counts + other.token_counts,
        )

    @property
    def num_channels(self) -> int:
        """I."""
        return self.low.numel()

    @property
    def channel_absmax(self) -> Tensor:
        """Largest magnitude per channel, [I] float64.

        Raises:
            DataError: no token was seen; so do all properties below.
        """
        self._require_tokens()
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def absmax(self) -> float:
        """Largest magnitude."""
        return float(self.channel_absmax.max())

    @property
    def mean_square(self) -> Tensor:
        """E[x²] per channel, [I] float64."""
        self._require_tokens()
        return self.power_sums[1] / self.num_tokens

    @property
    def rms(self) -> float:
        """Root mean square over all channels and tokens."""
        return math.sqrt(float(self.mean_square.mean()))

    @property
    def channel_kurtosis(self) -> Tensor:
        """Kurtosis per channel, [I] float64: 1.8 uniform, 3 Gaussian, 6 Laplace; NaN where a channel hardly varies."""
        self._require_tokens()
        return _kurtosis(self.power_sums / self.num_tokens)

    @property
    def kurtosis(self) -> float:
        """Kurtosis of all values together; NaN where they hardly vary."""
        self._require_tokens()
        return float(_kurtosis(self.power_sums.mean(1, keepdim=True) / self.num_tokens))

    @property
    def fraction_negative(self) -> float:
        """Share of the values below 0."""
        self._require_tokens()
        return self.num_negative / (self.num_tokens * self.num_channels)

    @property
    def one_sidedness(self) -> float:
        """(high + low) / (high - low) of the range with 0: 0 for a symmetric one, 1 and -1 where one side is empty."""
        self._require_tokens()
        low, high = min(0.0, float(self.low.min())), max(0.0, float(self.high.max()))
        return (high + low) / (high - low) if high > low else 0.0

    @property
    def dynamic_range_db(self) -> float:
        """Largest magnitude over root mean square in dB: what one uniform grid for the tensor pays for its outliers."""
        return 20 * math.log10(self.absmax / self.rms) if self.rms > 0 else 0.0

    @property
    def outlier_channels(self) -> tuple[OutlierChannel, ...]:
        """The few channels far above the rest (`OUTLIER_RATIO`, `OUTLIER_QUANTILE_RATIO`), the largest first.

        Where the median channel is always 0 there is no ratio, and no outlier.
        """
        absmax = self.channel_absmax
        median = float(absmax.median())
        large = OUTLIER_QUANTILE_RATIO * float(torch.quantile(absmax, OUTLIER_QUANTILE, interpolation="lower"))
        if median == 0:
            return ()
        order = absmax.argsort(descending=True, stable=True).tolist()
        values: list[float] = absmax.tolist()
        return tuple(
            OutlierChannel(index=i, absmax=values[i], ratio=values[i] / median)
            for i in order
            if values[i] > OUTLIER_RATIO * median and values[i] > large
        )

    @property
    def median_token_absmax(self) -> float:
        """Largest magnitude of the median token, within half a bin (4.5 %); 0 where it lies below the first bin."""
        self._require_tokens()
        index = int(torch.searchsorted(self.token_counts.cumsum(0), (self.num_tokens + 1) // 2))
        return 0.0 if index == 0 else 2.0 ** (MIN_EXPONENT + (index + 0.5) / BINS_PER_OCTAVE)

    @property
    def outlier_token_ratio(self) -> float | None:
        """Largest magnitude over that of the median token; None where the median token is 0."""
        median = self.median_token_absmax
        return self.absmax / median if median > 0 else None

    @property
    def token_histogram(self) -> tuple[tuple[float, int], ...]:
        """(lower border, number of tokens) of the bins that hold tokens; the first border is 0, not 2^-64."""
        return tuple(
            (0.0 if index == 0 else 2.0 ** (MIN_EXPONENT + index / BINS_PER_OCTAVE), count)
            for index, count in enumerate(self.token_counts.tolist())
            if count
        )

    def _require_tokens(self) -> None:
        if self.num_tokens == 0:
            raise DataError(
                "activity: no token was seen, so there is nothing to tell. Use text that reaches this site."
            )


def _bin_counts(token_absmax: Tensor) -> Tensor:
    """Count tokens [T] float64 by the bin of their largest magnitude; log2(0) = -Inf is below the first."""
    bins = (token_absmax.log2() * BINS_PER_OCTAVE).floor_().sub_(MIN_EXPONENT * BINS_PER_OCTAVE)
    return torch.bincount(bins.clamp_(0, NUM_BINS - 1).long(), minlength=NUM_BINS).cpu()


def _kurtosis(moments: Tensor) -> Tensor:
    """E[(x - m)⁴] / E[(x - m)²]² of raw moments E[x^k], k = 1 … 4: [4, I] -> [I]."""
    m, second, third, fourth = moments
    variance = second - m * m
    central = fourth - 4 * m * third + 6 * m * m * second - 3 * m**4
    varies = variance > CONSTANT_VARIANCE * second
    return torch.where(varies, central / variance.square(), torch.full_like(variance, math.nan))
