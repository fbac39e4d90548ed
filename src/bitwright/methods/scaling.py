"""What methods share that scale the inputs of sites (AWQ, SmoothQuant): where, judged by what, and how it is folded.

Inputs x that several sites read may be divided by any s > 0 if the sites' columns are multiplied by it. Where a proven
edge says who produces x, the producer takes the division over and nothing is left to do at inference; elsewhere only
bitwright's own layout can divide, at run time. Which s is good is measured: the weights are rounded as the plan says,
inputs too where it quantizes them, and the squared error of some output is the loss.

    GramLoss     of each site, exact over all calibration tokens, for inputs that stay floats
    RowsLoss     of each site, on some tokens
    ParentLoss   of the module that the sites are parts of (attention for q, k, v), on some tokens

All scales are chosen before any is folded, so that everything was measured on one and the same block. Folding must not
change what the block computes, and that is measured too.

Shapes: T tokens, O out features, I in features, S channels of an edge.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.calibration.collect import SiteStats, observer_of
from bitwright.errors import VerificationError
from bitwright.methods.invariance import output_of
from bitwright.methods.stage import BlockStage
from bitwright.model.products import Product, ReplacedProducts
from bitwright.model.proof import in_float32
from bitwright.model.sites import Site, SiteCalls, storage_key, weight_view
from bitwright.model.structure import Edge
from bitwright.numerics.inputs import InputTransform
from bitwright.numerics.metrics import relative_error
from bitwright.numerics.ranges import quick

OBSERVED_BYTES = 1_000_000_000
"""Memory that may be taken by what is kept of one pass over the calibration text."""
ROUNDINGS = 128
"""Relative roundings by which folding may move a block's output; float32 products over thousands of channels stay
below."""
ROWS = 4096

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True, eq=False)
class Observed:
    """What was seen of the inputs that a group of sites shares.

    Attributes:
        stats: moments over all calibration tokens; with Gram matrix where it was asked for.
        peak: [I] max |x| over all calibration tokens.
        rows: [T, I] the inputs of the first tokens, where inputs will be quantized.
    """

    stats: SiteStats = field(default_factory=SiteStats)
    peak: Tensor | None = None
    rows: Tensor | None = None

    def add(self, x: Tensor, *, with_gram: bool, num_rows: int) -> None:
        """Add the inputs [..., I] of one call, and keep rows until there are `num_rows`."""
        self.stats.add(x, with_gram=with_gram)
        flat = x.reshape(-1, x.shape[-1]).float()
        if flat.shape[0]:
            peak = flat.abs().amax(0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        missing = num_rows - (0 if self.rows is None else self.rows.shape[0])
        if missing > 0:
            self.rows = flat[:missing].clone() if self.rows is None else torch.cat([self.rows, flat[:missing]])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScalableGroup:
    """Sites that are quantized and read the same inputs.

    Attributes:
        sites: those of the group that are quantized.
        is_whole: no other site reads the inputs.
        edge: who produces the inputs; None if that is not proven.
        channel: [I] which channel of the edge each column reads.
        seen: of the inputs.
    """

    sites: tuple[Site, ...]
    is_whole: bool
    edge: Edge | None
    channel: Tensor
    seen: Observed

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sites."""
        return tuple(site.name for site in self.sites)

    def per_channel(self, columns: Tensor, *, reduce: str) -> Tensor:
        """Gather values [I] of columns that share a channel: [S]; `reduce` is mean or amax."""
        if self.edge is None or self.edge.repeat == 1:
            return columns
        size = int(self.channel.max()) + 1
        result = torch.zeros(size, dtype=columns.dtype, device=columns.device)
        return result.scatter_reduce(0, self.channel.to(columns.device), columns, reduce, include_self=False)

    def per_column(self, channels: Tensor) -> Tensor:
        """Spread values [S] of channels over the columns: [I]."""
        return channels[self.channel.to(channels.device)]


class SitesLoss(Protocol):
    """How much quantization moves the outputs of sites, one by one."""

    def __call__(self, columns: Tensor | None) -> list[float]:
        """Return squared errors with weights W·s and inputs x/s quantized, s = `columns` [I]; None for s = 1."""
        ...


def scalable_groups(stage: BlockStage, *, explicit: bool = False) -> Iterator[list[ScalableGroup]]:
    """Observe the inputs of every group that a scale can be given to, some groups at a time, as memory allows.

    Args:
        stage: with calibration text.
        explicit: also groups without an edge.
    """
    batch: list[ScalableGroup] = []
    used = 0
    for group in _planned_groups(stage):
        if group.edge is None and not (explicit and group.is_whole):
            continue
        width = group.sites[0].in_features
        needed = 4 * ROWS * width if quantizes_inputs(stage, group.sites) else 8 * width**2
        if batch and used + needed > OBSERVED_BYTES:
            yield _observe(stage, batch)
            batch, used = [], 0
        batch.append(group)
        used += needed
    if batch:
        yield _observe(stage, batch)


def observe_planned(stage: BlockStage) -> list[ScalableGroup]:
    """Observe peaks and moments of the inputs of every group that is quantized and that some token reached."""
    return _observe(stage, list(_planned_groups(stage)), for_loss=False)


def quantizes_inputs(stage: BlockStage, sites: Iterable[Site]) -> bool:
    """Whether any of the sites computes on quantized inputs."""
    entries = [stage.planned(site.name) for site in sites]
    return any(entry is not None and entry.scheme is not None and entry.scheme.activations for entry in entries)


def fold_all(stage: BlockStage, chosen: list[tuple[ScalableGroup, Tensor]]) -> float:
    """Multiply weights by scales [S] and divide inputs by them; return how far that moved the block's output.

    Raises:
        VerificationError: further than rounding explains; or see `stage.fold`.
    """
    if not chosen:
        return 0.0
    before, explicit = output_of(stage), list[str]()
    for group, scale in chosen:
        if group.edge is not None:
            stage.fold(group.edge, 1 / scale)
            continue
        columns = group.per_column(scale)
        stage.input_transforms.update(dict.fromkeys(group.names, InputTransform(scale=columns)))
        explicit += group.names
    moved = relative_error(before, output_of(stage, explicit))
    bound = _bound(stage)
    if not moved <= bound:
        raise VerificationError(
            f"{stage.name}: scaling moved its output by {moved:.2g}; rounding explains {bound:.2g}. "
            "Leave the transform out for this model, and report it."
        )
    return moved


class GramLoss:
    """tr(ΔW G ΔWᵀ): the squared error of a site's outputs over all calibration tokens, for inputs that stay floats."""

    def __init__(self, stage: BlockStage, group: ScalableGroup) -> None:
        self._stage, self._group = stage, group
        assert group.seen.stats.gram is not None
        self._gram = group.seen.stats.gram.float()
        self._weights = [stage.weight(site) for site in group.sites]

    def __call__(self, columns: Tensor | None) -> list[float]:
        """See `SitesLoss`."""
        errors = [
            rounded_weight(self._stage, self._group, site, weight, columns).sub_(weight)
            for site, weight in zip(self._group.sites, self._weights, strict=True)
        ]
        return [float((error @ self._gram).mul_(error).sum()) for error in errors]


class RowsLoss:
    """The squared error of a site's outputs, on some tokens."""

    def __init__(self, stage: BlockStage, group: ScalableGroup) -> None:
        self._stage, self._group = stage, group
        assert group.seen.rows is not None
        self._rows = group.seen.rows
        self._weights = [stage.weight(site) for site in group.sites]
        self._expected = [self._rows @ weight.T for weight in self._weights]

    def __call__(self, columns: Tensor | None) -> list[float]:
        """See `SitesLoss`."""
        inputs: dict[object, Tensor] = {}  # sites with one scheme see the same codes
        losses: list[float] = []
        for site, weight, expected in zip(self._group.sites, self._weights, self._expected, strict=True):
            entry = self._stage.planned(site.name)
            key = None if entry is None or entry.scheme is None else entry.scheme.activations
            if key not in inputs:
                inputs[key] = rounded_inputs(self._stage, site, self._rows, columns)
            found = inputs[key] @ rounded_weight(self._stage, self._group, site, weight, columns).T
            losses.append(float(found.sub_(expected).square_().sum()))
        return losses


class ParentLoss:
    """The squared error of the output of the module that holds the sites, summed over some of its calls."""

    def __init__(self, stage: BlockStage, group: ScalableGroup, calls: list[Call]) -> None:
        self._stage, self._group, self._calls = stage, group, calls
        self._module = stage.block.get_submodule(parent_of(stage, group.sites))
        self._expected = self._run({})

    def __call__(self, columns: Tensor | None, *, only: Site | None = None) -> float:
        """Return the squared error with weights W·s and inputs x/s quantized: of all sites, or of one only."""
        products = {
            site.name: _product(
                self._stage,
                site,
                rounded_weight(self._stage, self._group, site, self._stage.weight(site), columns),
                columns,
            )
            for site in self._group.sites
            if only is None or site == only
        }
        found = self._run(products)
        return sum(float((a - b).square_().sum()) for a, b in zip(found, self._expected, strict=True))

    def _run(self, products: Mapping[str, Product]) -> list[Tensor]:
        with in_float32(self._module), torch.no_grad():
            by_memory = {
                storage_key(weight_view(self._stage.block, site, self._stage.name)): products[site.name]
                for site in self._group.sites
                if site.name in products
            }
            with ReplacedProducts(by_memory):
                return [_first(self._module(*args, **kwargs)) for args, kwargs in self._calls]


def sites_loss(stage: BlockStage, group: ScalableGroup) -> SitesLoss:
    """Return the loss of a group's sites that suits what was observed."""
    return RowsLoss(stage, group) if quantizes_inputs(stage, group.sites) else GramLoss(stage, group)


def rounded_weight(
    stage: BlockStage, group: ScalableGroup, site: Site, weight: Tensor, columns: Tensor | None
) -> Tensor:
    """Return a weight [O, I] that is rounded after its columns were multiplied, for inputs as they are.

    Ranges are searched over a few factors: over all would take most of the time, and no search would judge scales by
    what clipping repairs anyway.
    """
    mean_square = group.seen.stats.mean_square
    if columns is None:
        return stage.fake_quantize(site, weight, mean_square, method=quick)
    importance = None if mean_square is None else mean_square / columns.square()
    return stage.fake_quantize(site, weight * columns, importance, method=quick).div_(columns)


def rounded_inputs(stage: BlockStage, site: Site, x: Tensor, columns: Tensor | None) -> Tensor:
    """Return what is left of inputs [T, I] that are quantized after being divided, in their own units."""
    entry = stage.planned(site.name)
    acts = None if entry is None or entry.scheme is None else entry.scheme.activations
    if acts is None:
        return x
    scaled = x if columns is None else x / columns
    stats = SiteStats()
    if acts.observer is not None:
        stats.observers[acts] = observer_of(acts, site.in_features)
        stats.add(scaled, with_gram=False)
    quantizer = stage.input_quantizer(site, stats)
    assert quantizer is not None
    rounded = quantizer.to(x.device).quantize(scaled).dequantize()
    return rounded if columns is None else rounded * columns


def parent_of(stage: BlockStage, sites: Iterable[Site]) -> str:
    """Return the path inside the block of the closest module that holds all these sites; empty for the block."""
    paths = [stage.local(site.parameter).split(".")[:-1] for site in sites]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def capture_calls(stage: BlockStage, paths: Iterable[str], num_tokens: int) -> dict[str, list[Call]]:
    """Run the block on the first calibration windows and return how modules inside it were called.

    Args:
        stage: with calibration text.
        paths: of the modules, inside the block.
        num_tokens: about how many tokens to run; whole batches.
    """
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    assert stage.inputs is not None
    seen = 0
    with ExitStack() as hooks:
        for path, found in calls.items():

            def record(_: nn.Module, args: Any, kwargs: Any, found: list[Call] = found) -> None:
                found.append((args, kwargs))

            module = stage.block.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        for (start, end), run in zip(stage.batches(), stage.run_batches(), strict=True):
            run()
            seen += (end - start) * stage.inputs.shape[1]
            if seen >= num_tokens:
                break
    return calls


def _planned_groups(stage: BlockStage) -> Iterator[ScalableGroup]:
    """Every group with a site that is quantized, and whose inputs no earlier transform has changed."""
    sites = stage.sites
    edges = {frozenset(edge.consumers): edge for edge in reversed(stage.structure.edges)}
    for group in stage.structure.groups:
        planned = tuple(sites[name] for name in group.sites if stage.planned(name) is not None)
        if not planned or any(name in stage.input_transforms or name in stage.float_columns for name in group.sites):
            continue
        edge = edges.get(frozenset(group.sites))
        if edge is not None and not _scales_rows_freely(stage, edge):
            edge = None
        width = planned[0].in_features
        channel = torch.arange(width) if edge is None else torch.tensor(edge.channels(width))
        is_whole = len(planned) == len(group.sites)
        yield ScalableGroup(sites=planned, is_whole=is_whole, edge=edge, channel=channel, seen=Observed())


def _scales_rows_freely(stage: BlockStage, edge: Edge) -> bool:
    """Whether the producer loses nothing by rows of different sizes: not so if they share a scale."""
    entry = stage.planned(edge.producer) if edge.kind == "linear" else None
    return entry is None or entry.granularity is None or entry.granularity.kind in ("channel", "group")


def _observe(stage: BlockStage, batch: list[ScalableGroup], *, for_loss: bool = True) -> list[ScalableGroup]:
    """Run the calibration text; `for_loss` keeps Gram matrices, or rows where inputs are quantized."""
    seen = {group.names[0]: group.seen for group in batch}
    keeps_rows = {group.names[0]: quantizes_inputs(stage, group.sites) for group in batch}

    def on_call(site: Site, x: Tensor) -> None:
        if site.name in seen:
            with_rows = keeps_rows[site.name]
            seen[site.name].add(x, with_gram=for_loss and not with_rows, num_rows=ROWS if for_loss and with_rows else 0)

    with SiteCalls(stage.block, list(stage.structure.sites), on_call):
        for run in stage.run_batches():
            run()
    return [group for group in batch if group.seen.stats.num_tokens > 0]


def _product(stage: BlockStage, site: Site, weight: Tensor, columns: Tensor | None) -> Product:
    def product(x: Tensor, added: Tensor | None) -> Tensor:
        flat = rounded_inputs(stage, site, x.reshape(-1, x.shape[-1]), columns)
        return functional.linear(flat, weight, added).reshape(*x.shape[:-1], -1)

    return product


def _bound(stage: BlockStage) -> float:
    """What rounding explains: of float32 products, and of what the transforms had to round to another dtype."""
    eps = ROUNDINGS * torch.finfo(torch.float32).eps
    quantized = {site.parameter for site in stage.structure.sites if stage.planned(site.name) is not None}
    compensated = {f"{edge.producer}.weight" for edge in stage.structure.edges if edge.kind != "linear"}
    for name in stage.edited - compensated:
        dtype = stage.model.dtype if name in quantized else stage.model.skeleton.stored_dtype(name)
        if dtype != torch.float32:
            eps = max(eps, 4 * torch.finfo(dtype).eps)
    return eps


def _first(out: object) -> Tensor:
    return cast(Tensor, cast(tuple[object, ...], out)[0] if isinstance(out, tuple) else out)
