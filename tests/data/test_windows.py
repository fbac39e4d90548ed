import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from bitwright.data.windows import hash_tokens, sample_windows, split_windows, tokenise
from bitwright.errors import DataError


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<s>", eos_token="</s>")


def test_documents_are_joined_and_tokenised_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenise(tiny_tokenizer, ["One day.", "Another."])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == tiny_tokenizer("One day.\n\nAnother.")["input_ids"]
    assert (tokens == tiny_tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(("template", "first"), [("<s> $A", [0]), ("$A", []), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_bos_comes_once_where_the_tokenizer_adds_it_and_never_a_closing_token(
    template: str, first: list[int], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    plain = tokenizer("One day.", add_special_tokens=False)["input_ids"]
    assert tokenise(tokenizer, ["One day."]).tolist() == [*first, *plain]


def test_long_text_raises_no_warning(tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: str) -> None:
    tokens = tokenise(tiny_tokenizer, [tiny_text])
    assert len(tokens) > tiny_tokenizer.model_max_length
    assert tiny_tokenizer.decode(tokens[1:]) == tiny_text


@given(length=st.integers(1, 300), seqlen=st.integers(1, 40))
def test_windows_tile_the_text_and_drop_only_the_remainder(length: int, seqlen: int) -> None:
    tokens = torch.arange(length)
    if seqlen > length:
        with pytest.raises(DataError):
            split_windows(tokens, seqlen=seqlen)
        return
    windows = split_windows(tokens, seqlen=seqlen)
    assert windows.shape == (length // seqlen, seqlen)
    assert torch.equal(windows.flatten(), tokens[: length // seqlen * seqlen])


def test_a_text_shorter_than_a_window_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        split_windows(torch.arange(312), seqlen=2048, source="notes.txt")
    assert str(caught.value) == (
        "notes.txt: 312 tokens, fewer than one window of 2048. Use a longer text or a seqlen of at most 312."
    )


@given(num_samples=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_samples_are_distinct_windows_in_an_order_of_the_seed(num_samples: int, seed: int) -> None:
    tokens = torch.arange(100)
    chosen = sample_windows(tokens, num_samples=num_samples, seqlen=8, seed=seed)
    assert torch.equal(chosen, sample_windows(tokens, num_samples=num_samples, seqlen=8, seed=seed))
    starts = chosen[:, 0].tolist()
    assert len(set(starts)) == num_samples
    assert all(start % 8 == 0 for start in starts)
    assert torch.equal(chosen, torch.tensor(starts)[:, None] + torch.arange(8))


def test_another_seed_chooses_other_windows_and_more_samples_keep_the_first() -> None:
    tokens = torch.arange(1000)
    few = sample_windows(tokens, num_samples=5, seqlen=8, seed=0)
    assert not torch.equal(few, sample_windows(tokens, num_samples=5, seqlen=8, seed=1))
    assert torch.equal(few, sample_windows(tokens, num_samples=50, seqlen=8, seed=0)[:5])


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (
            100,
            "c: 100 tokens make 3 windows of 32, and 4 are needed. Use a longer text, or ask for at most 3 samples.",
        ),
        (20, "c: 20 tokens make 0 windows of 32, and 4 are needed. Use a longer text, or a seqlen of at most 20."),
    ],
)
def test_too_little_calibration_text_gives_the_counts(length: int, message: str) -> None:
    with pytest.raises(DataError) as caught:
        sample_windows(torch.arange(length), num_samples=4, seqlen=32, seed=0, source="c")
    assert str(caught.value) == message


def test_the_hash_of_tokens_minds_values_order_and_shape() -> None:
    tokens = torch.arange(12)
    hashes = {hash_tokens(x) for x in (tokens, tokens.flip(0), tokens.view(3, 4), tokens.view(4, 3))}
    assert len(hashes) == 4
    assert hash_tokens(tokens.view(4, 3).T.contiguous().T) == hash_tokens(tokens.view(4, 3))
    assert hash_tokens(tokens.int()) == hash_tokens(tokens)
