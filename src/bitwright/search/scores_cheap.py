"""Every score that takes one pass over the blocks: those of sums, and those that need gradients, all of them at once.

Blocks are visited one at a time, from the last to the first where gradients are needed. A visit rounds the weights of
its sites in every scheme, as many sites at once as fit, and runs the block again from the hidden states that the
forward pass left, forwards and backwards. Where every rank does a share, each goes the whole way back but rounds, and
weighs, only in the blocks that are its own.

Legend: N windows, T tokens, D hidden size, O out features, I in features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.calibration.collect import SiteStats, collect
from bitwright.model.activations import Activations, batch_slices
from bitwright.model.probe import propose
from bitwright.model.products import Product, ReplacedProducts
from bitwright.model.sites import Site, StorageKey, block_sites, storage_key, weight_view
from bitwright.search.differentiable import sampled_label_gradients
from bitwright.search.question import GRADIENT_SCORES, Question
from bitwright.search.score_cache import ScoreCache
from bitwright.search.scores_layer import InputTally, Tally, WeightTally, require_reached

PASS_BYTES = 2_000_000_000
"""Memory that rounded weights and Gram matrices of one pass over a block may take; more sites take more passes."""
GRAM_SCORES = ("output_sqnr", "hessian")


class CheapScores:
    """Finds some cheap scores of all sites.

    Args:
        question: what is asked.
        scores: names of cheap scores.
        traces: site -> trace of the loss's Hessian, where `trace` is among them.
    """

    def __init__(self, question: Question, scores: Sequence[str], traces: Mapping[str, float]) -> None:
        self.question, self.scores, self.traces = question, frozenset(scores), traces
        self._caches: dict[str, ScoreCache] = {score: question.cache(score) for score in scores}
        self._backwards = bool(self.scores & set(GRADIENT_SCORES))
        self._following: Activations | None = None  # gradients at the outputs of the block at hand

    def run(self) -> None:
        """Measure what is missing in this rank's share of the blocks."""
        pending = self._pending()
        if not pending:
            return
        question = self.question
        entries = question.prefix.entries
        if self._backwards:
            path = question.work / "gradient-last.bin"
            self._following = sampled_label_gradients(
                question.model, question.prefix, path, seed=question.seed, progress=question.progress
            )
        order = range(len(entries) - 2, min(pending) - 1, -1) if self._backwards else sorted(pending)
        for done, index in enumerate(order):
            with question.model.block(index) as block:
                self._visit(block, index, pending.get(index, []), is_last=index == min(pending))
            question.progress("scores", done + 1, len(order))

    def _pending(self) -> dict[int, list[Site]]:
        """Sites that lack a score, by their block; only this rank's blocks."""
        pending: dict[int, list[Site]] = {}
        for site in self.question.sites:
            index = self.question.block_of(site)
            names = self.question.names
            if self.question.share.has(index) and any(c.missing(site.name, names) for c in self._caches.values()):
                pending.setdefault(index, []).append(site)
        return pending

    def _visit(self, block: nn.Module, index: int, wanted: list[Site], *, is_last: bool) -> None:
        earlier: Activations | None = None
        for groups in self._passes(block, index, wanted):
            tallies = self._tallies(block, index, groups)
            if self._backwards or self.question.target == "inputs":
                earlier = self._run_rows(block, index, tallies)
            self._store(tallies)
        if self._backwards and earlier is None and not is_last:
            earlier = self._run_rows(block, index, {})
        if self._following is not None and earlier is not None:
            self._following.delete()
            self._following = earlier

    def _passes(self, block: nn.Module, index: int, wanted: list[Site]) -> Iterator[list[tuple[Site, ...]]]:
        """The wanted sites in groups that read one input, as many groups at a time as fit into memory."""
        if not wanted:
            return
        question = self.question
        hidden = question.prefix.entries[index].read(0, 1, question.model.device)
        name = question.model.block_names[index]
        structure = propose(block, name, lambda: question.model.run_block(block, index, hidden))
        by_name = {site.name: site for site in wanted}
        batch: list[tuple[Site, ...]] = []
        used = 0
        for group in structure.groups:
            members = tuple(by_name[name] for name in group.sites if name in by_name)
            if not members:
                continue
            matrices = sum(site.out_features * site.in_features for site in members) * (len(question.schemes) + 3)
            needed = 4 * matrices + 8 * members[0].in_features ** 2
            if batch and used + needed > PASS_BYTES:
                yield batch
                batch, used = [], 0
            batch.append(members)
            used += needed
        if batch:
            yield batch

    def _tallies(self, block: nn.Module, index: int, groups: list[tuple[Site, ...]]) -> dict[Site, Tally]:
        question = self.question
        name = question.model.block_names[index]
        members = [site for group in groups for site in group]
        weights = {site: weight_view(block, site, name).float() for site in members}
        if question.target == "inputs":
            return {site: InputTally(weight, question.quantizers) for site, weight in weights.items()}
        stats = self._collect(block, index, groups)
        tallies: dict[Site, Tally] = {}
        for site, weight in weights.items():
            require_reached(site.name, stats[site.name])
            mean_square = question.prefix.mean_squares[site.name]
            rounded = {scheme: question.rounder.round(site, scheme, weight, mean_square) for scheme in question.names}
            trace = self.traces.get(site.name)
            tallies[site] = WeightTally(weight, rounded, stats[site.name], trace, self.scores)
        return tallies

    def _collect(self, block: nn.Module, index: int, groups: list[tuple[Site, ...]]) -> dict[str, SiteStats]:
        question = self.question
        entry, name = question.prefix.entries[index], question.model.block_names[index]

        def batches() -> Iterable[Callable[[], object]]:
            for start, end in batch_slices(entry.shape[0], entry.shape[1]):
                hidden = entry.read(start, end, question.model.device)
                yield partial(question.model.run_block, block, index, hidden)

        return collect(
            block, block_sites(block, name), [tuple(site.name for site in group) for group in groups], batches,
            with_gram=bool(self.scores & set(GRAM_SCORES)),
        )  # fmt: skip

    def _run_rows(self, block: nn.Module, index: int, tallies: Mapping[Site, Tally]) -> Activations | None:
        """Run the block on every window, hand the rows of each site over; return the gradients at its input."""
        question = self.question
        model, entry = question.model, question.prefix.entries[index]
        products: dict[StorageKey, Product] = {}
        for site, tally in tallies.items():
            view = weight_view(block, site, model.block_names[index])
            products[storage_key(view)] = partial(_watched, view, tally)
        target = Activations(question.work / f"gradient-{index}.bin", entry.shape, entry.dtype)
        for window in range(len(entry)):
            hidden = entry.read(window, window + 1, model.device).requires_grad_(self._backwards)
            with torch.set_grad_enabled(self._backwards), ReplacedProducts(products):
                out = model.call_block(block, index, hidden)
            if self._following is not None:
                gradient = self._following.read(window, window + 1, model.device)
                target.write(window, torch.autograd.grad(out, hidden, gradient)[0])
            for tally in tallies.values():
                tally.end_window()
        if self._following is None:
            target.delete()
            return None
        return target

    def _store(self, tallies: Mapping[Site, Tally]) -> None:
        num_tokens = self.question.calibration.numel()
        for site, tally in tallies.items():
            for score, cache in self._caches.items():
                values = tally.values(score, num_tokens)
                cache.add(site.name, {scheme: values[scheme] for scheme in cache.missing(site.name, values)})


def _watched(weight: Tensor, tally: Tally, x: Tensor, added: Tensor | None) -> Tensor:
    """The product as it is, with its rows and their gradients handed over when these are known."""
    out = functional.linear(x, weight)
    out = out if added is None else out + added
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if not out.requires_grad:
        tally.add(rows, None)
        return out

    def on_gradient(gradient: Tensor) -> None:
        tally.add(rows, gradient.reshape(-1, gradient.shape[-1]).float())

    out.register_hook(on_gradient)
    return out
