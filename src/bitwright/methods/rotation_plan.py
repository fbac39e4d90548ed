"""Where a rotation of the residual stream goes: which weights read it, which write it, and proof that it may turn.

The residual stream x may be turned by any orthogonal R, x → x R, if all that reads it turns back and all that writes to
it turns along. RMSNorm commutes with R once its weight is folded into its readers; LayerNorm, which subtracts a mean
along a fixed direction, does not.

    tables (embeddings, positions)   [V, D] rows     E R
    norms                            gain g → 1
    readers                          [O, D]          (W · g) R
    writers                          [D, I], bias    Rᵀ W, b R
    values → outputs, per head       S = R2          R2ᵀ V_h, b R2;  O_h R2

No table of architectures says which is which. A reader is a weight whose every input is, number for number, a row that
one norm has put out; a weight of D outputs that reads no norm is taken for a writer; and then the whole block is turned
and run: it must give what it gave, turned. A model for which that fails is refused, with the reason where it is known.

Legend: D hidden size, O out features, I in features, V vocabulary, S channels of a head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import StructureError
from bitwright.model.edits import bias_name
from bitwright.model.sites import Site, SiteCalls, block_sites, join, modules_of
from bitwright.model.structure import Edge

Call = Callable[[], object]

COMMUTES = 1e-4
"""Relative movement of a norm's output that float32 explains when its input is turned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A norm over the residual stream; `offset` is what its weight lacks to be the gain: 1 for norms of 1 + weight."""

    weight: str
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """What the parameters of a block, or of the model without its blocks, have to do with the residual stream.

    Attributes:
        tables: [V, D], whose rows enter it.
        readers: parameter -> the norm that it reads.
        writers: parameters whose outputs are added to it.
        heads: edges from values to outputs, inside which each head may be turned.
        transposed: parameters that store [I, O].
        unread: norms of width D that no weight reads.
    """

    tables: tuple[str, ...]
    readers: Mapping[str, Norm]
    writers: tuple[str, ...]
    heads: tuple["Heads", ...]
    transposed: frozenset[str]
    unread: tuple[str, ...]

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm once."""
        return tuple(dict.fromkeys(self.readers.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Values and outputs of attention: parameters, the rows of the values in theirs, and how heads are laid out.

    Attributes:
        producer: parameter of the values.
        consumer: parameter of the outputs.
        rows: of the producer.
        dim: channels per head.
        repeat: consumer heads that read one producer head.
    """

    producer: str
    consumer: str
    rows: tuple[int, int]
    dim: int
    repeat: int


def find_roles(module: nn.Module, prefix: str, call: Call, width: int, *, tables: Iterable[str] = ()) -> Roles:
    """Run a block, or the model without its blocks, and see which weights read norms of the residual stream.

    Args:
        module: in memory, float32.
        prefix: its name in the full model.
        call: runs it.
        width: D.
        tables: embeddings of this width.
    Raises:
        StructureError: a norm cannot be folded, or the reason why experts of one parameter read different norms.
    """
    sites = block_sites(module, prefix)
    norms = {
        path: each
        for path, each in modules_of(module).items()
        if isinstance(weight := getattr(each, "weight", None), Tensor) and tuple(weight.shape) == (width,)
    }
    rows: dict[str, set[bytes]] = {path: set() for path in norms}
    entered: dict[str, Tensor] = {}
    seen: dict[str, set[bytes]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for path, norm in norms.items():

            def record(_: nn.Module, args: tuple[Any, ...], out: object, path: str = path) -> None:
                if isinstance(out, Tensor) and args:
                    entered[path] = args[0]
                    rows[path] |= _rows(out)

            hooks.callback(norm.register_forward_hook(record).remove)

        def on_call(site: Site, x: Tensor) -> None:
            if site.in_features == width:
                seen.setdefault(site.parameter, set()).update(_rows(x))

        with SiteCalls(module, sites, on_call):
            call()
    read = {
        parameter: path
        for parameter, inputs in seen.items()
        if (path := next((path for path, out in rows.items() if inputs and inputs <= out), None)) is not None
    }
    with torch.no_grad():
        found = {path: _norm(norms[path], join(prefix, path), entered[path]) for path in dict.fromkeys(read.values())}
    readers = {parameter: found[path] for parameter, path in read.items()}
    return Roles(
        tables=tuple(tables),
        readers=readers,
        writers=tuple(dict.fromkeys(s.parameter for s in sites if s.out_features == width and s.parameter not in read)),
        heads=(),
        transposed=frozenset(site.parameter for site in sites if site.transposed),
        unread=tuple(join(prefix, path) for path in entered if path not in found),
    )


def head_candidates(edges: Iterable[Edge], sites: Iterable[Site], head_dim: int) -> Iterator[Heads]:
    """Yield the proven edges between weights that may lead from values to outputs; to be proven by turning them.

    Args:
        edges: of a block.
        sites: of the block.
        head_dim: S by the configuration, for edges that do not say it.
    """
    by_name = {site.name: site for site in sites}
    for edge in edges:
        if edge.kind != "linear" or len(edge.consumers) != 1 or by_name[edge.producer].index is not None:
            continue
        producer, consumer = by_name[edge.producer], by_name[edge.consumers[0]]
        rows = edge.rows or (0, producer.out_features)
        dim = edge.head_dim or head_dim
        if (rows[1] - rows[0]) % dim == 0:
            yield Heads(
                producer=producer.parameter, consumer=consumer.parameter, rows=rows, dim=dim, repeat=edge.repeat
            )


def rotated(
    tensors: Mapping[str, Tensor], roles: Roles, rotation: Tensor, head_rotations: Iterable[Tensor] = ()
) -> dict[str, Tensor]:
    """Return the parameters that change, in the dtype of the rotation; differentiable in the rotations.

    Args:
        tensors: full parameter name to tensor.
        roles: of these parameters.
        rotation: R [D, D].
        head_rotations: one [S, S] per entry of `roles.heads`.
    """
    wide = rotation.dtype
    changed: dict[str, Tensor] = {name: tensors[name].to(wide) @ rotation for name in roles.tables}
    for name, norm in roles.readers.items():
        gain = tensors[norm.weight].to(wide) + norm.offset
        weight = _oriented(tensors[name].to(wide), name, roles)
        changed[name] = _oriented((weight * gain) @ rotation, name, roles)
    for norm in roles.norms:
        changed[norm.weight] = torch.full_like(tensors[norm.weight], 1 - norm.offset, dtype=wide)
    for name in roles.writers:
        weight = _oriented(tensors[name].to(wide), name, roles)
        changed[name] = _oriented(rotation.T @ weight, name, roles)
        if (bias := bias_name(name)) in tensors:
            changed[bias] = tensors[bias].to(wide) @ rotation
    for heads, turn in zip(roles.heads, head_rotations, strict=True):
        _turn_heads(changed, tensors, roles, heads, turn)
    return changed


def _turn_heads(
    changed: dict[str, Tensor], tensors: Mapping[str, Tensor], roles: Roles, heads: Heads, turn: Tensor
) -> None:
    """Turn the values of each head by `turn` [S, S], and the columns that read them with them."""
    values = _oriented(changed.get(heads.producer, tensors[heads.producer].to(turn.dtype)), heads.producer, roles)
    first, end = heads.rows
    turned = (turn.T @ values[first:end].unflatten(0, (-1, heads.dim))).flatten(0, 1)
    changed[heads.producer] = _oriented(torch.cat([values[:first], turned, values[end:]]), heads.producer, roles)
    if (name := bias_name(heads.producer)) in tensors:
        bias = changed.get(name, tensors[name].to(turn.dtype))
        part = (bias[first:end].unflatten(0, (-1, heads.dim)) @ turn).flatten()
        changed[name] = torch.cat([bias[:first], part, bias[end:]])
    outputs = _oriented(changed.get(heads.consumer, tensors[heads.consumer].to(turn.dtype)), heads.consumer, roles)
    outputs = (outputs.unflatten(1, (-1, heads.dim)) @ turn).flatten(1)
    changed[heads.consumer] = _oriented(outputs, heads.consumer, roles)


def _oriented(weight: Tensor, name: str, roles: Roles) -> Tensor:
    """A weight as [..., O, I]; applied twice, as it is stored."""
    return weight.mT if name in roles.transposed else weight


def _rows(x: Tensor) -> set[bytes]:
    flat = x.detach().reshape(-1, x.shape[-1]).float().cpu().contiguous()
    return {row.numpy().tobytes() for row in flat}


def _norm(module: nn.Module, name: str, x: Tensor) -> Norm:
    """See how a norm scales, and whether it commutes with rotations when its gain is 1.

    Raises:
        StructureError: it has no gain that could be folded, subtracts a mean, or adds a bias.
    """
    weight = module.get_parameter("weight").detach()
    bias = getattr(module, "bias", None)
    kept = weight.clone()
    added = bias.detach().clone() if isinstance(bias, Tensor) else None
    try:
        if isinstance(bias, Tensor):
            bias.detach().zero_()
        offset = next((offset for offset in (0, 1) if not bool(_filled(module, weight, -offset, x).any())), None)
        if offset is None:
            raise StructureError(
                f"{name}: its output is no multiple of its weight, which cannot be folded for a rotation."
            )
        turn = random_orthogonal(weight.numel(), torch.Generator().manual_seed(0)).to(x)
        expected = _filled(module, weight, 1 - offset, x) @ turn
        movement = (_filled(module, weight, 1 - offset, x @ turn) - expected).norm() / expected.norm()
    finally:
        weight.copy_(kept)
        if isinstance(bias, Tensor) and added is not None:
            bias.detach().copy_(added)
    if not float(movement) <= COMMUTES:
        raise StructureError(
            f"{name}: a {type(module).__name__} does not commute with rotations (LayerNorm subtracts a mean). "
            "Use smoothquant, or hadamard, which rotates inputs at inference."
        )
    if added is not None and bool(added.any()):
        raise StructureError(f"{name}: adds a bias, which a rotation cannot fold. Use smoothquant or hadamard.")
    return Norm(weight=f"{name}.weight", offset=offset)


def _filled(module: nn.Module, weight: Tensor, value: int, x: Tensor) -> Tensor:
    weight.fill_(value)
    return module(x)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix [size, size], float64, uniform over all."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
