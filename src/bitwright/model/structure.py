"""The structure of a model as data: blocks, sites, groups that share an input, and proven producer → consumer edges.

An edge says: divide the producer's channels by any s > 0 and multiply the consumers' columns by it, and the block
computes the same function. Smoothing and activation-aware scaling are built on edges. Everything here is plain data
that goes to JSON and back; `probe` finds it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from bitwright.model.sites import Site

EdgeKind = Literal["norm", "norm_plus_one", "linear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Sites that read one input tensor: they share second moments, and a scale of that input concerns all of them."""

    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """A producer whose channels the consumers read as columns, unchanged or through a positively homogeneous function.

    Attributes:
        producer: path of the norm, or name of the linear site.
        kind: norm (scales by its weight), norm_plus_one (scales by 1 + weight), linear (rows of a weight and its bias).
        rows: first and end row of a fused producer that the consumers read; None for all.
        repeat: how many consumer heads read each producer head (grouped-query attention); 1 otherwise.
        head_dim: channels per head where repeat > 1; None otherwise.
        consumers: the sites that read the channels.
    """

    producer: str
    kind: EdgeKind
    rows: tuple[int, int] | None
    repeat: int
    head_dim: int | None
    consumers: tuple[str, ...]

    def channels(self, in_features: int) -> list[int]:
        """Return, for each consumer column, the producer channel it reads, counted from `rows[0]`."""
        if self.head_dim is None:
            return list(range(in_features))
        head = self.head_dim
        return [column // (head * self.repeat) * head + column % head for column in range(in_features)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedEdge:
    """A candidate that the proof refused, and why; never used."""

    producer: str
    rows: tuple[int, int] | None
    consumers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStructure:
    """What is known of one block.

    Attributes:
        name: path in the full model; empty for the model without its blocks.
        signature: equal for blocks with equal parameter names and shapes; such blocks share a proof.
        sites: every weight site.
        groups: every site once, in order of first use.
        candidates: edges proposed and not yet tried; empty after the proof.
        edges: proven edges.
        rejected: candidates that the proof refused.
        uncalled: sites that the probe's forward never used.
    """

    name: str
    signature: str
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    candidates: tuple[Edge, ...]
    edges: tuple[Edge, ...]
    rejected: tuple[RejectedEdge, ...]
    uncalled: tuple[str, ...]

    def renamed(self, name: str) -> "BlockStructure":
        """Return the structure of another block of the same kind (equal signature), called `name`."""

        def here(old: str) -> str:
            return name + old[len(self.name) :]

        def all_here(old: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(here(each) for each in old)

        return replace(
            self,
            name=name,
            sites=tuple(replace(s, name=here(s.name), parameter=here(s.parameter)) for s in self.sites),
            groups=tuple(Group(sites=all_here(group.sites)) for group in self.groups),
            candidates=tuple(
                replace(e, producer=here(e.producer), consumers=all_here(e.consumers)) for e in self.candidates
            ),
            edges=tuple(replace(e, producer=here(e.producer), consumers=all_here(e.consumers)) for e in self.edges),
            rejected=tuple(
                replace(e, producer=here(e.producer), consumers=all_here(e.consumers)) for e in self.rejected
            ),
            uncalled=all_here(self.uncalled),
        )

    def with_proof_of(self, proven: "BlockStructure") -> "BlockStructure":
        """Take over the edges proven on another block; sites, groups and uncalled stay as seen here.

        Raises:
            ValueError: the blocks differ in parameter names or shapes.
        """
        if self.signature != proven.signature:
            raise ValueError(f"{self.name} and {proven.name} differ in parameters; prove each by itself")
        there = proven.renamed(self.name)
        return replace(self, candidates=(), edges=there.edges, rejected=there.rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStructure:
    """What is known of a model.

    Attributes:
        blocks_path: name of the list of decoder blocks.
        blocks: one structure per block, in order.
        head: structure of the model without its blocks: final norm → head.
        tied_head: the head's weight is the embedding's.
    """

    blocks_path: str
    blocks: tuple[BlockStructure, ...]
    head: BlockStructure
    tied_head: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and strings, in a stable order."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelStructure":
        """Rebuild what `to_json` returned."""
        return cls(
            blocks_path=data["blocks_path"],
            blocks=tuple(_block_from_json(block) for block in data["blocks"]),
            head=_block_from_json(data["head"]),
            tied_head=data["tied_head"],
        )


def block_signature(block: nn.Module) -> str:
    """Hash the names and shapes of a block's parameters; the class does not enter."""
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def collection_passes(structure: BlockStructure) -> list[tuple[tuple[str, ...], ...]]:
    """Return the sub-steps with the same step of all experts taken together; each entry holds groups, not sites.

    Experts of one layer do not read each other's outputs, so one run of the block serves them all: two passes for
    gate_up and down instead of two per expert.
    """
    steps: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    sites = {site.name: site for site in structure.sites}
    for group in structure.groups:
        key = tuple(sites[name].parameter for name in group.sites)
        steps.setdefault(key, []).append(group.sites)
    return [tuple(groups) for groups in steps.values()]


def _block_from_json(data: Mapping[str, Any]) -> BlockStructure:
    return BlockStructure(
        name=data["name"],
        signature=data["signature"],
        sites=tuple(Site(**site) for site in data["sites"]),
        groups=tuple(Group(sites=tuple(group["sites"])) for group in data["groups"]),
        candidates=tuple(Edge(**_tuples(edge)) for edge in data["candidates"]),
        edges=tuple(Edge(**_tuples(edge)) for edge in data["edges"]),
        rejected=tuple(RejectedEdge(**_tuples(edge)) for edge in data["rejected"]),
        uncalled=tuple(data["uncalled"]),
    )


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(cast(list[Any], value)) if isinstance(value, list) else value for key, value in data.items()}
