"""Prove producer → consumer edges of a block by invariance: an edge that does not hold moves the output.

Divide the producer's channels by random powers of two and multiply the consumers' columns by them. Powers of two are
exact in floating point, so a true edge leaves the output where it was (to 1e-5 of what the block adds to its input, in
float32), while a false one moves it. As positive control, scaling the producer alone must move the output a hundred
times further; otherwise the probe is blind there and the edge is refused. A proof covers positive scales, on the inputs
of the probe.

Shapes: O out features, I in features, S scaled channels.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitwright.errors import StructureError
from bitwright.model.sites import Site, SiteCalls, weight_view
from bitwright.model.structure import BlockStructure, Edge, EdgeKind, RejectedEdge

Call = Callable[[], object]

BOUND = 1e-5  # of the block's own contribution; float32 rounding of a sum over some thousand channels stays below
CONTROL = 100.0  # how many bounds the output must move when the producer alone is scaled
_EXPONENTS = (-3, -2, -1, 1, 2, 3)  # never 0: every channel takes part in the proof

NOT_EQUIVALENT = "the output moves when producer and consumers are scaled inversely"
NO_EFFECT = "scaling the producer alone has no measurable effect"
NOT_HEADS = "the producer's channels do not reach the consumer as repeated heads"
UNREACHED = "no token of the probe reached this expert"


def prove(
    block: nn.Module, prefix: str, call: Call, structure: BlockStructure, generator: torch.Generator
) -> BlockStructure:
    """Try every candidate edge and return the structure with proven and rejected edges.

    Experts of one parameter are tried together, each with scales of its own. The block's weights are as before on
    return, bit for bit.

    Args:
        block: the block that `structure` was proposed for.
        prefix: its name in the full model.
        call: runs the block; equal results each time.
        structure: from `propose`.
        generator: CPU generator of the random scales.
    Raises:
        StructureError: the block gives another output when run again.
    """
    edges: list[Edge] = []
    rejected: list[RejectedEdge] = []
    with in_float32(block), torch.no_grad():
        prover = _Prover(block, prefix, call, structure, generator)
        for batch in _batches(structure):
            reached = [edge for edge in batch if not set(edge.consumers) & set(structure.uncalled)]
            proven, reason = prover.decide(reached) if reached else ([], UNREACHED)
            edges.extend(proven)
            for edge in batch:
                if edge not in reached or not proven:
                    why = reason if edge in reached else UNREACHED
                    rejected.append(
                        RejectedEdge(producer=edge.producer, rows=edge.rows, consumers=edge.consumers, reason=why)
                    )
    return replace(structure, candidates=(), edges=tuple(edges), rejected=tuple(rejected))


def _batches(structure: BlockStructure) -> list[list[Edge]]:
    """Candidates that are tried together: those that differ only in the expert."""
    parameters = {site.name: site.parameter for site in structure.sites}
    batches: dict[object, list[Edge]] = {}
    for edge in structure.candidates:
        consumers = tuple(parameters[name] for name in edge.consumers)
        batches.setdefault((parameters.get(edge.producer, edge.producer), edge.rows, consumers), []).append(edge)
    return list(batches.values())


class _Prover:
    """Scales parts of one block and measures how far its output moves."""

    def __init__(
        self, block: nn.Module, prefix: str, call: Call, structure: BlockStructure, generator: torch.Generator
    ) -> None:
        self._block, self._prefix, self._call, self._generator = block, prefix, call, generator
        self._sites = {site.name: site for site in structure.sites}
        x, self._output = self._run()
        contribution = self._output - x if x is not None and x.shape == self._output.shape else self._output
        self._bound = BOUND * float(contribution.abs().max())
        if self._movement() > self._bound:
            raise StructureError(
                f"{prefix or type(block).__name__}: another output on each run. Use evaluation mode and no cache."
            )

    def decide(self, batch: list[Edge]) -> tuple[list[Edge], str]:
        """Return the edges with kind and head size resolved, or no edges and the reason."""
        first = batch[0]
        head_dim = self._head_dim(first) if first.repeat > 1 else None
        if first.repeat > 1 and head_dim is None:
            return [], NOT_HEADS
        kinds: tuple[EdgeKind, ...] = ("linear",) if first.kind == "linear" else ("norm", "norm_plus_one")
        for kind in kinds:
            edges = [replace(edge, kind=kind, head_dim=head_dim) for edge in batch]
            scales = [self._draw(edge) for edge in edges]
            if not self._moves(edges, scales, self._bound, consumers=True):
                if self._moves(edges, scales, CONTROL * self._bound, consumers=False):
                    return edges, ""
                return [], NO_EFFECT
        return [], NOT_EQUIVALENT

    def _moves(self, edges: list[Edge], scales: list[Tensor], bound: float, *, consumers: bool) -> bool:
        with self._restored(edges):
            for edge, scale in zip(edges, scales, strict=True):
                self._scale_producer(edge, scale)
                if consumers:
                    self._scale_consumers(edge, scale)
            return not self._movement() <= bound  # NaN counts as movement

    def _draw(self, edge: Edge) -> Tensor:
        """Random powers of two [S]."""
        width = self._sites[edge.consumers[0]].in_features // edge.repeat
        choice = torch.randint(len(_EXPONENTS), (width,), generator=self._generator)
        return torch.exp2(torch.tensor(_EXPONENTS, dtype=torch.float32)[choice]).to(self._output.device)

    def _scale_producer(self, edge: Edge, scale: Tensor) -> None:
        weight, bias = self._producer(edge)
        if edge.kind == "norm_plus_one":
            weight.copy_((1 + weight) / scale - 1)
        else:
            weight.div_(scale if weight.ndim == 1 else scale[:, None])
        if bias is not None:
            bias.div_(scale)

    def _scale_consumers(self, edge: Edge, scale: Tensor) -> None:
        for name in edge.consumers:
            site = self._sites[name]
            columns = torch.tensor(edge.channels(site.in_features), device=scale.device)
            weight_view(self._block, site, self._prefix).mul_(scale[columns])

    def _producer(self, edge: Edge) -> tuple[Tensor, Tensor | None]:
        """Return views of what the producer's channels scale: weight [S] or [S, I], and bias [S] where there is one."""
        if edge.kind != "linear":
            norm = self._block.get_submodule(self._local(edge.producer))
            return cast(Tensor, norm.weight).detach(), _own_tensor(norm, "bias")
        site = self._sites[edge.producer]
        rows = slice(None) if edge.rows is None else slice(*edge.rows)
        bias = self._bias(site)
        return weight_view(self._block, site, self._prefix)[rows], None if bias is None else bias[rows]

    def _bias(self, site: Site) -> Tensor | None:
        path, _, leaf = self._local(site.parameter).rpartition(".")
        name = "bias" if leaf == "weight" else f"{leaf}_bias"  # how transformers names the biases of 3-D experts
        bias = _own_tensor(self._block.get_submodule(path), name)
        return bias if bias is None or site.index is None else bias[site.index]

    def _head_dim(self, edge: Edge) -> int | None:
        """Scale one producer channel and see which consumer columns change: one per repetition, a head apart."""
        before = self._consumer_input(edge)
        with self._restored([edge]):
            weight, bias = self._producer(edge)
            weight[0].mul_(2)
            if bias is not None:
                bias[0].mul_(2)
            after = self._consumer_input(edge)
        width = before.shape[-1]
        changed = (before != after).reshape(-1, width).any(0)
        columns = [int(column) for column in changed.nonzero()]
        if len(columns) != edge.repeat:
            return None
        head_dim = columns[1] - columns[0]
        return head_dim if (width // edge.repeat) % head_dim == 0 else None

    def _consumer_input(self, edge: Edge) -> Tensor:
        seen: list[Tensor] = []
        site = self._sites[edge.consumers[0]]
        with SiteCalls(self._block, [site], lambda _, x: seen.append(x)):
            self._call()
        return seen[0]

    def _movement(self) -> float:
        return float((self._run()[1] - self._output).abs().max())

    def _run(self) -> tuple[Tensor | None, Tensor]:
        """Run the block; return its first floating-point argument and its output."""
        runs: list[tuple[Tensor | None, Tensor]] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            runs.append((inputs[0] if inputs else None, _first_tensor(out)))

        handle = self._block.register_forward_hook(hook, with_kwargs=True)
        try:
            self._call()
        finally:
            handle.remove()
        return runs[0]

    @contextmanager
    def _restored(self, edges: list[Edge]) -> Generator[None]:
        """Put every weight that the edges touch back as it was, bit for bit."""
        names = {self._sites[name].parameter for edge in edges for name in edge.consumers}
        touched = [self._block.get_parameter(self._local(name)).detach() for name in sorted(names)]
        for edge in edges:
            touched.extend(part for part in self._producer(edge) if part is not None)
        saved = [(part, part.clone()) for part in touched]
        try:
            yield
        finally:
            for part, original in saved:
                part.copy_(original)

    def _local(self, name: str) -> str:
        return name[len(self._prefix) + 1 :] if self._prefix else name


def _own_tensor(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name, None)
    return tensor.detach() if isinstance(tensor, Tensor) else None


def _first_tensor(out: object) -> Tensor:
    """A block returns a tensor or a tuple that starts with one; a model returns an object with logits."""
    if isinstance(out, tuple):
        out = cast(tuple[object, ...], out)[0]
    return cast(Tensor, getattr(out, "logits", out))


@contextmanager
def in_float32(block: nn.Module) -> Generator[None]:
    """Compute a block in float32: its tensors for the time being, and the tensors it is called with."""
    tensors = [t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point() and t.dtype != torch.float32]
    originals = [(t, t.data) for t in tensors]
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: (_to_float32(args), _to_float32(kwargs)), with_kwargs=True
    )
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        handle.remove()
        for tensor, data in originals:
            tensor.data = data


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_to_float32(each) for each in cast(tuple[Any, ...], value))
    if isinstance(value, dict):
        return {key: _to_float32(each) for key, each in cast(dict[str, Any], value).items()}
    return value
