"""The walk over the decoder blocks: load one, calibrate, quantize, write and free it, go on with what it now computes.

Three streams of hidden states run through the model. `calibration` and `gate` see the quantized prefix, as the
finished model will; `reference` is the gate text through the original blocks. At the end gate against reference is the
loss of the whole model on text that no method has seen. Each stream alternates between two files, and a block's shard,
statistics and hidden states are on disk before the journal counts it: a killed run goes on at the block where it
stopped and ends bit-identical.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitwright.calibration.collect import SiteStats, collect
from bitwright.errors import VerificationError
from bitwright.evaluation.streamed import batch_slices, enter_all
from bitwright.exporters.model_writer import ModelWriter, reread_equals
from bitwright.group_solver import GroupSolver, SiteResult
from bitwright.methods.solvers import SOLVERS
from bitwright.model.activations import Activations
from bitwright.model.probe import propose
from bitwright.model.sites import Site, block_sites
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import collection_passes
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.numerics.inputs import QuantizedSite
from bitwright.progress import Progress
from bitwright.recipe import Plan, Recipe
from bitwright.records import write_json_atomic
from bitwright.runs import RunDirectory
from bitwright.schemes import ActivationScheme

FISHER = "fisher.safetensors"
STATISTICS_BYTES = 1_000_000_000
"""Memory that the Hessians collected in one pass over a block may take; more sites than fit take more passes."""


class Walk:
    """Quantizes a model block by block into a run directory. Shapes: N windows, T tokens, D hidden size."""

    def __init__(
        self,
        model: StreamedModel,
        run: RunDirectory,
        recipe: Recipe,
        plan: Plan,
        layouts: Mapping[str, str],
        calibration: Tensor,
        gate: Tensor,
        progress: Progress,
    ) -> None:
        self.model, self.run, self.recipe, self.plan = model, run, recipe, plan
        self.progress = progress
        self.texts = {"calibration": calibration, "gate": gate, "reference": gate}
        if calibration.shape[0] == 0:
            del self.texts["calibration"]
        self.resumed_blocks = int(run.journal().get("completed_blocks", 0))
        self.solver = GroupSolver(model.skeleton, recipe, plan, run.work / FISHER)
        self.writer = ModelWriter(model.skeleton, run.model, model.num_blocks + 1, layouts)

    def execute(self) -> tuple[Activations, Activations]:
        """Quantize every block not yet done; return the gate's and the reference's last hidden states."""
        done = self.resumed_blocks
        self.progress("quantize", done, self.model.num_blocks)
        streams = self._enter() if done == 0 else self._reopen(done)
        for index in range(done, self.model.num_blocks):
            streams = self._block(index, streams)
            self.run.commit({"completed_blocks": index + 1})
            self.progress("quantize", index + 1, self.model.num_blocks)
        return streams["gate"], streams["reference"]

    def _stream_path(self, stream: str, index: int) -> Any:
        return self.run.work / f"{stream}-{index % 2}.bin"

    def _enter(self) -> dict[str, Activations]:
        return {stream: enter_all(self.model, ids, self._stream_path(stream, 0)) for stream, ids in self.texts.items()}

    def _reopen(self, done: int) -> dict[str, Activations]:
        """Reopen the streams where the journal left them, after learning again how the blocks are called."""
        width = 0
        with self.model.outside():
            for ids in self.texts.values():
                for start, end in {end - start: (start, end) for start, end in batch_slices(*ids.shape)}.values():
                    width = self.model.enter(ids[start:end]).shape[-1]
        return {
            stream: Activations(
                self._stream_path(stream, done), (*cast(tuple[int, int], tuple(ids.shape)), width), self.model.dtype
            )
            for stream, ids in self.texts.items()
        }

    def _block(self, index: int, streams: dict[str, Activations]) -> dict[str, Activations]:
        start = time.perf_counter()
        name = self.model.block_names[index]
        following = {
            stream: Activations(self._stream_path(stream, index + 1), store.shape, store.dtype)
            for stream, store in streams.items()
        }
        with self.model.block(index) as block:
            sites = block_sites(block, name)
            first = next(self._batches(block, index, streams["gate"]))
            structure = propose(block, name, lambda: cast(Tensor, first()))
            self._propagate(block, index, streams["reference"], following["reference"])
            results: dict[Site, QuantizedSite] = {}
            details: list[SiteResult] = []
            moments: dict[str, Tensor] = {}
            for groups in self._passes(collection_passes(structure), sites):
                run_batches = partial(self._batches, block, index, streams.get("calibration"))
                stats = self._collect(block, sites, groups, run_batches)
                for group in groups:
                    members = [site for site in sites if site.name in group]
                    for site, result, detail in self.solver.solve(block, name, members, stats[group[0]]):
                        results[site] = result
                        self.model.run_on_codes(block, site, name, result)
                        details.append(detail)
                    mean_square = stats[group[0]].mean_square
                    if mean_square is not None:
                        moments[group[0]] = mean_square.cpu()
            is_last = index + 1 == self.model.num_blocks
            for stream in ("gate",) if is_last else tuple(set(streams) - {"reference"}):
                self._propagate(block, index, streams[stream], following[stream])
            written = self.writer.write_shard(index, self.model.skeleton.stored_names(name), results)
        self._check_shard(index, written)
        for store in following.values():
            store.sync()
        self._write_details(index, name, details, moments, asdict(structure), following, time.perf_counter() - start)
        return following

    def _batches(self, block: nn.Module, index: int, store: Activations | None) -> Iterator[Callable[[], object]]:
        if store is None:
            return
        for start, end in batch_slices(store.shape[0], store.shape[1]):
            hidden = store.read(start, end, self.model.device)
            yield partial(self.model.run_block, block, index, hidden)

    def _propagate(self, block: nn.Module, index: int, source: Activations, target: Activations) -> None:
        for start, end in batch_slices(source.shape[0], source.shape[1]):
            hidden = self.model.run_block(block, index, source.read(start, end, self.model.device))
            if not bool(torch.isfinite(hidden).all()):
                raise VerificationError(
                    f"{self.model.block_names[index]}: its output is not finite after quantization. "
                    "Use more bits or smaller groups for this block, or a wider --dtype."
                )
            target.write(start, hidden)

    def _passes(self, steps: list[tuple[tuple[str, ...], ...]], sites: list[Site]) -> Iterator[list[tuple[str, ...]]]:
        """Cut each sub-step into passes whose Hessians fit the memory limit; keep only sites that are quantized."""
        width = {site.name: site.in_features for site in sites}
        for groups in steps:
            batch: list[tuple[str, ...]] = []
            used = 0
            for group in groups:
                wanted = tuple(name for name in group if self.plan.sites[name].scheme is not None)
                if not wanted:
                    continue
                needed = 8 * width[wanted[0]] ** 2
                if batch and used + needed > STATISTICS_BYTES:
                    yield batch
                    batch, used = [], 0
                batch.append(wanted)
                used += needed
            if batch:
                yield batch

    def _collect(
        self,
        block: nn.Module,
        sites: list[Site],
        groups: list[tuple[str, ...]],
        run_batches: Callable[[], Iterable[Any]],
    ) -> dict[str, SiteStats]:
        if "calibration" not in self.texts:
            return {name: SiteStats() for group in groups for name in group}
        methods = {self.plan.sites[name].method for group in groups for name in group}
        with_gram = any(SOLVERS[method].needs_hessian for method in methods if method is not None)
        return collect(block, sites, groups, run_batches, with_gram=with_gram, calibrated=self._calibrated(groups))

    def _calibrated(self, groups: list[tuple[str, ...]]) -> dict[str, ActivationScheme]:
        """Sites whose inputs are quantized with scales from calibration."""
        schemes = {name: self.plan.sites[name].scheme for group in groups for name in group}
        return {
            name: scheme.activations
            for name, scheme in schemes.items()
            if scheme is not None and scheme.activations is not None and scheme.activations.observer is not None
        }

    def _check_shard(self, index: int, written: dict[str, Tensor]) -> None:
        shard = self.writer.shard_path(index)
        different = reread_equals(shard, written)
        if different:
            raise VerificationError(
                f"{shard}: {different[0]} reads back differently than it was written. Check the disk."
            )

    def _write_details(
        self,
        index: int,
        name: str,
        details: list[SiteResult],
        moments: dict[str, Tensor],
        structure: dict[str, Any],
        streams: dict[str, Activations],
        seconds: float,
    ) -> None:
        error = self._hidden_sqnr_db(streams)
        save_tensors_atomic(self.run.work / f"stats-{index:05d}.safetensors", moments)
        entry = {
            "block": name,
            "seconds": seconds,
            "hidden_sqnr_db": error,
            "sites": [asdict(detail) for detail in details],
            "structure": structure,
        }
        write_json_atomic(self.run.work / f"block-{index:05d}.json", entry)

    def _hidden_sqnr_db(self, streams: dict[str, Activations]) -> float | None:
        """Signal to noise of the hidden state after the block, on the gate text; None where they are equal."""
        signal = noise = 0.0
        gate, reference = streams["gate"], streams["reference"]
        for start in range(len(gate)):
            expected = reference.read(start, start + 1, torch.device("cpu")).double()
            signal += float(expected.square().sum())
            noise += float((gate.read(start, start + 1, torch.device("cpu")).double() - expected).square().sum())
        return _finite(10 * math.log10(signal / noise)) if signal > 0 and noise > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
