"""A guard: text that was calibrated on must not be the text that is evaluated on.

Both texts are cut into all their spans of 32 tokens; the share is that of the smaller set of distinct spans that the
other also has (the overlap coefficient). It is symmetric, so that a small sample out of a large evaluation text is
caught as well as a large calibration text that contains the evaluation text. Counting distinct spans keeps a licence
header that opens every file from weighing more than once. Honest pairs of texts share under 1 % (two halves of
Wikipedia, of TinyStories, of a source tree); a text and its reformatted or halved copy share over 85 %.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bitwright.errors import DataError

SPAN_TOKENS = 32
MAX_SHARE = 0.05
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def overlap_share(calibration: Tensor, evaluation: Tensor, *, span: int = SPAN_TOKENS) -> float:
    """Return the overlap coefficient of the two texts' token spans, 0 to 1.

    Args:
        calibration: token ids, [L] or windows [N, T]; spans never cross windows.
        evaluation: as `calibration`, from the same tokenizer.
        span: tokens per span; shortened to the shorter text's windows.
    """
    span = min(span, calibration.shape[-1], evaluation.shape[-1])
    if span == 0:
        return 0.0
    ours, theirs = _span_hashes(calibration, span), _span_hashes(evaluation, span)
    common = np.intersect1d(ours, theirs, assume_unique=True)
    return len(common) / min(len(ours), len(theirs))


def require_disjoint(
    calibration: Tensor,
    evaluation: Tensor,
    *,
    calibration_source: str = "calibration",
    evaluation_source: str = "evaluation",
    max_share: float = MAX_SHARE,
) -> None:
    """Refuse an evaluation text that shares more than boilerplate with the calibration text.

    Raises:
        DataError: names both texts and the share.
    """
    share = overlap_share(calibration, evaluation)
    if share > max_share:
        raise DataError(
            f"evaluation text '{evaluation_source}' and calibration text '{calibration_source}' share {share:.1%} of "
            f"their {SPAN_TOKENS}-token spans (at most {max_share:.0%} is allowed). Evaluate on text that was not "
            "calibrated on."
        )


def _span_hashes(tokens: Tensor, span: int) -> NDArray[np.uint64]:
    """Distinct 64-bit hashes of all spans of [..., T]: a polynomial in an odd multiplier, built by doubling lengths."""
    power, length = _MULTIPLIER, 1
    hashes = _scatter(np.atleast_2d(tokens.cpu().numpy()).astype(np.uint64))
    single = hashes
    for bit in bin(span)[3:]:
        hashes = hashes[:, :-length] * np.uint64(power) + hashes[:, length:]
        power, length = power * power & _MASK, 2 * length
        if bit == "1":
            hashes = hashes[:, :-1] * np.uint64(_MULTIPLIER) + single[:, length:]
            power, length = power * _MULTIPLIER & _MASK, length + 1
    return np.unique(hashes)


def _scatter(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread neighbouring token ids over all 64 bits (the finaliser of splitmix64)."""
    x = ids * np.uint64(_MULTIPLIER)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
