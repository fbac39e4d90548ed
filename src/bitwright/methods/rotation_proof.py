"""Find where a rotation of the residual stream goes in a whole model, and prove it block by block.

Each block runs on some tokens as it is, and turned on their turned hidden states: its output must be the same, turned,
up to what float32 explains. So must what enters the first block; and the logits must stay. Only a model that passes in
all of its parts is rotated.

Legend: B windows, T tokens, D hidden size, S channels of a head.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bitwright.errors import RecipeError, StructureError
from bitwright.methods.rotation_plan import Roles, find_roles, head_candidates, random_orthogonal, rotated
from bitwright.model.edits import named_tensors
from bitwright.model.probe import propose, prove
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure, block_signature
from bitwright.numerics.hadamard import largest_hadamard_factor, random_hadamard
from bitwright.numerics.linalg import wide_dtype
from bitwright.progress import Progress

BOUND = 1e-4
"""Of what a block adds, root mean square; a rotation in the wrong place moves it by as much as there is."""
ROUNDINGS = 16
"""Of the hidden state, beside which what a block adds may be small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationPlan:
    """What every parameter of a model has to do with its residual stream: proven.

    Attributes:
        width: D.
        outside: of embeddings, final norm and head.
        blocks: of each block.
    """

    width: int
    outside: Roles
    blocks: tuple[Roles, ...]

    @property
    def reached(self) -> frozenset[str]:
        """Parameters of blocks whose inputs are turned: those that read the residual stream, or turned heads."""
        heads = (each.consumer for roles in self.blocks for each in roles.heads)
        return frozenset([*(name for roles in self.blocks for name in roles.readers), *heads])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rotation:
    """The matrices: of the residual stream [D, D] (R1), and per block those of its heads [S, S] (R2)."""

    residual: Tensor
    heads: tuple[tuple[Tensor, ...], ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Rotation":
        """Return the same rotation elsewhere."""
        heads = tuple(tuple(each.to(device, dtype) for each in block) for block in self.heads)
        return Rotation(residual=self.residual.to(device, dtype), heads=heads)


def random_rotation(plan: RotationPlan, seed: int, block: int | None) -> Rotation:
    """Return random Hadamard matrices, float64; a random orthogonal one for a size that has none.

    Args:
        plan: says the sizes.
        seed: another rotation for each.
        block: size of the blocks within which the residual stream is turned; None turns all of it.
    Raises:
        RecipeError: blocks that do not divide the hidden size, or have no Hadamard matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    if block is None:
        residual = _random(plan.width, generator)
    elif plan.width % block or largest_hadamard_factor(block) != block:
        raise RecipeError(f"rotation.block {block}: does not fit the hidden size {plan.width}. Use 16, 32 or 64.")
    else:
        turns = [random_hadamard(block, generator, dtype=torch.float64) for _ in range(plan.width // block)]
        residual = torch.block_diag(*turns)
    heads = tuple(tuple(_random(each.dim, generator) for each in roles.heads) for roles in plan.blocks)
    return Rotation(residual=residual, heads=heads)


def plan_rotation(model: StreamedModel, ids: Tensor, progress: Progress) -> RotationPlan:
    """Find the roles of all parameters and prove them.

    Args:
        model: computes in float32.
        ids: [B, T] tokens to prove it on; as many as reach every expert, better more.
        progress: called with (what, done, total).
    Raises:
        StructureError: a part that cannot be rotated, and why.
    """
    turn = torch.Generator().manual_seed(0)
    with model.outside():
        hidden = model.enter(ids)
        width = hidden.shape[-1]
        residual = random_orthogonal(width, turn).to(hidden.device, wide_dtype(hidden.device))
        with _without_blocks(model) as whole:
            tables = [
                f"{path}.weight"
                for path, module in whole.named_modules()
                if isinstance(module, nn.Embedding) and module.embedding_dim == width
            ]
            outside = find_roles(
                whole, "", lambda: whole(input_ids=ids.to(model.device), use_cache=False), width, tables=tables
            )
        _prove_outside(model, ids, hidden, outside, residual)
    blocks: list[Roles] = []
    known: dict[str, BlockStructure] = {}
    for index in range(model.num_blocks):
        with model.block(index) as block:
            after = model.run_block(block, index, hidden)
            blocks.append(_plan_block(model, index, block, hidden, after, residual, known))
        hidden = after
        progress("rotation: prove", index + 1, model.num_blocks)
    return RotationPlan(width=width, outside=outside, blocks=tuple(blocks))


def _plan_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    after: Tensor,
    residual: Tensor,
    known: dict[str, BlockStructure],
) -> Roles:
    name = model.block_names[index]
    generator = torch.Generator().manual_seed(1)

    def call() -> Tensor:
        return model.run_block(block, index, hidden)

    def movement(roles: Roles) -> float:
        turns = [random_orthogonal(each.dim, generator).to(residual) for each in roles.heads]
        changed = rotated(named_tensors(block, name), roles, residual, turns)
        weights = {each[len(name) + 1 :]: value.float() for each, value in changed.items()}
        with torch.no_grad():
            found = model.call_block(block, index, _turned(hidden, residual), weights)
        return float((found - _turned(after, residual)).square().mean().sqrt())

    roles = find_roles(block, name, call, residual.shape[0])
    bound = BOUND * float((after - hidden).square().mean().sqrt())
    bound += ROUNDINGS * torch.finfo(torch.float32).eps * float(hidden.square().mean().sqrt())
    if not movement(roles) <= bound:
        raise StructureError(f"{name}: computes something else when its residual stream is rotated{_guess(roles)}.")
    signature = block_signature(block)
    if signature not in known:
        known[signature] = prove(block, name, call, propose(block, name, call), generator)
    structure = known[signature].renamed(name)
    candidates = head_candidates(structure.edges, structure.sites, _head_dim(model))
    proven = tuple(heads for heads in candidates if movement(replace(roles, heads=(heads,))) <= bound)
    return replace(roles, heads=proven)


def _prove_outside(model: StreamedModel, ids: Tensor, hidden: Tensor, roles: Roles, residual: Tensor) -> None:
    what = type(model.skeleton.model).__name__
    whole = model.skeleton.model
    logits = model.leave(ids, hidden)
    names = {name: p.detach() for name, p in whole.named_parameters(remove_duplicate=False) if not p.is_meta}
    with replaced_parameters(whole, rotated(names, roles, residual)):
        entered = (model.enter(ids) - _turned(hidden, residual)).square().mean().sqrt()
        moved = (model.leave(ids, _turned(hidden, residual)) - logits).square().mean().sqrt()
    if not float(entered) <= BOUND * float(hidden.square().mean().sqrt()):
        raise StructureError(f"{what}: rotated embeddings do not enter the first block rotated{_guess(roles)}.")
    if not float(moved) <= BOUND * float(logits.square().mean().sqrt()):
        raise StructureError(f"{what}: the logits change when what enters the final norm is rotated{_guess(roles)}.")


def _guess(roles: Roles) -> str:
    return f" ({roles.unread[0]} is read by no weight that could take its gain)" if roles.unread else ""


def _turned(hidden: Tensor, residual: Tensor) -> Tensor:
    return (hidden.to(residual.dtype) @ residual).to(hidden.dtype)


def _random(size: int, generator: torch.Generator) -> Tensor:
    if largest_hadamard_factor(size) == size:
        return random_hadamard(size, generator, dtype=torch.float64)
    return random_orthogonal(size, generator)


def _head_dim(model: StreamedModel) -> int:
    """Channels per head by the configuration; where it is wrong, the proof says so."""
    config = model.skeleton.model.config.get_text_config()
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


@contextmanager
def _without_blocks(model: StreamedModel) -> Generator[nn.Module]:
    whole = model.skeleton.model
    blocks = whole.get_submodule(model.blocks_path)
    whole.set_submodule(model.blocks_path, nn.ModuleList())
    try:
        yield whole
    finally:
        whole.set_submodule(model.blocks_path, blocks)


@contextmanager
def replaced_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Put other parameters into a module for the time being; tied ones may come apart."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            place = module.get_submodule(path)
            old = place.get_parameter(leaf)
            before.append((place, leaf, old))
            setattr(place, leaf, nn.Parameter(value.to(old.dtype), requires_grad=False))
        yield
    finally:
        for place, leaf, old in before:
            setattr(place, leaf, old)
