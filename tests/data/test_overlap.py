import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.data import overlap
from bitwright.data.overlap import MAX_SHARE, overlap_share, require_disjoint
from bitwright.errors import DataError


def random_tokens(num: int, seed: int, vocabulary: int = 2000) -> torch.Tensor:
    return torch.randint(vocabulary, (num,), generator=torch.Generator().manual_seed(seed))


@given(
    ours=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    theirs=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    span=st.integers(1, 9),
)
def test_the_share_equals_that_of_plain_sets_of_spans(ours: list[int], theirs: list[int], span: int) -> None:
    width = min(span, len(ours), len(theirs))

    def spans(tokens: list[int]) -> set[tuple[int, ...]]:
        return {tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)}

    expected = len(spans(ours) & spans(theirs)) / min(len(spans(ours)), len(spans(theirs)))
    assert overlap_share(torch.tensor(ours), torch.tensor(theirs), span=span) == expected


def test_a_text_overlaps_itself_fully_and_a_stranger_not_at_all() -> None:
    a, b = random_tokens(5000, 0), random_tokens(5000, 1)
    assert overlap_share(a, a) == 1.0
    assert overlap_share(a, b) == 0.0


def test_half_a_shared_text_is_caught_in_either_role() -> None:
    shared = random_tokens(4000, 0)
    a = torch.cat([shared, random_tokens(4000, 1)])
    b = torch.cat([random_tokens(4000, 2), shared])
    for pair in ((a, b), (b, a), (shared, a), (a, shared)):
        with pytest.raises(DataError, match="Evaluate on text that was not calibrated on"):
            require_disjoint(*pair)


def test_a_small_sample_of_a_large_evaluation_text_is_caught() -> None:
    evaluation = random_tokens(200_000, 0)
    sample = evaluation.view(-1, 64)[::400]
    assert sample.numel() < 0.01 * evaluation.numel()
    assert overlap_share(sample, evaluation) == 1.0


def test_an_evaluation_text_shifted_against_the_windows_is_caught() -> None:
    text = random_tokens(20_000, 0)
    windows = text[7 : 7 + 128 * 150].view(150, 128)
    assert overlap_share(text[: len(text) // 2], windows) > 0.4


def test_boilerplate_in_every_document_is_not_an_overlap() -> None:
    header = random_tokens(60, 9)
    a = torch.cat([torch.cat([header, random_tokens(800, i)]) for i in range(20)])
    b = torch.cat([torch.cat([header, random_tokens(800, 100 + i)]) for i in range(20)])
    assert 0 < overlap_share(a, b) < MAX_SHARE
    require_disjoint(a, b)


def test_the_error_names_both_texts_and_the_share() -> None:
    a = random_tokens(1000, 0)
    with pytest.raises(DataError) as caught:
        require_disjoint(a, a, calibration_source="c.txt", evaluation_source="e.txt")
    assert str(caught.value) == (
        "evaluation text 'e.txt' and calibration text 'c.txt' share 100.0% of their 32-token spans (at most 5% is "
        "allowed). Evaluate on text that was not calibrated on."
    )


def test_spans_do_not_cross_windows() -> None:
    a = random_tokens(64, 0)
    windows = torch.stack([a[:32], a[32:]])
    assert overlap_share(windows, a) == 1.0
    assert len(overlap._span_hashes(windows, 32)) == 2
    assert overlap_share(a[16:48], windows) == 0.0


def test_distinct_spans_have_distinct_hashes() -> None:
    # 2^16 spans of two symbols, the worst case for a polynomial hash; a 64-bit collision has a chance of 1e-10.
    bits = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    assert len(overlap._span_hashes(torch.from_numpy(bits), 16)) == 2**16


def test_empty_text_has_no_overlap() -> None:
    assert overlap_share(torch.tensor([], dtype=torch.int64), random_tokens(10, 0)) == 0.0
