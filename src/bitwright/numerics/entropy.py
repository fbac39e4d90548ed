"""What bits are worth: the entropy of codes, and how rate-distortion theory would spend bits.

Codes take whole bits in memory, but b-bit codes of bell-shaped weights are far from equally likely. An entropy coder
stores them in H = -Σ p log2 p bits each, and no lossless code that treats them alike does better.

The other side is Shannon's: a Gaussian source of variance σ² needs at least

    R(D) = max(0, ½ log2(σ² / D)) bits per sample for the mean squared error D,    D(b) = σ² 2^(-2b).

Uniform rounding with entropy coding stays ½ log2(πe/6) = 0.255 bits above R(D) at fine steps, whatever the density.

Several sources share a budget best by reverse water filling: one level θ of distortion for all. Sources above it get
½ log2(σ² / θ) bits and the distortion θ; sources below get 0 bits and their variance as distortion. As long as all are
above, source l gets the mean bits plus ½ log2(σ_l² / geometric mean), and the gain over equal bits is the ratio of the
arithmetic to the geometric mean of the variances. For layers of a model, σ² is the damage that their error does:
variance times sensitivity.

Theory guides and bounds; it does not decide. D(b) ∝ 4^-b holds for fine steps; at 2 or 3 bits a real quantizer follows
it only roughly, and damage measured per layer replaces it.

Legend: n sources; source i stands for `counts[i]` samples.

Reference: Cover and Thomas, Elements of Information Theory, sections 10.3.2 and 10.3.3; Gish and Pierce, Asymptotically
efficient quantizing, 1968 (the 0.255 bits).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.linalg import wide_dtype

WHOLE_BITS = tuple(range(9))


def code_entropy(codes: Tensor) -> float:
    """Return the entropy of codes in bits per code: what an ideal entropy coder with one table would store.

    The entropy of the observed frequencies. As an estimate of the source's from N samples over K codes it is too low
    by about (K - 1) / (2 N ln 2) bits.

    Args:
        codes: any shape, an 8-bit integer dtype.
    Raises:
        ShapeError: no codes.
        VerificationError: a dtype of more than 8 bits.
    """
    if codes.numel() == 0:
        raise ShapeError("code_entropy: no codes.")
    if codes.dtype not in (torch.uint8, torch.int8):
        raise VerificationError(f"code_entropy: codes are uint8 or int8, not {codes.dtype}.")
    # Entropy does not care which number a code is: the bytes of signed codes will do.
    counts = torch.bincount(codes.view(torch.uint8).flatten(), minlength=256)
    probabilities = counts[counts > 0].to(wide_dtype(codes.device)) / codes.numel()
    # Negative zero when there is one code.
    return abs(float((probabilities * probabilities.log2()).sum()))


def ideal_bits_per_weight(codes: Tensor, metadata_bits: int) -> float:
    """Return the bits per weight after entropy coding of the codes: their entropy plus scales and zero points.

    Args:
        codes: as `code_entropy`.
        metadata_bits: bits of everything but the codes, which are stored as they are.
    Raises:
        ShapeError, VerificationError: as `code_entropy`.
    """
    return code_entropy(codes) + metadata_bits / codes.numel()


def gaussian_rate(variance: float, distortion: float) -> float:
    """Return R(D), the bits per sample that a Gaussian source needs for a mean squared error.

    Raises:
        RecipeError: distortion not positive, or a negative variance.
    """
    if not distortion > 0 or variance < 0:
        raise RecipeError(f"entropy: needs distortion > 0 and variance >= 0, not {distortion} and {variance}.")
    return 0.5 * math.log2(variance / distortion) if variance > distortion else 0.0


def gaussian_distortion(variance: float, bits: float) -> float:
    """Return D(b), the least mean squared error of a Gaussian source at `bits` per sample: the inverse of R(D).

    Raises:
        RecipeError: negative bits or variance.
    """
    if bits < 0 or variance < 0:
        raise RecipeError(f"entropy: needs bits >= 0 and variance >= 0, not {bits} and {variance}.")
    return variance * 4.0**-bits


def reverse_water_filling(variances: Tensor, counts: Tensor, mean_bits: float) -> Tensor:
    """Share bits among Gaussian sources with the least total distortion Σ counts · variance · 4^-bits.

    Exact: with the sources sorted, the k of the largest variance are active where the level they would have among
    themselves lies below the k-th variance.

    Args:
        variances: [n], >= 0, not all 0.
        counts: [n], samples per source, > 0.
        mean_bits: the budget per sample, >= 0.
    Returns:
        bits per sample [n] in the widest float, >= 0; Σ counts · bits = mean_bits · Σ counts.
    Raises:
        ShapeError: not two equally long vectors.
        VerificationError: variances or counts out of range, NaN or Inf.
        RecipeError: negative mean_bits.
    """
    variances, counts = _sources(variances, counts, mean_bits)
    log_variances, order = variances.log2().sort(descending=True)
    sorted_counts = counts[order]
    spent = (sorted_counts * log_variances).cumsum(0) - 2 * mean_bits * counts.sum()
    levels = spent / sorted_counts.cumsum(0)
    # A budget of 0 puts the level at the largest variance, where none is above it.
    num_active = max(1, int((log_variances > levels).sum()))
    return ((variances.log2() - levels[num_active - 1]) / 2).clamp_(min=0)


def integer_allocation(
    variances: Tensor, counts: Tensor, mean_bits: float, *, choices: Sequence[int] = WHOLE_BITS
) -> Tensor:
    """Share whole bits among Gaussian sources, always to the upgrade that saves the most distortion per bit.

    Since D(b) = variance · 4^-b is convex, the savings of a source fall from one upgrade to the next, and no allocation
    of as many bits is better, as long as the next best upgrade fits. One that exceeds the budget is passed over for
    cheaper ones. With equal counts and consecutive choices all upgrades cost the same, and the result is optimal.
    Upgrades that save nothing are not made.

    Args:
        variances: [n], >= 0, not all 0.
        counts: [n], samples per source, > 0.
        mean_bits: the budget per sample, >= 0.
        choices: the widths allowed, in any order.
    Returns:
        bits per sample [n], int64; Σ counts · bits <= mean_bits · Σ counts.
    Raises:
        ShapeError, VerificationError: as `reverse_water_filling`.
        RecipeError: no choices, negative ones, or a budget below the smallest.
    """
    variances, counts = _sources(variances, counts, mean_bits)
    widths = sorted(set(choices))
    if not widths or widths[0] < 0 or widths[0] > mean_bits:
        raise RecipeError(f"integer_allocation: choices {widths} do not fit a budget of {mean_bits} bits per sample.")
    lower, upper = variances.new_tensor(widths[:-1]).unsqueeze(1), variances.new_tensor(widths[1:]).unsqueeze(1)
    # [upgrades, n]; stable sorting keeps the upgrades of a source in order and settles ties by position.
    savings = (variances * (torch.pow(4.0, -lower) - torch.pow(4.0, -upper)) / (upper - lower)).flatten()
    savings, order = savings.sort(descending=True, stable=True)
    order = order[savings > 0]
    costs = (counts * (upper - lower)).flatten()[order].tolist()
    # The margin is for roundoff: a budget that is met exactly must not fail by its last bit.
    remaining = float(counts.sum()) * (mean_bits * (1 + 1e-12) - widths[0])
    levels = [0] * len(counts)
    for index, cost in zip(order.tolist(), costs, strict=True):
        level, source = divmod(index, len(counts))
        if levels[source] == level and cost <= remaining:
            levels[source] += 1
            remaining -= cost
    return torch.tensor([widths[level] for level in levels], device=variances.device)


def allocation_gain_db(variances: Tensor, counts: Tensor, mean_bits: float) -> float:
    """Return how much less distortion reverse water filling leaves than equal bits for all, in dB; >= 0.

    While every source gets bits, the ratio of the arithmetic to the geometric mean of the variances, at any budget.

    Raises:
        ShapeError, VerificationError, RecipeError: as `reverse_water_filling`.
    """
    bits = reverse_water_filling(variances, counts, mean_bits)
    variances, counts = _sources(variances, counts, mean_bits)
    damage = variances * counts
    equal, filled = float(damage.sum()) * 4.0**-mean_bits, float((damage * torch.pow(4.0, -bits)).sum())
    return max(0.0, 10 * math.log10(equal / filled))


def _sources(variances: Tensor, counts: Tensor, mean_bits: float) -> tuple[Tensor, Tensor]:
    """Check sources and budget; return variances and counts in the widest float."""
    if variances.ndim != 1 or variances.numel() == 0 or counts.shape != variances.shape:
        raise ShapeError(
            f"entropy: variances {list(variances.shape)} and counts {list(counts.shape)} must be two equally long "
            "vectors."
        )
    wide = wide_dtype(variances.device)
    variances, counts = variances.to(wide), counts.to(device=variances.device, dtype=wide)
    if not bool((torch.isfinite(variances) & (variances >= 0)).all()) or not bool((variances > 0).any()):
        raise VerificationError("entropy: variances must be finite, not negative and not all 0.")
    if not bool((torch.isfinite(counts) & (counts > 0)).all()):
        raise VerificationError("entropy: counts must be finite and positive.")
    if not (math.isfinite(mean_bits) and mean_bits >= 0):
        raise RecipeError(f"entropy: mean_bits must be finite and not negative, not {mean_bits}.")
    return variances, counts
