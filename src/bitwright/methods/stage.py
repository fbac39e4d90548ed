"""One decoder block at work: what transforms, block solvers and repairs may read of it and change in it.

The walk makes a stage for every block it has loaded. Transforms come first: they scale edges (`fold`), or leave a
change of a site's inputs (`input_transforms`) or columns that stay floats (`float_columns`); the block computes what it
did before, and its weights stay those for inputs as the model has them. Then solvers choose codes.

Legend: N windows, B of them in a batch, T tokens, D hidden size, O out features, I in features, S channels of an edge.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.calibration.collect import SiteStats, Teacher, collect
from bitwright.model.activations import Activations, batch_slices
from bitwright.model.edits import named_tensors, num_channels, replace_tensors, scale_edge
from bitwright.model.replay import Replay
from bitwright.model.sites import Site, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure, Edge
from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.inputs import FloatColumns, InputQuantizer, InputTransform
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.ranges import RangeMethod
from bitwright.progress import Progress, no_progress
from bitwright.recipe import Plan, Recipe, SitePlan
from bitwright.schemes import ActivationScheme


class FakeQuantize(Protocol):
    """Rounds a weight as the plan of a site says, to the nearest code."""

    def __call__(
        self, site: Site, weight: Tensor, mean_square: Tensor | None, *, method: RangeMethod | None = None
    ) -> Tensor:
        """Return the dense values [O, I] that `weight` [O, I] is rounded to.

        Args:
            site: whose scheme and range method apply.
            weight: float32.
            mean_square: [I] E[x²] of the inputs, for importance-weighted ranges; None for plain ones.
            method: of choosing ranges, in place of the recipe's: a quick one for those that round very often. It minds
                `mean_square`.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockTask:
    """A site that a block solver is to quantize: start from `grid`, end with codes and a grid of the same kind.

    Attributes:
        site: whose weight it is.
        weight: [O, I] float32, what is to be coded: for transformed inputs, 0 in columns that stay floats.
        grid: fitted to the weight, importance-weighted where the recipe says so.
        stats: of the inputs, transformed.
        inputs: how inputs become codes at inference; None where they stay floats.
        columns: columns that stay floats.
    """

    site: Site
    weight: Tensor
    grid: AnyGrid
    stats: SiteStats
    inputs: InputQuantizer | None = None
    columns: FloatColumns | None = None


@dataclass(slots=True, eq=False)
class BlockStage:
    """One block in memory, before and while it is quantized.

    Attributes:
        model: knows how the block is called.
        index: which block.
        name: its name in the full model.
        block: its modules; weights are float and for inputs as the model has them.
        structure: sites, groups and proven edges.
        plan: what is to become of each site.
        recipe: the user's wishes, with every method's options.
        fake_quantize: what rounding to nearest makes of a weight.
        input_quantizer: how the inputs of a site become codes, calibrated on these statistics; None if they do not.
        probe: runs the block as it is now on a few windows of text that no method sees: [B, T, D].
        inputs: [N, T, D] hidden states of the calibration text that enter the block, through the quantized prefix;
            None without calibration text.
        targets: [N, T, D] what the unquantized block makes of the unquantized prefix; None unless a method needs it.
        teacher: the block as the transforms left it, unquantized; None unless a method needs it.
        teacher_inputs: [N, T, D] what enters the teacher; None likewise.
        replay: outputs of parts that are finished, for `collect`; None while everything may still change.
        teacher_replay: the same of the teacher, which finishes what is not asked for any more.
        input_transforms: site -> what happens to its inputs before they are quantized.
        float_columns: site -> [k] int64, columns that stay floats.
        edited: full names of the parameters that transforms have changed.
        notes: what each transform did, for the records.
        progress: called with (what, done, total); a block that takes minutes has a bar of its own.
    """

    model: StreamedModel
    index: int
    name: str
    block: nn.Module
    structure: BlockStructure
    plan: Plan
    recipe: Recipe
    fake_quantize: FakeQuantize
    input_quantizer: Callable[[Site, SiteStats], InputQuantizer | None]
    probe: Callable[[], Tensor]
    inputs: Activations | None = None
    targets: Activations | None = None
    teacher: nn.Module | None = None
    teacher_inputs: Activations | None = None
    replay: Replay | None = None
    teacher_replay: Replay | None = None
    input_transforms: dict[str, InputTransform] = field(default_factory=dict[str, InputTransform])
    float_columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    edited: set[str] = field(default_factory=set[str])
    notes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    progress: Progress = no_progress

    @property
    def sites(self) -> dict[str, Site]:
        """Every site of the block, by name."""
        return {site.name: site for site in self.structure.sites}

    def planned(self, site: str) -> SitePlan | None:
        """What is to become of a site; None if it is kept in 16 bit."""
        entry = self.plan.sites[site]
        return None if entry.scheme is None else entry

    def weight(self, site: Site) -> Tensor:
        """Return the weight [O, I] of a site, float32, a copy."""
        return weight_view(self.block, site, self.name).to(torch.float32, copy=True)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Random numbers of this block alone, so that a resumed run draws the same."""
        seed = self.recipe.calibration.seed * 1_000_003 + 1009 * self.index + salt
        return torch.Generator().manual_seed(seed)

    def batches(self) -> list[tuple[int, int]]:
        """Cut the calibration windows into batches: (first window, end window)."""
        return [] if self.inputs is None else batch_slices(self.inputs.shape[0], self.inputs.shape[1])

    def hidden(self, start: int, end: int) -> Tensor:
        """Return the calibration hidden states [B, T, D] that enter the block, on the device."""
        assert self.inputs is not None
        return self.inputs.read(start, end, self.model.device)

    def target(self, start: int, end: int) -> Tensor:
        """Return what the unquantized model makes of the same windows here: [B, T, D]."""
        assert self.targets is not None
        return self.targets.read(start, end, self.model.device)

    def run_batches(self) -> Iterator[Callable[[], Tensor]]:
        """Yield one call per batch, which runs the block as it is now on the calibration text."""
        for start, end in self.batches():
            yield partial(self.model.run_block, self.block, self.index, self.hidden(start, end))

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the block with gradients; `weights` are parameters by their names inside the block, to use instead."""
        return self.model.call_block(self.block, self.index, hidden, weights)

    def local(self, parameter: str) -> str:
        """The name of a parameter inside the block."""
        return parameter[len(self.name) + 1 :]

    def collect(
        self,
        groups: Iterable[tuple[str, ...]],
        *,
        with_gram: bool,
        calibrated: Mapping[str, ActivationScheme] | None = None,
        quantizers: Mapping[str, InputQuantizer] | None = None,
        with_cross: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, SiteStats]:
        """Run the block over the calibration text and return statistics per site, of transformed inputs.

        Args:
            groups: sites that read the same input.
            with_gram: also Σ x xᵀ.
            calibrated: sites whose inputs are observed for calibrated scales, and which.
            quantizers: what the inputs of a site are rounded to.
            with_cross: also how the inputs of the unquantized model differ; needs the teacher.
            weights: site -> [C, N·T], what tokens count in its guided Hessians.
        """
        teacher = None
        if with_cross:
            assert self.teacher is not None
            teacher = Teacher(block=self.teacher, run_batches=self._run_teacher)
        return collect(
            self.block, list(self.structure.sites), groups, self._replay_batches, with_gram=with_gram,
            calibrated=calibrated, transforms=self.input_transforms, float_columns=self.float_columns,
            quantizers=quantizers, teacher=teacher, weights=weights,
        )  # fmt: skip

    def finish(self, sites: Iterable[str]) -> None:
        """Say that the weights of these sites will not change any more and that their inputs are not asked for."""
        names = list(sites)
        for replay in (self.replay, self.teacher_replay):
            if replay is not None:
                replay.finish(names)

    def _replay_batches(self) -> Iterator[Callable[[], Tensor]]:
        """Like `run_batches`; finished parts of the block, if any, need not run again."""
        for start, end in self.batches():
            yield partial(self._run_replayed, self.block, self.replay, start, self.hidden(start, end))

    def _run_replayed(self, block: nn.Module, replay: Replay | None, start: int, hidden: Tensor) -> Tensor:
        with nullcontext() if replay is None else replay.batch(start):
            return self.model.run_block(block, self.index, hidden)

    def _run_teacher(self) -> Iterator[Callable[[], Tensor]]:
        """Yield one call per batch, which runs the unquantized block on what enters it in the unquantized model."""
        assert self.teacher is not None
        assert self.teacher_inputs is not None
        for start, end in self.batches():
            hidden = self.teacher_inputs.read(start, end, self.model.device)
            yield partial(self._run_replayed, self.teacher, self.teacher_replay, start, hidden)

    def fold(self, edge: Edge, scale: Tensor) -> None:
        """Multiply the producer's channels by `scale` [S] and divide the consumers' columns by it.

        A producer that stays in 16 bit is rounded to its stored dtype here, and the consumers take the scale that this
        really leaves, so that the function does not change by the rounding.

        Raises:
            ShapeError, VerificationError: see `scale_edge`.
        """
        scale = self._storable(edge, scale)
        changed = scale_edge(named_tensors(self.block, self.name), self.structure.sites, edge, scale)
        kept = {name for name in changed if not self._is_quantized(name)}
        for name in kept:
            dtype = self.model.skeleton.stored_dtype(name)
            changed[name] = changed[name].to(dtype).to(changed[name].dtype)
        replace_tensors(self.block, self.name, changed)
        self.edited |= changed.keys()

    def num_channels(self, edge: Edge) -> int:
        """S of an edge."""
        return num_channels(edge, self.structure.sites)

    def _is_quantized(self, parameter: str) -> bool:
        sites = [site for site in self.structure.sites if site.parameter == parameter]
        return bool(sites) and all(self.planned(site.name) is not None for site in sites)

    def _storable(self, edge: Edge, scale: Tensor) -> Tensor:
        """The scale that is left of `scale` when a norm has been rounded to its stored dtype."""
        if edge.kind == "linear":
            return scale
        weight = self.block.get_submodule(self.local(edge.producer)).get_parameter("weight").detach()
        wide = wide_dtype(weight.device)
        gain = weight.to(wide) + (1 if edge.kind == "norm_plus_one" else 0)
        stored = gain * scale.to(weight.device, wide) - (1 if edge.kind == "norm_plus_one" else 0)
        stored = stored.to(self.model.skeleton.stored_dtype(f"{edge.producer}.weight")).to(wide)
        left = (stored + (1 if edge.kind == "norm_plus_one" else 0)) / gain
        usable = torch.isfinite(left) & (left > 0)
        return torch.where(usable, left, torch.ones_like(left)).float()
