"""Find the structure of a block by running it: propose from what one forward reads, then have it proven.

Linears that read the same memory form a group. The norm that wrote that memory, or else the linears called just before,
are candidates for its producer; `proof` tries them. Fused projections are proposed as contiguous row ranges only; rows
interleaved per head (GPT-NeoX, BLOOM, Falcon-40B, the values of multi-head latent attention) end up without an edge.

`call` runs the block once, through the module's own `__call__`, with the same result each time: evaluation mode, no
cache. Blocks in another dtype than float32 are computed in float32 while probed and get their weights back bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import StructureError
from bitwright.model.proof import Call, in_float32, prove
from bitwright.model.sites import Site, SiteCalls, StorageKey, block_sites, find_blocks, join, modules_of, storage_key
from bitwright.model.structure import BlockStructure, Edge, Group, ModelStructure, block_signature

__all__ = ["capture_block_calls", "probe_head", "probe_model", "propose", "prove"]


def propose(block: nn.Module, prefix: str, call: Call) -> BlockStructure:
    """Run a block once and return its sites, groups and candidate edges, none of them proven.

    Args:
        block: a decoder block whose weights are in memory.
        prefix: its name in the full model.
        call: runs the block.
    Raises:
        StructureError: `call` does not run the block.
    """
    sites = block_sites(block, prefix)
    trace = _trace(block, prefix, sites, call)
    groups = _groups(sites, trace)
    return BlockStructure(
        name=prefix,
        signature=block_signature(block),
        sites=tuple(sites),
        groups=tuple(groups),
        candidates=tuple(_candidates(sites, groups, trace)),
        edges=(),
        rejected=(),
        uncalled=tuple(site.name for site in sites if site.name not in trace.inputs),
    )


def probe_head(
    model: nn.Module, blocks_path: str, call: Call, generator: torch.Generator
) -> tuple[BlockStructure, bool]:
    """Probe final norm → head with the decoder blocks bypassed; also return whether the head is tied to the embedding.

    A tied head is refused by the proof itself: scaling its columns scales the embedding.

    Args:
        model: everything outside the blocks is in memory; the blocks may be absent.
        blocks_path: name of the list of decoder blocks.
        call: runs the model.
        generator: CPU generator of the random scales.
    """
    blocks = model.get_submodule(blocks_path)
    model.set_submodule(blocks_path, nn.ModuleList())
    try:
        head = prove(model, "", call, propose(model, "", call), generator)
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        tied = any(model.get_parameter(site.parameter) is table for site in head.sites for table in tables)
    finally:
        model.set_submodule(blocks_path, blocks)
    return head, tied


def capture_block_calls(model: nn.Module, input_ids: Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run an in-memory model once and return, per block name, the arguments it was called with."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    _, names = find_blocks(model)
    with ExitStack() as hooks, torch.no_grad():
        for name in names:

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                calls[name] = (args, kwargs)

            hook = model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
            hooks.callback(hook.remove)
        model(input_ids=input_ids, use_cache=False)
    return calls


def probe_model(model: nn.Module, input_ids: Tensor, generator: torch.Generator) -> ModelStructure:
    """Return the proven structure of an in-memory transformers model in evaluation mode.

    Blocks with equal parameter names and shapes share one proof.

    Args:
        model: a causal language model, built with `experts_implementation="eager"` if it has experts.
        input_ids: [B, T] tokens; varied enough to reach every expert.
        generator: CPU generator of the random scales.
    """
    blocks_path, names = find_blocks(model)
    calls = capture_block_calls(model, input_ids)
    proven: dict[str, BlockStructure] = {}
    blocks: list[BlockStructure] = []
    for name in names:
        block = model.get_submodule(name)
        args, kwargs = calls[name]
        call: Call = lambda block=block, args=args, kwargs=kwargs: block(*args, **kwargs)
        proposed = propose(block, name, call)
        if proposed.signature not in proven:
            proven[proposed.signature] = prove(block, name, call, proposed, generator)
        blocks.append(proposed.with_proof_of(proven[proposed.signature]))
    head, tied = probe_head(model, blocks_path, lambda: model(input_ids=input_ids, use_cache=False), generator)
    return ModelStructure(blocks_path=blocks_path, blocks=tuple(blocks), head=head, tied_head=tied)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    """What one forward read: sites in order of call, the memory each read, and the norms by the memory they wrote."""

    order: list[str]
    inputs: dict[str, StorageKey]
    norms: dict[StorageKey, tuple[str, int]]


def _trace(block: nn.Module, prefix: str, sites: Sequence[Site], call: Call) -> _Trace:
    trace = _Trace(order=[], inputs={}, norms={})
    held: list[Tensor] = []  # keeps every recorded tensor alive, so that no two of them share an address
    runs: list[object] = []

    def on_call(site: Site, x: Tensor) -> None:
        held.append(x)
        trace.order.append(site.name)
        trace.inputs.setdefault(site.name, storage_key(x))

    def on_run(_module: nn.Module, _args: object) -> None:
        runs.append(None)

    def on_norm(path: str, width: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, out: object) -> None:
            if isinstance(out, Tensor):
                held.append(out)
                trace.norms[storage_key(out)] = (join(prefix, path), width)

        return hook

    with ExitStack() as hooks, in_float32(block), torch.no_grad():
        hooks.callback(block.register_forward_pre_hook(on_run).remove)
        for path, module in modules_of(block).items():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                hooks.callback(module.register_forward_hook(on_norm(path, weight.numel())).remove)
        with SiteCalls(block, sites, on_call):
            call()
    if not runs:
        raise StructureError(
            f"{prefix or type(block).__name__}: the call did not run it. Pass a call of this very module."
        )
    return trace


def _groups(sites: Sequence[Site], trace: _Trace) -> list[Group]:
    """Group sites by the memory they read; unreached experts like their siblings, other uncalled sites alone."""
    by_input: dict[StorageKey, list[str]] = {}
    for name in dict.fromkeys(trace.order):
        by_input.setdefault(trace.inputs[name], []).append(name)
    called = {name: tuple(names) for names in by_input.values() for name in names}
    by_name = {site.name: site for site in sites}
    patterns: dict[tuple[str, ...], list[Group]] = {}  # parameters read together -> the groups that read them so
    for names in by_input.values():
        parameters = tuple(by_name[name].parameter for name in names)
        patterns.setdefault(parameters, []).append(Group(sites=tuple(names)))
    pattern_of = {parameter: pattern for pattern in patterns for parameter in pattern}
    placed = set(called)
    for site in sites:
        if site.name in placed:
            continue
        pattern = pattern_of.get(site.parameter, (site.parameter,)) if site.index is not None else (site.parameter,)
        members = [s.name for p in pattern for s in sites if s.parameter == p and s.index == site.index]
        patterns.setdefault(pattern, []).append(Group(sites=tuple(name for name in members if name not in called)))
        placed.update(members)
    for pattern in patterns.values():
        pattern.sort(key=lambda group: by_name[group.sites[0]].index or 0)
    return [group for pattern in patterns.values() for group in pattern]


def _candidates(sites: Sequence[Site], groups: Sequence[Group], trace: _Trace) -> Iterator[Edge]:
    by_name = {site.name: site for site in sites}
    for group in groups:
        first = by_name[group.sites[0]]
        norm = trace.norms.get(trace.inputs[first.name]) if first.name in trace.inputs else None
        if norm is not None and norm[1] == first.in_features:
            yield Edge(producer=norm[0], kind="norm", rows=None, repeat=1, head_dim=None, consumers=group.sites)
            continue
        for name in _called_before(group, groups, sites, trace):
            producer = by_name[name]
            if producer.kind == "router" or (producer.kind, producer.index) != (first.kind, first.index):
                continue
            for rows, repeat in _row_ranges(producer.out_features, first.in_features):
                if repeat == 1 or producer.index is None:  # experts have no heads to repeat
                    yield Edge(
                        producer=name, kind="linear", rows=rows, repeat=repeat, head_dim=None, consumers=group.sites
                    )


def _called_before(group: Group, groups: Sequence[Group], sites: Sequence[Site], trace: _Trace) -> list[str]:
    """The sites called just before a group, back to where another input was read: q, k, v for o; gate, up for down."""
    if group.sites[0] not in trace.inputs:
        return _siblings_before(group, groups, sites)
    run: list[str] = []
    for name in reversed(trace.order[: trace.order.index(group.sites[0])]):
        if run and trace.inputs[name] != trace.inputs[run[0]]:
            break
        run.append(name)
    return list(dict.fromkeys(reversed(run)))


def _siblings_before(group: Group, groups: Sequence[Group], sites: Sequence[Site]) -> list[str]:
    """For an expert that no token reached: the sites of its earlier groups, so that its edges are listed as refused."""
    by_name = {site.name: site for site in sites}
    first = by_name[group.sites[0]]
    place = first.parameter.rpartition(".")[0]
    if first.index is None:
        return []
    earlier = [each for each in groups[: list(groups).index(group)] if by_name[each.sites[0]].index == first.index]
    return [name for each in earlier for name in each.sites if by_name[name].parameter.startswith(place + ".")]


def _row_ranges(out_features: int, in_features: int) -> Iterator[tuple[tuple[int, int] | None, int]]:
    """Yield (rows, repeat) by which a producer of `out_features` rows may feed `in_features` columns."""
    if in_features % out_features == 0:
        yield None, in_features // out_features
        return
    ranges: dict[tuple[int, int], int] = {}
    if out_features % in_features == 0:
        ranges = {(start, start + in_features): 1 for start in range(0, out_features, in_features)}
    values = (out_features - in_features) // 2  # fused query, key, value: as many key rows as value rows
    if values > 0 and out_features == in_features + 2 * values and in_features % values == 0:
        ranges.setdefault((out_features - values, out_features), in_features // values)
    yield from ranges.items()
