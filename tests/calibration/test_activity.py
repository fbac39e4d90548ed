"""Activity statistics, compared with the inputs themselves, and merged in every way."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.calibration.activity import BINS_PER_OCTAVE, OUTLIER_RATIO, ActivityStats
from bitwright.errors import BitwrightError, DataError, ShapeError, VerificationError

WIDTH = 12


def seen(*batches: Tensor) -> ActivityStats:
    stats = ActivityStats.empty(batches[0].shape[-1])
    for batch in batches:
        stats.observe(batch)
    return stats


def heavy(num_tokens: int, num_channels: int = WIDTH, seed: int = 0) -> Tensor:
    """Skewed inputs of means, sizes and tails that differ between channels and tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_channels, generator=generator)
    tokens = torch.rand(num_tokens, 1, generator=generator).exp()
    return (x + 0.1 * x**3 + 0.5) * torch.linspace(0.1, 3, num_channels) * tokens


def assert_equal(found: ActivityStats, expected: ActivityStats) -> None:
    """Counts and ends bit for bit; sums in float64, whose order of addition may differ."""
    assert (found.num_tokens, found.num_negative) == (expected.num_tokens, expected.num_negative)
    assert torch.equal(found.low, expected.low)
    assert torch.equal(found.high, expected.high)
    assert torch.equal(found.token_counts, expected.token_counts)
    torch.testing.assert_close(found.power_sums, expected.power_sums, rtol=1e-12, atol=1e-12)


def test_figures_are_those_of_the_inputs() -> None:
    x = heavy(700)
    stats, wide = seen(x[:300].reshape(3, 100, WIDTH), x[300:]), x.double()
    assert stats.num_tokens == 700
    assert torch.equal(stats.low, wide.amin(0))
    assert torch.equal(stats.high, wide.amax(0))
    assert torch.equal(stats.channel_absmax, wide.abs().amax(0))
    assert stats.absmax == float(wide.abs().max())
    torch.testing.assert_close(stats.mean_square, wide.square().mean(0), rtol=1e-12, atol=0.0)
    assert stats.rms == pytest.approx(float(wide.square().mean().sqrt()), rel=1e-12)
    assert stats.fraction_negative == float((wide < 0).double().mean())
    assert stats.dynamic_range_db == pytest.approx(20 * math.log10(stats.absmax / stats.rms))
    centred = wide - wide.mean(0)
    expected = centred.pow(4).mean(0) / centred.square().mean(0).square()
    torch.testing.assert_close(stats.channel_kurtosis, expected, rtol=1e-9, atol=0.0)
    centred = wide - wide.mean()
    assert stats.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2), rel=1e-9)
    low, high = float(wide.min()), float(wide.max())
    assert stats.one_sidedness == pytest.approx((high + low) / (high - low))


@given(cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 5))
def test_any_split_and_any_merge_gives_the_same(cuts: list[int], seed: int) -> None:
    x = heavy(60, seed=seed)
    ends = [0, *sorted(cuts), 60]
    parts = [x[a:b] for a, b in pairwise(ends)]
    expected = seen(x)
    assert_equal(seen(*parts), expected)
    alone = [seen(part) for part in parts]
    left = alone[0]
    for each in alone[1:]:
        left = left.merge(each)
    right = alone[-1]
    for each in reversed(alone[:-1]):
        right = right.merge(each)
    assert_equal(left, expected)
    assert_equal(right, expected)
    assert_equal(ActivityStats.empty(WIDTH).merge(expected), expected)


def test_merging_changes_neither_and_later_batches_no_copy() -> None:
    first, second = seen(heavy(20)), seen(heavy(30, seed=1))
    merged = first.merge(second)
    assert_equal(first, seen(heavy(20)))
    assert_equal(second, seen(heavy(30, seed=1)))
    before = first.merge(ActivityStats.empty(WIDTH))
    first.observe(heavy(5))
    assert_equal(before, seen(heavy(20)))
    assert merged.num_tokens == 50


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (torch.rand, 1.8),
        (torch.randn, 3.0),
        (lambda n: torch.empty(n).exponential_() * torch.randn(n).sign(), 6.0),
    ],
    ids=["uniform", "gaussian", "laplace"],
)
def test_kurtosis_of_known_distributions(draw: Callable[[int], Tensor], expected: float) -> None:
    """The standard error of a Gaussian's kurtosis is sqrt(24 / n), that of a Laplacian's about ten times as large."""
    x = draw(400_000).reshape(-1, 1) * 5 + 40
    assert float(seen(x).channel_kurtosis) == pytest.approx(expected, abs=50 * math.sqrt(24 / 400_000))


def test_a_channel_that_hardly_varies_has_no_kurtosis() -> None:
    x = heavy(50)
    x[:, 3] = 7.25
    x[:, 5] = 0
    stats = seen(x)
    assert stats.channel_kurtosis.isnan().nonzero().flatten().tolist() == [3, 5]
    assert math.isnan(seen(torch.full((4, 3), 2.5)).kurtosis)


def test_outlier_channels_are_found_with_their_ratio() -> None:
    x = torch.randn(400, 64)
    x[:, 9] *= 100
    x[:, 40] *= 30
    stats = seen(x)
    assert [channel.index for channel in stats.outlier_channels] == [9, 40]
    absmax = x.abs().amax(0)
    for channel in stats.outlier_channels:
        assert channel.absmax == float(absmax[channel.index])
        assert channel.ratio == pytest.approx(channel.absmax / float(absmax.median()))
        assert channel.ratio > OUTLIER_RATIO
    assert seen(torch.randn(400, 64)).outlier_channels == ()


@pytest.mark.parametrize("share_alive", [0.2, 0.45])
@pytest.mark.parametrize("rest", [0.0, 1e-3])
def test_live_channels_among_dead_ones_are_no_outliers(rest: float, share_alive: float) -> None:
    x = torch.randn(400, 100)
    x[:, int(100 * share_alive) :] *= rest
    assert seen(x).outlier_channels == ()


def test_outlier_tokens_show_in_the_histogram() -> None:
    x = torch.rand(1000, 8) * 2 - 1
    x[:, 0] = 1.0  # every token's largest magnitude
    assert seen(x).outlier_token_ratio == pytest.approx(1.0, rel=2 ** (0.5 / BINS_PER_OCTAVE) - 1)
    x[77] *= 1000
    stats = seen(x)
    ratio = stats.outlier_token_ratio
    assert ratio is not None
    assert ratio == pytest.approx(1000, rel=2 ** (0.5 / BINS_PER_OCTAVE) - 1)
    assert stats.outlier_channels == (), "all channels are large together"
    assert stats.token_histogram == ((1.0, 999), (2.0 ** (math.floor(8 * math.log2(1000)) / 8), 1))


@given(st.lists(st.floats(2.0**-63, 2.0**63, width=32), min_size=1, max_size=40))
def test_the_median_token_is_within_half_a_bin(sizes: list[float]) -> None:
    stats = seen(torch.tensor(sizes, dtype=torch.float32).unsqueeze(1))
    median = sorted(sizes)[(len(sizes) - 1) // 2]
    assert abs(math.log2(stats.median_token_absmax / median)) <= 0.5 / BINS_PER_OCTAVE + 1e-9
    borders = Counter(2.0 ** (math.floor(BINS_PER_OCTAVE * math.log2(size)) / BINS_PER_OCTAVE) for size in sizes)
    assert stats.token_histogram == tuple(sorted(borders.items()))


def test_tokens_beyond_the_histogram_count_at_its_ends() -> None:
    stats = seen(torch.tensor([[0.0], [2.0**-70], [1.0], [2.0**80]], dtype=torch.float64))
    assert [count for _, count in stats.token_histogram] == [2, 1, 1]
    assert stats.token_histogram[0][0] == 0
    assert stats.median_token_absmax == 0
    assert stats.outlier_token_ratio is None


@pytest.mark.parametrize(
    ("x", "expected", "negative"),
    [
        (torch.rand(50, 4), 1.0, 0.0),
        (-torch.rand(50, 4) - 1, -1.0, 1.0),
        (torch.tensor([[-1.0, 3.0]]), 0.5, 0.5),
        (torch.zeros(5, 4), 0.0, 0.0),
    ],
)
def test_one_sidedness(x: Tensor, expected: float, negative: float) -> None:
    stats = seen(x)
    assert stats.one_sidedness == expected
    assert stats.fraction_negative == negative


def test_zeros_have_no_range_to_speak_of() -> None:
    stats = seen(torch.zeros(5, 4))
    assert (stats.absmax, stats.rms, stats.dynamic_range_db) == (0, 0, 0)
    assert stats.outlier_token_ratio is None
    assert stats.outlier_channels == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_float_dtype_counts_in_full(dtype: torch.dtype) -> None:
    x = heavy(100).to(dtype)
    assert_equal(seen(x), seen(x.double()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_refused_changes_nothing(bad: float) -> None:
    stats = seen(heavy(20))
    x = heavy(20, seed=1)
    x[3, 4] = bad
    with pytest.raises(VerificationError, match="NaN or Inf"):
        stats.observe(x)
    with pytest.raises(ShapeError, match=r"inputs \[2, 5\] must be \[\.\.\., 12\]"):
        stats.observe(torch.zeros(2, 5))
    stats.observe(torch.zeros(0, WIDTH))
    assert_equal(stats, seen(heavy(20)))


def test_different_widths_do_not_merge() -> None:
    with pytest.raises(ShapeError, match="12 and 3 channels"):
        ActivityStats.empty(WIDTH).merge(ActivityStats.empty(3))


@pytest.mark.parametrize(
    "name",
    ["channel_absmax", "rms", "kurtosis", "fraction_negative", "one_sidedness", "outlier_channels",
     "median_token_absmax", "outlier_token_ratio", "dynamic_range_db", "channel_kurtosis"],
)  # fmt: skip
def test_nothing_seen_is_an_error_and_no_figure(name: str) -> None:
    with pytest.raises(DataError, match="no token was seen") as raised:
        getattr(ActivityStats.empty(4), name)
    assert isinstance(raised.value, BitwrightError)
