"""The walk over the decoder blocks: load one, calibrate, quantize, write and free it, go on with what it now computes.

Streams of hidden states run through the model. `calibration` and `gate` see the quantized prefix, as the
finished model will; `reference` is the gate text through the original blocks. At the end gate against reference is the
loss of the whole model on text that no method has seen. A fourth, `teacher`, is the calibration text through the blocks
before they are quantized, for methods that ask for it. Each stream alternates between two files, and a block's shard,
statistics and hidden states are on disk before the journal counts it: a killed run goes on at the block where it
stopped and ends bit-identical.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitwright.calibration.collect import SiteStats
from bitwright.errors import VerificationError
from bitwright.evaluation.streamed import enter_all
from bitwright.exporters.model_writer import ModelWriter, reread_equals
from bitwright.group_solver import GroupSolver, SiteResult
from bitwright.methods.composition import needs_of_site
from bitwright.methods.gatherer import Gatherer
from bitwright.methods.solvers import SOLVERS, Need
from bitwright.methods.stage import BlockStage
from bitwright.methods.transforms import TRANSFORMS
from bitwright.model.activations import Activations, batch_slices
from bitwright.model.probe import propose, prove
from bitwright.model.replay import Replay
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.numerics.inputs import QuantizedSite
from bitwright.progress import Progress
from bitwright.recipe import Plan, Recipe
from bitwright.records import write_json_atomic
from bitwright.runs import RunDirectory
from bitwright.train.given_sites import GivenSites

Visit = Callable[[int, Mapping[str, Activations]], None]
FISHER = "fisher.safetensors"
GUIDED = "guided.safetensors"


def needs_of(plan: Plan) -> frozenset[Need]:
    """What the methods of a plan must be given."""
    return frozenset(need for entry in plan.sites.values() for need in needs_of_site(entry))


def needs_teacher(needs: frozenset[Need]) -> bool:
    """Whether the calibration text must also go through the unquantized blocks."""
    return bool(needs & {"teacher", "cross"})


def needs_gradients(method: str | None) -> bool:
    """Whether a method weighs tokens by the gradients of the end loss."""
    return method is not None and "guided" in SOLVERS[method].needs


class Walk:
    """Quantizes a model block by block into a run directory. Shapes: N windows, T tokens, D hidden size.

    Args:
        model: what is quantized.
        run: where to.
        recipe: the user's wishes.
        plan: what becomes of each site.
        layouts: how each quantized site is stored.
        calibration: [N, T] tokens.
        gate: [K, T] tokens.
        progress: called with (what, done, total).
        original: what the result is compared with, where a transform has made another model of it.
        frame: [D, D]: hidden states of `model` are those of `original` times it; None if they are equal.
        given: sites whose codes training has found.
    """

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
        *,
        original: StreamedModel | None = None,
        frame: Tensor | None = None,
        given: GivenSites | None = None,
    ) -> None:
        self.model, self.run, self.recipe, self.plan = model, run, recipe, plan
        self.original, self.frame = original or model, frame
        self.progress = progress
        self.needs = needs_of(plan)
        self.texts = {"calibration": calibration, "gate": gate, "reference": gate}
        if needs_teacher(self.needs):
            self.texts["teacher"] = calibration
        if calibration.shape[0] == 0:
            del self.texts["calibration"]
        self._proofs: dict[str, BlockStructure] = {}
        self._checking_s = 0.0
        self.resumed_blocks = int(run.journal().get("completed_blocks", 0))
        self.solver = GroupSolver(model.skeleton, recipe, plan, run.work / FISHER, given)
        self.gatherer = Gatherer(recipe, plan, run.work / GUIDED)
        self.writer = ModelWriter(model.skeleton, run.model, model.num_blocks + 1, layouts)

    def execute(self, visit: Visit | None = None) -> tuple[Activations, Activations]:
        """Quantize every block not yet done; return the gate's and the reference's last hidden states.

        Args:
            visit: called with the index of every block and what enters it, before it is quantized.
        """
        done = self.resumed_blocks
        self.progress("quantize", done, self.model.num_blocks)
        streams = self._enter() if done == 0 else self._reopen(done)
        for index in range(done, self.model.num_blocks):
            if visit is not None:
                visit(index, streams)
            streams = self._block(index, streams)
            self.run.commit({"completed_blocks": index + 1})
            self.progress("quantize", index + 1, self.model.num_blocks)
        return streams["gate"], streams["reference"]

    def _stream_path(self, stream: str, index: int) -> Any:
        return self.run.work / f"{stream}-{index % 2}.bin"

    def _enter(self) -> dict[str, Activations]:
        return {
            stream: enter_all(self._model_of(stream), ids, self._stream_path(stream, 0))
            for stream, ids in self.texts.items()
        }

    def _model_of(self, stream: str) -> StreamedModel:
        return self.original if stream == "reference" else self.model

    def _reopen(self, done: int) -> dict[str, Activations]:
        """Reopen the streams where the journal left them, after learning again how the blocks are called."""
        width = 0
        for stream, ids in self.texts.items():
            model = self._model_of(stream)
            with model.outside():
                for start, end in {end - start: (start, end) for start, end in batch_slices(*ids.shape)}.values():
                    width = model.enter(ids[start:end]).shape[-1]
        return {
            stream: Activations(
                self._stream_path(stream, done), (*cast(tuple[int, int], tuple(ids.shape)), width), self.model.dtype
            )
            for stream, ids in self.texts.items()
        }

    def _block(self, index: int, streams: dict[str, Activations]) -> dict[str, Activations]:
        start, self._checking_s = time.perf_counter(), 0.0
        name = self.model.block_names[index]
        following = {
            stream: Activations(self._stream_path(stream, index + 1), store.shape, store.dtype)
            for stream, store in streams.items()
        }
        if self.original is not self.model:
            with self.original.block(index) as block:
                self._check(self.original, block, index, streams["reference"], following["reference"])
        with self.model.block(index) as block:
            if self.original is self.model:
                self._check(self.model, block, index, streams["reference"], following["reference"])
            stage, results, details, moments = self.quantize_block(block, index, streams, following)
            self._check(self.model, block, index, streams["gate"], following["gate"])
            if "calibration" in streams and index + 1 < self.model.num_blocks:
                source, target = streams["calibration"], following["calibration"]
                self._propagate(self.model, block, index, source, target, stage.replay)
                if stage.teacher is not None and "teacher" not in self.needs:
                    source, target = streams["teacher"], following["teacher"]
                    self._propagate(self.model, stage.teacher, index, source, target, stage.teacher_replay)
            written = self.writer.write_shard(
                index, self.model.skeleton.stored_names(name), results, self._edited(stage)
            )
        self._check_shard(index, written)
        for store in following.values():
            store.sync()
        self._write_details(stage, details, moments, following, time.perf_counter() - start)
        return following

    def quantize_block(
        self, block: nn.Module, index: int, streams: dict[str, Activations], following: dict[str, Activations]
    ) -> tuple[BlockStage, dict[Site, QuantizedSite], list[SiteResult], dict[str, Tensor]]:
        """Transform a block in memory and put codes in the place of its weights; nothing is written.

        Args:
            block: in memory; changed.
            index: which.
            streams: hidden states that enter it: `gate`, and `calibration` and `teacher` where methods need them.
            following: `teacher` is filled where methods need what the unquantized block puts out.
        Returns:
            the stage, what became of each site and how, and E[x²] of the leader of each group.
        """
        stage = self._stage(block, index, self.model.block_names[index], streams, following)
        results: dict[Site, QuantizedSite] = {}
        details: list[SiteResult] = []
        moments: dict[str, Tensor] = {}
        for site, result, detail in self._solve(stage, moments):
            results[site] = result
            self.model.run_on_codes(block, site, stage.name, result)
            details.append(detail)
        return stage, results, details, moments

    def _stage(
        self,
        block: nn.Module,
        index: int,
        name: str,
        streams: dict[str, Activations],
        following: dict[str, Activations],
    ) -> BlockStage:
        """Find the block's structure, apply the transforms, and let the teacher see the calibration text."""
        first = next(self._batches(block, index, streams["gate"]))
        structure = propose(block, name, lambda: cast(Tensor, first()))
        if self.recipe.transforms:
            if structure.signature not in self._proofs:
                generator = torch.Generator().manual_seed(self.recipe.calibration.seed)
                self._proofs[structure.signature] = prove(
                    block, name, lambda: cast(Tensor, first()), structure, generator
                )
            structure = structure.with_proof_of(self._proofs[structure.signature])
        stage = BlockStage(
            model=self.model, index=index, name=name, block=block, structure=structure, plan=self.plan,
            recipe=self.recipe, fake_quantize=self.solver.fake_quantize,
            input_quantizer=self.solver.input_quantizer, probe=lambda: cast(Tensor, first()),
            inputs=streams.get("calibration"), progress=self.progress,
        )  # fmt: skip
        for transform in self.recipe.transforms:
            apply = TRANSFORMS[transform].apply
            if apply is not None:
                apply(stage)
        if "teacher" in streams:
            stage.teacher_inputs = streams["teacher"]
            if "teacher" in self.needs:
                self._propagate(self.model, block, index, streams["teacher"], following["teacher"])
                stage.targets = following["teacher"]
            if "cross" in self.needs:
                stage.teacher = deepcopy(block)
        methods = {entry.method for site in stage.sites if (entry := self.plan.sites[site]).method is not None}
        # Methods that solve the whole block come last: until then nothing that reads their sites is finished.
        if stage.inputs is not None and all(SOLVERS[method].solve_block is None for method in methods):
            count = stage.inputs.shape[0]
            # An accelerator computes a product sooner than a disk gives its input back.
            on_cpu = self.model.device.type == "cpu"
            replay_of = partial(
                Replay, prefix=stage.name, sites=structure.sites, folder=self.run.work, num_windows=count,
                keep_inputs=on_cpu,
            )  # fmt: skip
            stage.replay = replay_of(block)
            stage.teacher_replay = None if stage.teacher is None else replay_of(stage.teacher, file="teacher-replay")
            stage.finish(site for site in stage.sites if stage.planned(site) is None)
        return stage

    def _solve(self, stage: BlockStage, moments: dict[str, Tensor]) -> Iterator[tuple[Site, QuantizedSite, SiteResult]]:
        """Quantize the sites in the order of their use, then those whose methods work on the whole block."""
        together: dict[str, SiteStats] = {}
        sites = stage.sites
        for groups in self.gatherer.passes(stage.structure):
            stats = self.gatherer.collect(stage, groups)
            for group in groups:
                mean_square = stats[group[0]].mean_square
                if mean_square is not None:
                    moments[group[0]] = mean_square.cpu()
                waiting = {name for name in group if self.gatherer.solver(name).solve_block is not None}
                together.update({name: stats[name] for name in waiting})
                members = [sites[name] for name in group if name not in waiting]
                yield from self.solver.solve(stage, members, stats[group[0]])
            stage.finish(name for group in groups for name in group)
        yield from self.solver.solve_block(stage, [sites[name] for name in together], together)

    def _edited(self, stage: BlockStage) -> dict[str, Tensor]:
        """The stored tensors that transforms have changed."""
        edited: dict[str, Tensor] = {}
        for parameter in sorted(stage.edited):
            value = stage.block.get_parameter(stage.local(parameter)).detach()
            edited.update(self.model.skeleton.stored_tensors(parameter, value))
        return edited

    def _batches(self, block: nn.Module, index: int, store: Activations | None) -> Iterator[Callable[[], object]]:
        if store is None:
            return
        for start, end in batch_slices(store.shape[0], store.shape[1]):
            hidden = store.read(start, end, self.model.device)
            yield partial(self.model.run_block, block, index, hidden)

    def _check(
        self, model: StreamedModel, block: nn.Module, index: int, source: Activations, target: Activations
    ) -> None:
        """Run the gate's text through a block; this time is not the methods'."""
        start = time.perf_counter()
        self._propagate(model, block, index, source, target)
        self._checking_s += time.perf_counter() - start

    def _propagate(
        self,
        model: StreamedModel,
        block: nn.Module,
        index: int,
        source: Activations,
        target: Activations,
        replay: Replay | None = None,
    ) -> None:
        for start, end in batch_slices(source.shape[0], source.shape[1]):
            with nullcontext() if replay is None else replay.batch(start):
                hidden = model.run_block(block, index, source.read(start, end, model.device))
            if not bool(torch.isfinite(hidden).all()):
                raise VerificationError(
                    f"{model.block_names[index]}: its output is not finite after quantization. "
                    "Use more bits or smaller groups for this block, or a wider --dtype."
                )
            target.write(start, hidden)

    def _check_shard(self, index: int, written: dict[str, Tensor]) -> None:
        shard = self.writer.shard_path(index)
        different = reread_equals(shard, written)
        if different:
            raise VerificationError(
                f"{shard}: {different[0]} reads back differently than it was written. Check the disk."
            )

    def _write_details(
        self,
        stage: BlockStage,
        details: list[SiteResult],
        moments: dict[str, Tensor],
        streams: dict[str, Activations],
        seconds: float,
    ) -> None:
        save_tensors_atomic(self.run.work / f"stats-{stage.index:05d}.safetensors", moments)
        entry = {
            "block": stage.name,
            "seconds": seconds,
            "checking_seconds": self._checking_s,
            "hidden_sqnr_db": self._hidden_sqnr_db(streams),
            "sites": [asdict(detail) for detail in details],
            "transforms": stage.notes,
            "structure": asdict(stage.structure),
        }
        write_json_atomic(self.run.work / f"block-{stage.index:05d}.json", entry)

    def _hidden_sqnr_db(self, streams: dict[str, Activations]) -> float | None:
        """Signal to noise of the hidden state after the block, on the gate text; None where they are equal."""
        signal = noise = 0.0
        gate, reference = streams["gate"], streams["reference"]
        for start in range(len(gate)):
            expected = reference.read(start, start + 1, torch.device("cpu")).double()
            if self.frame is not None:
                expected = expected @ self.frame.double()
            signal += float(expected.square().sum())
            noise += float((gate.read(start, start + 1, torch.device("cpu")).double() - expected).square().sum())
        return _finite(10 * math.log10(signal / noise)) if signal > 0 and noise > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
