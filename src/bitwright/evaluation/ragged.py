"""Run token sequences of many lengths through a model, one decoder block in memory at a time.

Sequences are padded on the right to one of a few widths: a causal model's earlier positions do not see later ones, and
few widths mean few shapes that blocks are called with. A model that quantizes inputs gets each sequence alone and
unpadded, because a scale per tensor would make one sequence's result depend on the others.

Legend: B sequences of a batch, T its width, D hidden size, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.model.activations import Activations, batch_slices
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress

SMALLEST_STEP = 8
WIDTHS_PER_OCTAVE = 4
PADDING = 0
"""Which token fills a row up changes nothing that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences that run together.

    Attributes:
        rows: which sequences.
        ids: their tokens [B, T], padded.
        offset: where the batch begins in the store of all hidden states, in tokens.
    """

    rows: tuple[int, ...]
    ids: Tensor
    offset: int


def plan_batches(sequences: Sequence[Sequence[int]], *, alone: bool) -> list[Batch]:
    """Put sequences of about one length together; each by itself and unpadded if `alone`."""
    by_width: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        by_width.setdefault(len(sequence) if alone else _width(len(sequence)), []).append(row)
    batches: list[Batch] = []
    offset = 0
    for width, members in sorted(by_width.items()):
        slices = [(i, i + 1) for i in range(len(members))] if alone else batch_slices(len(members), width)
        for start, end in slices:
            rows = tuple(members[start:end])
            ids = torch.full((len(rows), width), PADDING, dtype=torch.int64)
            for place, row in enumerate(rows):
                ids[place, : len(sequences[row])] = torch.tensor(sequences[row], dtype=torch.int64)
            batches.append(Batch(rows=rows, ids=ids, offset=offset))
            offset += ids.numel()
    return batches


class RaggedHidden:
    """The hidden states that leave the last block, batch by batch."""

    def __init__(self, store: Activations, device: torch.device) -> None:
        self._store, self._device = store, device

    def read(self, batch: Batch) -> Tensor:
        """The states [B, T, D] of a batch."""
        end = batch.offset + batch.ids.numel()
        return self._store.read(batch.offset, end, self._device).view(*batch.ids.shape, -1)

    def delete(self) -> None:
        """Remove the file."""
        self._store.delete()


def ragged_hidden(
    model: StreamedModel, batches: Sequence[Batch], path: Path, progress: Progress, label: str
) -> RaggedHidden:
    """Run batches through all blocks; hidden states are kept in the file `path`."""
    num_tokens = sum(batch.ids.numel() for batch in batches)
    store: Activations | None = None
    with model.outside():
        for batch in batches:
            hidden = model.enter(batch.ids)
            if store is None:
                store = Activations(path, (num_tokens, 1, hidden.shape[-1]), model.dtype)
            store.write(batch.offset, hidden)
    assert store is not None
    states = RaggedHidden(store, model.device)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            for batch in batches:
                store.write(batch.offset, model.run_block(block, index, states.read(batch)))
        progress(label, index + 1, model.num_blocks)
    return states


def position_logits(model: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits [P, V] at single positions; needs `outside()`.

    What a model does after its blocks it does to each position by itself, so only the wanted ones go through the head.

    Args:
        model: whose head.
        ids: [P] tokens at these positions.
        hidden: [P, D] states that left the last block there.
    """
    return model.leave(ids.unsqueeze(1), hidden.unsqueeze(1)).squeeze(1)


def _width(length: int) -> int:
    """The next of the widths that sequences are padded to; above 32 tokens at most a quarter is padding."""
    step = max(SMALLEST_STEP, (1 << (length.bit_length() - 1)) // WIDTHS_PER_OCTAVE)
    return -(-length // step) * step
