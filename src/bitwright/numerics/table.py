"""Number formats that are a list of values: NormalFloat, the FP4 of bitsandbytes, Lloyd-Max.

A code is an index into a table, and a number becomes the code of the nearest value. "Nearest" is decided by borders:
the float32 midpoints of neighbouring values, where the border itself belongs to the value below.

    name               values    made for
    nf4, nf3, nf2      16 8 4    equal shares of a Gaussian that is scaled by its largest magnitude; has 0, -1 and 1
    fp4-bnb            15        1 sign, 2 exponent and 1 mantissa bit, numbered as in bitsandbytes; two codes for 0
    lloyd*-gaussian    16 8 4    least squared error for a Gaussian;   no 0; the scale is the standard deviation
    lloyd*-laplace     16 8 4    least squared error for a Laplacian;  no 0; the scale is the standard deviation

NF4 and FP4 agree with bitsandbytes 0.50 on the CPU in every code, ties included. Its CUDA kernels, by their source, use
borders rounded to other last digits (some NF4 borders differ by one float32, FP4 has 0.583333 for 7/12), give a tie
between negative FP4 values to the one nearer to 0, and use the second zero of FP4 for negative inputs, where the CPU
uses it for positive ones. Which value is meant differs only for inputs within 1e-6 of a border.

Reference: QLoRA, arXiv:2305.14314 (NF4); NF3 and NF2 follow its published code, not the formula of the paper.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.distributions import GAUSSIAN, LAPLACE, Distribution
from bitwright.numerics.lloyd_max import optimal_levels

MAX_VALUES = 256
# The search stops refining its bins here, where they still fit the cache.
MAX_BINS = 2**12


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFormat:
    """Codes that index a table of values; satisfies `formats.LevelFormat`.

    Args:
        name: the name in `FORMATS`.
        values: 2 to 256 float32 numbers; code i stands for values[i].
        code_order: codes by ascending value; None when `values` ascends. Between two codes of one value it says which
            is the lower: numbers just below the value, and the value itself, get that one.
    Raises:
        RecipeError: too few or too many values, one that is not a finite float32 number, or values that do not ascend.
    """

    name: str
    values: tuple[float, ...]
    code_order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.values) <= MAX_VALUES:
            raise RecipeError(f"table '{self.name}': needs 2 to {MAX_VALUES} values, not {len(self.values)}.")
        if not all(map(math.isfinite, self.values)) or as_float32(self.values) != self.values:
            raise RecipeError(f"table '{self.name}': every value must be a finite float32 number.")
        if sorted(self.codes) != list(range(len(self.values))):
            raise RecipeError(f"table '{self.name}': code_order must name each of {len(self.values)} codes once.")
        if sorted(self.levels) != list(self.levels):
            raise RecipeError(f"table '{self.name}': the values do not ascend. Sort them, or give their code_order.")

    @property
    def bits(self) -> int:
        """Storage per code, in bits."""
        return (len(self.values) - 1).bit_length()

    @property
    def symmetric(self) -> bool:
        """True: a table has no zero point."""
        return True

    @property
    def num_codes(self) -> int:
        """How many codes are used."""
        return len(self.values)

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes."""
        return torch.uint8

    @property
    def min_code(self) -> int:
        """Smallest code."""
        return 0

    @property
    def min_value(self) -> float:
        """Smallest value, in units of the scale."""
        return min(self.values)

    @property
    def max_value(self) -> float:
        """Largest value, in units of the scale."""
        return max(self.values)

    @property
    def codes(self) -> tuple[int, ...]:
        """Codes by ascending value."""
        return tuple(range(len(self.values))) if self.code_order is None else self.code_order

    @property
    def levels(self) -> tuple[float, ...]:
        """Values in ascending order."""
        return tuple(self.values[code] for code in self.codes)

    @property
    def end_codes(self) -> tuple[int, int]:
        """Codes of the lowest and the highest value."""
        return self.codes[0], self.codes[-1]

    def snap(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest values: `decode(encode(scaled))` without the detour over codes.

        Args:
            scaled: weights divided by their scale; float32; no NaN.
            zero_point: None.
        """
        assert zero_point is None  # The format is symmetric: a grid holds no zero point for it.
        search = _search(self, scaled.device)
        return search.levels.index_select(0, search.positions(scaled)).view(scaled.shape)

    def encode(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return codes (uint8) for weights divided by their scale; arguments as `snap`."""
        assert zero_point is None
        search = _search(self, scaled.device)
        return search.codes.index_select(0, search.positions(scaled)).view(scaled.shape)

    def decode(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return values in units of the scale (float32); the inverse of `encode`."""
        assert zero_point is None
        return _search(self, codes.device).values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Search:
    """Nearest-value search in constant time: several times as fast as a binary search, and equal to it bit for bit.

    The range of the borders is cut into equal bins, few enough to stay in the cache, and if the table allows so fine
    that each holds one border at most. The bin of a number and a comparison with the borders in that bin tell its
    position. Rounding in the computation of the bin is harmless: it is monotone, and the borders went through it too.

    Args:
        low: the lowest border.
        bins_per_unit: bins per unit of the scaled weight.
        below: int32 [bins], number of borders in lower bins.
        borders: float32 [D, bins], the borders in each bin, D at most; inf where there are fewer.
        levels: float32 [K], values by position.
        codes: uint8 [K], codes by position.
        values: float32 [K], values by code.
    """

    low: float
    bins_per_unit: float
    below: Tensor
    borders: Tensor
    levels: Tensor
    codes: Tensor
    values: Tensor

    def positions(self, scaled: Tensor) -> Tensor:
        """Return the number of borders below each number, int32, flat."""
        flat = scaled.reshape(-1)
        bins = _bins(flat, self.low, self.bins_per_unit, self.below.numel())
        positions = self.below.index_select(0, bins)
        for borders in self.borders:
            positions += flat > borders.index_select(0, bins)
        return positions


def _bins(x: Tensor, low: float, bins_per_unit: float, num_bins: int) -> Tensor:
    # The conversion of a NaN is undefined; the second clamp keeps even that inside the table.
    return ((x - low) * bins_per_unit).clamp_(0, num_bins - 1).int().clamp_(0, num_bins - 1)


@lru_cache(maxsize=64)
def _search(format: TableFormat, device: torch.device) -> _Search:
    """Build the tables of a format; costs as much as using them on thousands of weights, hence kept on the device."""
    levels = torch.tensor(format.levels, dtype=torch.float32, device=device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    low, width = midpoints[0].item(), (midpoints[-1] - midpoints[0]).item()
    num_bins = 1
    while True:
        num_bins *= 2
        bins_per_unit = (num_bins - 1) / width if width else 0.0
        bins = _bins(midpoints, low, bins_per_unit, num_bins)
        counts = torch.bincount(bins, minlength=num_bins)
        depth = int(counts.max())
        if depth == 1 or num_bins == MAX_BINS:
            break
    below = counts.cumsum(0) - counts
    borders = torch.full((depth, num_bins), math.inf, device=device)
    borders[torch.arange(bins.numel(), device=device) - below[bins], bins] = midpoints
    return _Search(
        low=low,
        bins_per_unit=bins_per_unit,
        below=below.int(),
        borders=borders,
        levels=levels,
        codes=torch.tensor(format.codes, dtype=torch.uint8, device=device),
        values=torch.tensor(format.values, dtype=torch.float32, device=device),
    )


def as_float32(values: tuple[float, ...]) -> tuple[float, ...]:
    """Round to float32, so that a table holds exactly what `decode` returns."""
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


def normal_float(bits: int) -> TableFormat:
    """Make NF2, NF3 or NF4: quantiles of a Gaussian, scaled to [-1, 1], with an exact 0.

    The positive half has one value more than the negative one. Each half takes equally spaced probabilities from 1/2,
    left out for the single 0, up to one short of 1, at which the quantile would be infinite.

    Args:
        bits: 2 to 4.
    Raises:
        RecipeError: other bits.
    Reference:
        arXiv:2305.14314, section 3, by the construction of the published code, which differs from its equation 4.
        bits = 4 gives bitsandbytes' table in every bit.
    """
    if not 2 <= bits <= 4:
        raise RecipeError(f"normal float: bits must be 2 to 4, not {bits}.")
    half = 2 ** (bits - 1)
    # The mean of the two probabilities at which half a step of 2^b - 1 and of 2^b values is left; the published code
    # has the constant 0.9677083 for 4 bits, hence the digits.
    largest = round(1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2, 7)
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(largest, 0.5, half + 1)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(largest, 0.5, half)[:-1].tolist()]
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return TableFormat(name=f"nf{bits}", values=tuple((values / values.max()).tolist()))


def lloyd_max(distribution: Distribution, bits: int) -> TableFormat:
    """Make the table of least squared error for a distribution of variance 1: the scale is the standard deviation.

    `max_value` is the largest level, in standard deviations. No level is 0: a weight of 0 gets the level just below.

    Args:
        distribution: its name becomes part of the format's.
        bits: 1 to 6.
    Raises:
        RecipeError, VerificationError: as `lloyd_max.optimal_levels`.
    """
    levels = optimal_levels(distribution, bits).levels
    return TableFormat(name=f"lloyd{bits}-{distribution.name}", values=as_float32(levels))


NF4 = TableFormat(
    name="nf4",
    values=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# Twelfths, in the order of the bit patterns 000 .. 111; the upper eight codes carry the sign.
_FP4_MAGNITUDES = as_float32(tuple(twelfths / 12 for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)))

FP4_BNB = TableFormat(
    name="fp4-bnb",
    values=(*_FP4_MAGNITUDES, *(0.0 - magnitude for magnitude in _FP4_MAGNITUDES)),
    code_order=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
)

TABLES: tuple[TableFormat, ...] = (
    NF4,
    normal_float(3),
    normal_float(2),
    FP4_BNB,
    *(lloyd_max(distribution, bits) for distribution in (GAUSSIAN, LAPLACE) for bits in (4, 3, 2)),
)
"""Every table with a name in recipes; computed in a few milliseconds."""
