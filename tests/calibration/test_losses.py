"""Losses under number formats: against the same arithmetic written out, and against theory."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.calibration.losses import (
    CHANNEL,
    G64,
    G128,
    INPUT_FORMATS,
    TENSOR,
    TOKEN,
    WEIGHT_FORMATS,
    OutputBench,
    TokenSample,
    gaussian_weight_db,
    input_mse,
    level_format,
    smoothing_scale,
)
from bitwright.numerics.granularity import Granularity


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bench() -> OutputBench:
    return OutputBench(gaussian(200, 128), [gaussian(96, 128, seed=1), gaussian(40, 128, seed=2)])


def level(sqnr_db: float | None) -> float:
    assert sqnr_db is not None
    return sqnr_db


def db(signal: Tensor, noise: Tensor) -> float:
    return 10 * math.log10(float(signal) / float(noise))


def test_int8_per_token_written_out(bench: OutputBench) -> None:
    x = bench.inputs
    absmax = x.abs().amax(1, keepdim=True)
    # The full range -128 … 127, whose extra code goes to the larger side.
    other = torch.where(x.amax(1) > -x.amin(1), -x.amin(1), x.amax(1)).unsqueeze(1)
    step = torch.maximum(absmax / 128, other / 127)
    expected = (x / step).round() * step
    found = bench.input_loss("int8", TOKEN, 0.0, 0.0)
    error = (expected - x).double()
    assert found.sqnr_db == pytest.approx(db(x.double().square().sum(), error.square().sum()), abs=1e-3)
    noise = sum((error @ w.double().T).square().sum(1) for w in bench.weights)
    power = sum((x.double() @ w.double().T).square().sum(1) for w in bench.weights)
    assert isinstance(noise, Tensor)
    assert isinstance(power, Tensor)
    assert found.output_sqnr_db == pytest.approx(-10 * math.log10(float((noise / power).mean())), abs=1e-3)
    mse = step.double().square().mean() / 12
    assert found.predicted_db == pytest.approx(db(x.double().square().mean(), mse), abs=1e-3)


def test_the_range_of_a_tensor_is_that_of_all_tokens(bench: OutputBench) -> None:
    """The sample need not hold the largest input; the scale must cover it nonetheless."""
    tight, wide = (bench.input_loss("int8", TENSOR, -reach, reach) for reach in (5.0, 20.0))
    # Four times the step is 12.04 dB; 25,600 squared errors have a standard error of 0.6 %, 0.03 dB.
    assert level(tight.sqnr_db) - level(wide.sqnr_db) == pytest.approx(20 * math.log10(4), abs=0.2)


@pytest.mark.parametrize(("name", "granularity"), [each for each in INPUT_FORMATS if each[0] in ("int8", "uint8")])
def test_inputs_err_as_predicted(name: str, granularity: Granularity, bench: OutputBench) -> None:
    low, high = float(bench.inputs.min()), float(bench.inputs.max())
    found = bench.input_loss(name, granularity, low, high)
    assert found.sqnr_db == pytest.approx(found.predicted_db, abs=0.15)


def test_floats_err_as_predicted_averaged_over_a_binade() -> None:
    """Which scale a tensor has decides where its numbers lie between powers of two: the prediction is the mean."""
    format, x = level_format("fp8-e4m3"), gaussian(200_000).double()
    scales = [2.0 ** (phase / 16 - 6) for phase in range(16)]
    measured = [float(((format.snap((x / s).float(), None).double() * s) - x).square().mean()) for s in scales]
    predicted = input_mse(format, power=float(x.square().mean()), rms_scale=2.0**-6)
    assert sum(measured) / 16 == pytest.approx(predicted, rel=0.02)


def test_float_predictions_know_the_finest_step() -> None:
    """Of inputs far below the scale's smallest normal number only a uniform grid is left."""
    format, x = level_format("fp8-e4m3"), 2.0**-8 * gaussian(200_000).double()
    measured = float((format.snap(x.float(), None).double() - x).square().mean())
    predicted = input_mse(format, power=float(x.square().mean()), rms_scale=1.0)
    assert predicted == pytest.approx((2.0**-9) ** 2 / 12, rel=0.05)
    assert measured == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize(("name", "granularity"), WEIGHT_FORMATS)
def test_gaussian_weights_err_as_predicted(name: str, granularity: Granularity) -> None:
    bench = OutputBench(gaussian(4, 128), [gaussian(1500, 128, seed=3)])
    found = bench.weight_loss(name, granularity)
    assert level(found.sqnr_db) == pytest.approx(found.predicted_db, abs=0.1)


def test_small_groups_are_predicted_to_be_better() -> None:
    assert gaussian_weight_db("int4", 4096) < gaussian_weight_db("int4", 128) < gaussian_weight_db("nf4", 64)
    assert gaussian_weight_db("uint4", 128) > gaussian_weight_db("int4", 128)


def test_several_weights_count_together() -> None:
    """One site's error is 30 dB below the other's: the sum is the other's."""
    x, first, second = gaussian(50, 128), gaussian(64, 128, seed=1), gaussian(64, 128, seed=2)
    alone = OutputBench(x, [first]).weight_loss("int4", G128)
    both = OutputBench(x, [first, 1e-3 * second]).weight_loss("int4", G128)
    assert both.sqnr_db == pytest.approx(alone.sqnr_db, abs=1e-3)
    assert both.output_sqnr_db == pytest.approx(alone.output_sqnr_db, abs=1e-3)


def test_a_loud_channel_hides_in_the_tensor_and_shows_in_the_outputs() -> None:
    x, w = gaussian(200, 128), gaussian(64, 128, seed=1)
    scale = torch.ones(128)
    scale[5] = 128.0
    loud = OutputBench(x * scale, [w / scale]).input_loss("int8", TOKEN, 0.0, 0.0)
    quiet = OutputBench(x, [w]).input_loss("int8", TOKEN, 0.0, 0.0)
    assert level(quiet.output_sqnr_db) - level(loud.output_sqnr_db) > 20
    # The step grows by some 128 / 3, which is 33 dB, the power by 1 + 128² / 128, which is 21 dB.
    assert level(quiet.sqnr_db) - level(loud.sqnr_db) < 15


def test_smoothing_the_planted_channel_restores_the_outputs() -> None:
    x, w = gaussian(200, 128), gaussian(64, 128, seed=1)
    planted = torch.ones(128)
    planted[5] = 128.0
    plain, loud = OutputBench(x, [w]), OutputBench(x * planted, [w / planted])
    ideal = level(plain.w8a8_sqnr_db())
    assert level(loud.w8a8_sqnr_db()) < ideal - 20
    # Powers of two change no rounding: inputs and weights are bit for bit those of the plain model.
    assert loud.w8a8_sqnr_db(scale=planted) == pytest.approx(ideal, abs=1e-3)
    assert level(loud.w8a8_sqnr_db(kept=torch.tensor([5]))) > ideal - 0.1


def test_channels_that_are_kept_are_exact(bench: OutputBench) -> None:
    everything = torch.arange(128)
    assert bench.w8a8_sqnr_db(kept=everything) is None
    # Half the error is 3.01 dB; averages over 64 channels and 200 tokens scatter by far less than half of that.
    assert level(bench.w8a8_sqnr_db(kept=everything[:64])) - level(bench.w8a8_sqnr_db()) == pytest.approx(3, abs=1.5)


def test_smoothing_scale_by_the_formula() -> None:
    weights = [torch.tensor([[1.0, -2.0, 0.5, 3.0]]), torch.tensor([[-4.0, 1.0, 0.25, 0.0]])]
    absmax = torch.tensor([16.0, 8.0, 2.0, 0.0])
    found = smoothing_scale(absmax, weights, range(4), alpha=0.5)
    assert found.tolist() == pytest.approx([16**0.5 / 4**0.5, 8**0.5 / 2**0.5, 2**0.5 / 0.5**0.5, 1.0])
    shared = smoothing_scale(absmax, weights, [0, 1, 0, 1], alpha=0.75)
    expected = [16**0.75 / 4**0.25, 8**0.75 / 3**0.25]
    assert shared.tolist() == pytest.approx(expected * 2), "columns of one channel share its scale"


def test_nothing_lost_and_nothing_there_have_no_level() -> None:
    silent = OutputBench(torch.zeros(5, 64), [gaussian(8, 64)])
    loss = silent.input_loss("int8", TENSOR, 0.0, 0.0)
    assert (loss.sqnr_db, loss.predicted_db, loss.output_sqnr_db) == (None, None, None)
    exact = OutputBench(torch.tensor([[0.0, 127.0, -128.0, 3.0]]), [gaussian(8, 4)])
    found = exact.input_loss("int8", TOKEN, 0.0, 0.0)
    assert (found.sqnr_db, found.output_sqnr_db) == (None, None)
    assert found.predicted_db is not None


def test_silent_tokens_count_for_nothing() -> None:
    x = gaussian(50, 64)
    padded = torch.cat([x, torch.zeros(50, 64)])
    weights = [gaussian(16, 64, seed=1)]
    alone, both = (OutputBench(each, weights).input_loss("int8", TOKEN, 0.0, 0.0) for each in (x, padded))
    assert both.output_sqnr_db == pytest.approx(alone.output_sqnr_db)
    assert both.sqnr_db == pytest.approx(alone.sqnr_db)
    assert both.predicted_db == pytest.approx(alone.predicted_db)


def test_sample_granularities_are_named(bench: OutputBench) -> None:
    assert [bench.weight_loss("int4", each).granularity for each in (CHANNEL, G64, G128)] == ["channel", "g64", "g128"]
    assert bench.input_loss("int8", TENSOR, -5.0, 5.0).granularity == "tensor"


@given(cuts=st.lists(st.integers(0, 90), max_size=4), size=st.integers(1, 120))
def test_a_sample_does_not_depend_on_the_batches(cuts: list[int], size: int) -> None:
    x = torch.arange(90.0).unsqueeze(1)
    ends = [0, *sorted(cuts), 90]
    split, whole = TokenSample(size, seed=3), TokenSample(size, seed=3)
    for a, b in pairwise(ends):
        split.add(x[a:b].reshape(1, b - a, 1))
    whole.add(x)
    assert split.tokens is not None
    assert whole.tokens is not None
    assert torch.equal(split.tokens, whole.tokens)
    assert whole.tokens.shape == (min(size, 90), 1)
    assert torch.equal(whole.tokens, whole.tokens.sort(0).values), "in the order of the stream, each once"
    assert whole.tokens.unique().numel() == whole.tokens.numel()


def test_every_token_is_as_likely_to_stay() -> None:
    counts = torch.zeros(40)
    for seed in range(600):
        sample = TokenSample(10, seed=seed)
        sample.add(torch.arange(15).unsqueeze(1).half())
        sample.add(torch.arange(15, 40).unsqueeze(1).half())
        assert sample.tokens is not None
        assert sample.tokens.dtype == torch.float32
        counts[sample.tokens.long().flatten()] += 1
    # 600 draws with probability 1/4: 150, standard deviation 10.6; five of them for 40 tokens.
    assert (counts - 150).abs().max() <= 53
