"""FSDP2: every process keeps its share of the weights, gradients and optimizer states of one model.

torch's `fully_shard` goes around every decoder block, and around the whole for the rest: a block is gathered when it
runs, forward and backward, and its gradients go to their owners. It runs on gloo and NCCL. accelerate's own FSDP plugin
does not: without an accelerator it falls back to DDP in silence. So the model is sharded here, and the Trainer is told
that a model came sharded, which it has a path for.

A sharded training works on a copy. The model itself waits in the memory of the host, whole, in every process: it is
scored and written as ever, and takes back what was trained at the end.
"""

from copy import deepcopy
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from bitwright.model.sites import find_blocks

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model of which this process holds its share, on its device; the model goes to the host.

    Raises:
        StructureError: the model has no decoder blocks.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    copy = deepcopy(model.cpu())
    for name in find_blocks(copy)[1]:
        fully_shard(copy.get_submodule(name), mesh=mesh)
    fully_shard(copy, mesh=mesh)
    cast(Any, copy)._is_fsdp_managed_module = True  # the Trainer then accumulates gradients without sending them
    return copy


@torch.no_grad()
def gather_into(model: nn.Module, copy: nn.Module, device: torch.device) -> None:
    """Give a model what its sharded copy has learned, and put it back on its device; all processes together."""
    for name, parameter in copy.named_parameters():
        if parameter.requires_grad:
            model.get_parameter(name).copy_(whole(parameter))
    model.to(device)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shares of all processes, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, values: Tensor) -> None:
    """Copy values, which all processes have, into a tensor or into everybody's share of it."""
    if isinstance(target, DTensor):
        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    target.copy_(values)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the whole state of an optimizer, by the names of parameters; filled in the first process alone."""
    return cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_WHOLE))


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give every process its share of a whole state, which all have read."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
