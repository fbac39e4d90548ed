"""What training needs of memory, by what it is for: predicted from a model's shape, and counted in a live one.

Exact in both, and equal: weights, scales, adapters, gradients and the states of the optimizer. Those of AdamW are two
numbers per trained number, in its dtype, and a float32 step per tensor; those of adamw8bit (bitsandbytes) two bytes per
trained number and two float32 scales for every 256, two tables for all tensors, and float32 numbers for tensors below
4096. Not counted are buffers that no checkpoint holds (rotary frequencies), the one dense weight that a packed layer
decodes at a time, and what the allocator wastes.

Activations are estimated. With T tokens, autograd keeps of each block about

    T · itemsize · (inputs and outputs of every linear layer + 4 · hidden)

which assumes that attention keeps no T x T matrix (flash or memory-efficient). An adapter adds r float32 numbers per
token, and a float32 copy of its inputs where the model has another dtype. Of experts the routed share counts. With
gradient checkpointing each block keeps its inputs, T · hidden · itemsize, and one block at a time is kept in full. The
logits come on top: in the model's dtype, and twice in float32 (the loss and its gradient).

Legend: T tokens, O out features, I in features, r rank.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitwright.model.layouts import own
from bitwright.model.sites import modules_of
from bitwright.nn.linear import QuantizedLinear
from bitwright.recipe import matches
from bitwright.schemes import Scheme
from bitwright.search.model_shape import ModelShape, StoredTensor
from bitwright.search.stored_size import site_tensors
from bitwright.train.lora import Adapter, LoraConfig
from bitwright.train.options import ADAMW_8BIT
from bitwright.train.sharding import share_of

_CODES = "weight_codes"
_STATES, _STEP_BYTES = 2, 4
_ADAPTER_BYTES = 4
# bitsandbytes' AdamW8bit
_STATE_BLOCK, _SMALLEST, _TABLE_BYTES = 256, 4096, 256 * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLedger:
    """Bytes of training by purpose.

    Attributes:
        weights: dense weights and packed codes, trained or not.
        scales: all that stands beside packed codes.
        adapters: their matrices.
        gradients: of everything that is trained.
        optimizer: its states.
        activations: kept for the backward pass; an estimate in a prediction; of shards not measured, and 0.
    """

    weights: int
    scales: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.scales + self.adapters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What goes through the model at once; `checkpointing` computes the inside of blocks again in backward."""

    num_sequences: int
    seqlen: int
    checkpointing: bool = False

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_sequences * self.seqlen


def predict_memory(
    shape: ModelShape,
    assignment: Mapping[str, Scheme | None],
    config: LoraConfig | None,
    batch: Batch,
    *,
    by_group: bool = False,
    optimizer: str = "adamw",
) -> MemoryLedger:
    """Predict the memory of training, before anything is loaded.

    Args:
        shape: of the model, in the dtype that it is trained in.
        assignment: site -> scheme, with the granularity that is really used; a site without one stays dense.
        config: adapters; None trains everything that is not packed.
        batch: what decides activations.
        by_group: adapters are group adapters.
        optimizer: adamw or adamw8bit.
    """
    dense, codes, scales = list(shape.kept), 0, 0
    for site in shape.sites:
        scheme, dtype = assignment.get(site.name), shape.site_dtypes[site.name]
        if scheme is None:
            dims = (site.out_features, site.in_features)
            dense.append(StoredTensor(name=site.parameter, shape=dims, dtype=dtype))
            continue
        for leaf, (dims, stored) in site_tensors(site, scheme, own.NAME, dtype).items():
            num_bytes = StoredTensor(name=leaf, shape=dims, dtype=stored).num_bytes
            if leaf == _CODES:
                codes += num_bytes
            else:
                scales += num_bytes
    dense_bytes = sum(tensor.num_bytes for tensor in dense)
    adapted = {} if config is None else _adapted(shape, assignment, config, by_group=by_group)
    adapters = _ADAPTER_BYTES * sum(map(sum, adapted.values()))
    if config is None:
        trained = _whole(dense)
    else:
        trained = [(size, _ADAPTER_BYTES * size) for sizes in adapted.values() for size in sizes]
    return MemoryLedger(
        weights=dense_bytes + codes,
        scales=scales,
        adapters=adapters,
        gradients=dense_bytes if config is None else adapters,
        optimizer=_optimizer_bytes(trained, optimizer),
        activations=_activations(shape, adapted, 0 if config is None else config.rank, batch),
    )


def measure_memory(model: nn.Module, optimizer: Optimizer | None = None, *, activations: int = 0) -> MemoryLedger:
    """Count the bytes of a live model and its optimizer: after a step, all of them are there. Of shards, one's own.

    Args:
        model: with or without adapters.
        optimizer: None counts none.
        activations: what `KeptActivations` counted.
    """
    weights, scales, adapters, gradients, seen = 0, 0, 0, 0, set[int]()
    for module in modules_of(model).values():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            gradients += 0 if parameter.grad is None else share_of(parameter.grad).nbytes
            if isinstance(module, Adapter):
                adapters += share_of(parameter).nbytes
            else:
                weights += share_of(parameter).nbytes
        if isinstance(module, QuantizedLinear):
            for leaf, tensor in module.stored().items():
                if leaf == _CODES:
                    weights += tensor.nbytes
                else:
                    scales += tensor.nbytes
    states = [] if optimizer is None else list(optimizer.state.values())
    # By memory: all tensors share the tables of 8-bit states.
    tensors = [share_of(each) for state in states for each in state.values() if isinstance(each, Tensor)]
    kept = {each.data_ptr(): each.nbytes for each in tensors}
    return MemoryLedger(
        weights=weights,
        scales=scales,
        adapters=adapters,
        gradients=gradients,
        optimizer=sum(kept.values()),
        activations=activations,
    )


class KeptActivations:
    """A context that counts what autograd keeps of forward passes, each piece of memory once, without the parameters.

    Copies of weights that autocast makes count. With gradient checkpointing the inputs of blocks are all that a forward
    pass keeps: the block that the backward pass computes again does not count.

    Args:
        model: whose parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, int] = {}
        self._held: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def num_bytes(self) -> int:
        """Of all that was kept so far."""
        return sum(self._kept.values())

    def __enter__(self) -> "KeptActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        self._held.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # a tensor that its own graph holds would never be freed
        storage = kept.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
            self._held.append(kept)  # so that no memory is freed and counted again
        return kept


def _adapted(
    shape: ModelShape, assignment: Mapping[str, Scheme | None], config: LoraConfig, *, by_group: bool
) -> dict[str, tuple[int, int]]:
    """Numbers in A and in B of the adapter of every site that gets one; slices of a 3-D parameter are no layers."""
    sizes: dict[str, tuple[int, int]] = {}
    for site in shape.sites:
        is_layer = site.kind != "router" and site.index is None
        if is_layer and any(matches(pattern, site.name) for pattern in config.targets):
            scheme = assignment.get(site.name)
            inputs = site.in_features
            if by_group and scheme is not None:
                inputs = scheme.weights.granularity.num_groups(site.in_features)
            sizes[site.name] = config.rank * inputs, config.rank * site.out_features
    return sizes


def _whole(tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """Numbers and bytes of every parameter; a 3-D one comes as slices under one name."""
    found: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        numbers, num_bytes = found.get(tensor.name, (0, 0))
        found[tensor.name] = numbers + math.prod(tensor.shape), num_bytes + tensor.num_bytes
    return list(found.values())


def _optimizer_bytes(trained: Iterable[tuple[int, int]], optimizer: str) -> int:
    """Bytes of states, from the numbers and the bytes of every trained tensor."""
    if optimizer != ADAMW_8BIT:
        return sum(_STATES * num_bytes + _STEP_BYTES for _, num_bytes in trained)
    total, tables = 0, 0
    for numbers, _ in trained:
        if numbers < _SMALLEST:
            total += _STATES * torch.float32.itemsize * numbers
        else:
            total += _STATES * (numbers + torch.float32.itemsize * math.ceil(numbers / _STATE_BLOCK))
            tables = _STATES * _TABLE_BYTES
    return total + tables


def _activations(shape: ModelShape, adapted: Mapping[str, object], rank: int, batch: Batch) -> int:
    itemsize, tokens = shape.dtype.itemsize, batch.num_tokens
    blocks = [_block_activations(shape, name, adapted, rank) for name in shape.block_names]
    logits = tokens * shape.vocab_size * (itemsize + 2 * torch.float32.itemsize)
    if not batch.checkpointing:
        return round(tokens * sum(blocks)) + logits
    inputs = len(blocks) * shape.hidden_size * itemsize
    return round(tokens * (inputs + max(blocks))) + logits


def _block_activations(shape: ModelShape, block: str, adapted: Mapping[str, object], rank: int) -> float:
    """Bytes per token that one block keeps."""
    itemsize = shape.dtype.itemsize
    total: float = 4 * shape.hidden_size * itemsize
    for site in shape.sites:
        if site.name.startswith(f"{block}."):
            numbers = site.in_features + site.out_features
            copy = site.in_features if itemsize != torch.float32.itemsize else 0
            adapter = torch.float32.itemsize * (rank + copy) if site.name in adapted else 0
            total += shape.share(site) * (numbers * itemsize + adapter)
    return total
