"""Figures from logits, against their definitions in float64 and against transformers' own loss."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.evaluation.score import TOKENS_PER_CHUNK, Score, Scorer

VOCABULARY = 53
EPS = torch.finfo(torch.float32).eps


def score(windows: list[tuple[Tensor, Tensor, Tensor | None]]) -> Score:
    scorer = Scorer()
    for ids, logits, reference in windows:
        scorer.add(ids, logits, reference)
    return scorer.result()


def random_windows(
    num_windows: int = 3, seqlen: int = TOKENS_PER_CHUNK + 40
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Longer than a chunk, so that the borders between chunks are inside."""
    windows: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for _ in range(num_windows):
        reference = 3 * torch.randn(seqlen, VOCABULARY)
        logits = reference + 0.3 * torch.randn(seqlen, VOCABULARY)
        windows.append((torch.randint(VOCABULARY, (seqlen,)), logits, reference))
    return windows


def naive_nll(ids: Tensor, logits: Tensor) -> list[float]:
    """-log p(token t + 1 | tokens 1 … t), one prediction at a time."""
    return [-float(torch.log_softmax(logits[t].double(), -1)[ids[t + 1]]) for t in range(len(ids) - 1)]


def naive_kl(logits: Tensor, reference: Tensor) -> list[float]:
    divergences: list[float] = []
    for t in range(len(logits) - 1):
        p, q = torch.softmax(reference[t].double(), -1), torch.softmax(logits[t].double(), -1)
        divergences.append(float((p * (p / q).log()).sum()))
    return divergences


@pytest.mark.parametrize("size", [2, VOCABULARY, 50_000])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(size: int) -> None:
    logits = torch.full((40, size), 1.25)
    found = score([(torch.randint(size, (40,)), logits, None) for _ in range(2)])
    # A logarithm of V summed in float32: log2(V) additions, each of one rounding of values up to log V.
    assert found.perplexity == pytest.approx(size, rel=EPS * math.log2(size) * math.log(size) + EPS)
    assert found.perplexity_stderr == 0
    assert (found.num_windows, found.num_tokens) == (2, 2 * 39)


def test_perplexity_is_that_of_the_definition() -> None:
    windows = random_windows()
    losses = [naive_nll(ids, logits) for ids, logits, _ in windows]
    found = score(windows)
    expected = math.exp(statistics.fmean(loss for window in losses for loss in window))
    assert found.perplexity == pytest.approx(expected, rel=4 * EPS * max(map(max, losses)))
    assert found.num_tokens == sum(map(len, losses))


def test_divergence_is_that_of_the_definition() -> None:
    windows = random_windows()
    tokens = [each for _, logits, reference in windows if reference is not None for each in naive_kl(logits, reference)]
    found = score(windows)
    # Computed in float64: what differs is the order of summation.
    assert found.kl_mean == pytest.approx(statistics.fmean(tokens), rel=1e-12)
    ordered = sorted(tokens)
    assert found.kl_p99 == pytest.approx(ordered[math.ceil(0.99 * len(ordered)) - 1], rel=1e-9)
    assert found.kl_p999 == pytest.approx(ordered[math.ceil(0.999 * len(ordered)) - 1], rel=1e-9)
    same = [
        bool(logits[t].argmax() == reference[t].argmax())
        for ids, logits, reference in windows
        if reference is not None
        for t in range(len(ids) - 1)
    ]
    assert found.same_top1 == pytest.approx(statistics.fmean(same), rel=1e-12)
    assert 0 < statistics.fmean(same) < 1


def test_divergence_is_measured_from_the_reference() -> None:
    """KL(reference ‖ model), not the reverse: a token that only the reference expects is costly, the reverse is not."""
    certain, uniform = torch.zeros(2, 2), torch.zeros(2, 2)
    certain[:, 0] = 40.0
    ids = torch.zeros(2, dtype=torch.int64)
    assert score([(ids, uniform, certain)]).kl_mean == pytest.approx(math.log(2), rel=1e-12)
    assert score([(ids, certain, uniform)]).kl_mean == pytest.approx(20 - math.log(2), rel=1e-12)


def test_divergence_from_itself_is_zero() -> None:
    found = score([(ids, reference, reference) for ids, _, reference in random_windows()])
    assert (found.kl_mean, found.kl_stderr, found.kl_p99, found.kl_p999, found.same_top1) == (0, 0, 0, 0, 1)


def test_one_window_says_nothing_of_the_spread() -> None:
    found = score(random_windows()[:1])
    assert (found.perplexity_stderr, found.kl_stderr) == (None, None)


def test_without_reference_there_is_no_divergence() -> None:
    found = score([(ids, logits, None) for ids, logits, _ in random_windows()])
    assert (found.kl_mean, found.kl_stderr, found.kl_p99, found.kl_p999, found.same_top1) == (None,) * 5


def test_standard_errors_are_over_windows() -> None:
    windows = random_windows(num_windows=5, seqlen=30)
    losses = [statistics.fmean(naive_nll(ids, logits)) for ids, logits, _ in windows]
    divergences = [statistics.fmean(naive_kl(logits, ref)) for _, logits, ref in windows if ref is not None]
    found = score(windows)
    of_mean = statistics.stdev(losses) / math.sqrt(5)
    # d exp(x) = exp(x) dx; the float32 noise of a loss is far below the spread of 5 of them.
    assert found.perplexity_stderr == pytest.approx(found.perplexity * of_mean, rel=1e-4)
    assert found.kl_stderr == pytest.approx(statistics.stdev(divergences) / math.sqrt(5), rel=1e-9)


@pytest.mark.parametrize(
    ("num_tokens", "rank"), [(1, 1), (99, 99), (100, 99), (101, 100), (250, 248)]
)  # of the 99 % quantile
def test_the_quantile_is_the_smallest_value_that_enough_tokens_do_not_exceed(num_tokens: int, rank: int) -> None:
    """KL from certainty (0, 0) to (x, 0) grows with x, so that the ranks of the tokens are known."""
    strength = torch.randperm(num_tokens).double() + 1
    reference = torch.zeros(num_tokens + 1, 2, dtype=torch.float64)
    logits = torch.zeros(num_tokens + 1, 2, dtype=torch.float64)
    logits[:-1, 0] = strength / num_tokens
    found = score([(torch.zeros(num_tokens + 1, dtype=torch.int64), logits, reference)])
    exceeding = torch.zeros(2, 2, dtype=torch.float64)
    exceeding[0, 0] = rank / num_tokens
    alone = score([(torch.zeros(2, dtype=torch.int64), exceeding, torch.zeros(2, 2, dtype=torch.float64))])
    assert found.kl_p99 == pytest.approx(alone.kl_mean, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_collapsed_model_has_infinite_perplexity(value: float) -> None:
    logits = torch.zeros(8, VOCABULARY)
    logits[3] = value
    assert score([(torch.zeros(8, dtype=torch.int64), logits, None)]).perplexity == math.inf


def test_an_impossible_token_has_infinite_perplexity() -> None:
    logits = torch.zeros(8, VOCABULARY)
    logits[:, 5] = -math.inf
    assert score([(torch.full((8,), 5), logits, None)]).perplexity == math.inf


def test_the_last_row_of_logits_predicts_nothing() -> None:
    ids, logits, reference = random_windows(num_windows=1, seqlen=20)[0]
    spoilt = logits.clone()
    spoilt[-1] = 1e6
    assert score([(ids, spoilt, reference)]) == score([(ids, logits, reference)])


def test_half_precision_logits_are_scored_in_float32() -> None:
    ids, logits, reference = random_windows(num_windows=1, seqlen=20)[0]
    assert reference is not None
    half, other = logits.bfloat16(), reference.bfloat16()
    assert score([(ids, half, other)]) == score([(ids, half.float(), other.float())])


def test_perplexity_is_transformers_own_loss(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    windows = torch.randint(320, (4, 32))
    with torch.no_grad():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows]
        found = score([(ids, model(input_ids=ids[None]).logits[0], None) for ids in windows])
    expected = math.exp(statistics.fmean(losses))
    assert found.perplexity == pytest.approx(expected, rel=32 * EPS * max(losses))
