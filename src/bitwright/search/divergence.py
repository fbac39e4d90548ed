"""KL divergence from the original with some sites quantized, at the price of the blocks from the first changed one on.

The hidden states that enter every block of the original are kept (`Prefix`), so that what comes before the first change
is never computed again. Several variants go through the rest of the model together: each block is loaded once for all.

Shapes: N windows, T tokens, D hidden size, V vocabulary, O out features, I in features.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.model.activations import Activations, batch_slices
from bitwright.model.products import Product, ReplacedProducts
from bitwright.model.sites import Site, storage_key, weight_view
from bitwright.numerics.inputs import InputQuantizer
from bitwright.numerics.metrics import kl_divergence
from bitwright.search.differentiable import DifferentiableModel, Prefix
from bitwright.search.rounding import fake_quantize_rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Change:
    """What is done to one site of a model.

    Attributes:
        site: which.
        block: index of its block.
        round_weight: dense weight [O, I] float32 -> what it becomes; None leaves it alone.
        inputs: rounds its inputs; None leaves them alone.
        outputs: rounds its outputs, as a cache of keys or values does; None leaves them alone.
    """

    site: Site
    block: int
    round_weight: Callable[[Tensor], Tensor] | None = None
    inputs: InputQuantizer | None = None
    outputs: InputQuantizer | None = None

    @contextmanager
    def applied(self, block: nn.Module, name: str) -> Generator[None, None, None]:
        """Change a block that is in memory; on leaving, its weight is what it was, bit for bit."""
        weight = weight_view(block, self.site, name)
        if self.round_weight is None:
            with ReplacedProducts({storage_key(weight): self._product(weight)}):
                yield
            return
        original = weight.clone()
        weight.copy_(self.round_weight(original.float()))
        try:
            yield
        finally:
            weight.copy_(original)

    def _product(self, weight: Tensor) -> Product:
        def product(x: Tensor, added: Tensor | None) -> Tensor:
            x = x if self.inputs is None else fake_quantize_rows(self.inputs, x)
            out = functional.linear(x, weight)
            out = out if added is None else out + added
            return out if self.outputs is None else fake_quantize_rows(self.outputs, out)

        return product


Variant = Sequence[Change]
"""All that is changed at once."""


class DivergenceBench:
    """Measures variants of a model against the original.

    Args:
        model: the original.
        prefix: what its forward pass left.
        num_windows: measure on the first windows of it.
        work: folder for the hidden states of variants.
    """

    def __init__(self, model: DifferentiableModel, prefix: Prefix, num_windows: int, work: Path) -> None:
        self._model, self._prefix, self._work = model, prefix, work
        self._windows = prefix.windows[:num_windows]

    def measure(self, variants: Sequence[Variant]) -> list[float]:
        """Return KL(original ‖ variant) of each variant, the mean over predicted tokens, in nats."""
        firsts = [min((change.block for change in variant), default=self._model.num_blocks) for variant in variants]
        stores = [
            self._store(number) if firsts[number] < self._model.num_blocks else None for number in range(len(variants))
        ]
        for index in range(min(firsts, default=0), self._model.num_blocks):
            with self._model.block(index) as block:
                for variant, first, store in zip(variants, firsts, stores, strict=True):
                    if store is not None and first <= index:
                        source = self._prefix.entries[index] if first == index else store
                        self._run(block, index, variant, source, store)
        try:
            return self._divergences([store or self._prefix.entries[-1] for store in stores])
        finally:
            for store in stores:
                if store is not None:
                    store.delete()

    def _store(self, number: int) -> Activations:
        _, seqlen, width = self._prefix.entries[0].shape
        shape = (self._windows.shape[0], seqlen, width)
        return Activations(self._work / f"variant-{number}.bin", shape, self._prefix.entries[0].dtype)

    def _run(self, block: nn.Module, index: int, variant: Variant, source: Activations, target: Activations) -> None:
        with ExitStack() as changes:
            for change in variant:
                if change.block == index:
                    changes.enter_context(change.applied(block, self._model.block_names[index]))
            for start, end in batch_slices(*target.shape[:2]):
                hidden = source.read(start, end, self._model.device)
                target.write(start, self._model.run_block(block, index, hidden))

    def _divergences(self, stores: Sequence[Activations]) -> list[float]:
        totals = [0.0] * len(stores)
        original, device = self._prefix.entries[-1], self._model.device
        with self._model.outside(), torch.no_grad():
            for window in range(self._windows.shape[0]):
                ids = self._windows[window : window + 1]
                expected = self._model.leave(ids, original.read(window, window + 1, device))[0, :-1]
                for number, store in enumerate(stores):
                    if store is not original:
                        logits = self._model.leave(ids, store.read(window, window + 1, device))[0, :-1]
                        totals[number] += float(kl_divergence(expected, logits).sum())
        return [total / (self._windows.shape[0] * (self._windows.shape[1] - 1)) for total in totals]
