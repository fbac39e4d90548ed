"""From documents to token windows, by the one protocol behind every perplexity this project states.

Documents are joined with a blank line, tokenised once, with one beginning-of-sequence token if the tokenizer adds one;
windows do not overlap and a remainder shorter than a window is dropped. Tokenising each document or each window by
itself would add tokens that no running text has, and figures from the two protocols cannot be compared.

Legend: L tokens of the text, N windows, T tokens per window.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bitwright.errors import DataError

SEPARATOR = "\n\n"
PROBE = "a"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def bos_token_id(self) -> Any:
        """The id of the beginning-of-sequence token, or None."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Return a mapping with `input_ids`."""
        ...


def tokenise(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    """Return the token ids of the joined documents: [L] int64.

    A closing special token that some tokenizers add is left out: the text goes on.
    """
    ids = _ids(tokenizer, SEPARATOR.join(documents), special=False)
    if _adds_bos(tokenizer):
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor(ids, dtype=torch.int64)


def split_windows(tokens: Tensor, *, seqlen: int, source: str = "text") -> Tensor:
    """Cut tokens [L] into consecutive windows [N, T = seqlen] int64; a view.

    Raises:
        DataError: not even one window; gives both counts.
    """
    num_windows = len(tokens) // seqlen
    if num_windows == 0:
        raise DataError(
            f"{source}: {len(tokens)} tokens, fewer than one window of {seqlen}. Use a longer text or a seqlen of at "
            f"most {len(tokens)}."
        )
    return tokens[: num_windows * seqlen].view(num_windows, seqlen)


def sample_windows(tokens: Tensor, *, num_samples: int, seqlen: int, seed: int, source: str = "text") -> Tensor:
    """Choose distinct windows of tokens [L], non-overlapping, in seeded order: [num_samples, seqlen] int64.

    Raises:
        DataError: the text has fewer windows than asked for; gives the counts.
    """
    num_windows = len(tokens) // seqlen
    if num_windows < num_samples:
        remedy = f"ask for at most {num_windows} samples" if num_windows else f"a seqlen of at most {len(tokens)}"
        raise DataError(
            f"{source}: {len(tokens)} tokens make {num_windows} windows of {seqlen}, and {num_samples} are needed. Use "
            f"a longer text, or {remedy}."
        )
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed))
    return split_windows(tokens, seqlen=seqlen, source=source)[order[:num_samples]]


def hash_tokens(tokens: Tensor) -> str:
    """SHA-256 of token ids and their shape: what a calibration or an evaluation really read, in hexadecimal."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _adds_bos(tokenizer: Tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and _ids(tokenizer, PROBE, special=True)[0] == bos


def _ids(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
