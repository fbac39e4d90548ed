"""Choose among random rotations: which of them leaves the least error when a few blocks are rounded as planned.

Random Hadamard matrices differ widely in what they do to one model. The proxy runs a few blocks on a few windows, with
weights and inputs rounded to nearest, and adds up how far their outputs move, relative to what each block adds.

Legend: N windows, T tokens, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.methods.rotation_plan import Roles, rotated
from bitwright.methods.rotation_proof import Rotation, RotationPlan
from bitwright.methods.rotation_rounding import Rounding
from bitwright.model.edits import named_tensors
from bitwright.model.products import ReplacedProducts
from bitwright.model.sites import block_sites
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress

NUM_BLOCKS = 3
NUM_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledBlock:
    """A block that the search tries rotations on: its parameters, what enters it [N, T, D], and what leaves it."""

    index: int
    roles: Roles
    tensors: Mapping[str, Tensor]
    hidden: Tensor
    after: Tensor


def sample_blocks(
    model: StreamedModel, plan: RotationPlan, calibration: Tensor, progress: Progress
) -> list[SampledBlock]:
    """Run the first windows through the model and keep some blocks with what enters them.

    Args:
        model: computes in float32.
        plan: proven.
        calibration: [N, T] tokens.
        progress: called with (what, done, total).
    """
    windows = calibration[: max(1, NUM_TOKENS // calibration.shape[1])]
    count = min(NUM_BLOCKS, model.num_blocks)
    chosen = {round((i + 0.5) * model.num_blocks / count - 0.5) for i in range(count)}
    sampled: list[SampledBlock] = []
    with model.outside():
        hidden = model.enter(windows)
    for index in range(max(chosen) + 1):
        with model.block(index) as block:
            after = model.run_block(block, index, hidden)
            if index in chosen:
                name = model.block_names[index]
                tensors = {key: value.cpu().clone() for key, value in named_tensors(block, name).items()}
                sampled.append(
                    SampledBlock(index=index, roles=plan.blocks[index], tensors=tensors, hidden=hidden, after=after)
                )
        hidden = after
        progress("rotation: sample", index + 1, max(chosen) + 1)
    return sampled


def rounding_error(model: StreamedModel, sampled: list[SampledBlock], rotation: Rotation, rounding: Rounding) -> float:
    """Return the error of the sampled blocks' outputs when they are rotated and rounded, mean over the blocks.

    It is relative: root mean square over that of what the block adds to its input.
    """
    total = 0.0
    turn = rotation.to(model.device, torch.float32)
    for each in sampled:
        name = model.block_names[each.index]
        tensors = {key: value.to(model.device) for key, value in each.tensors.items()}
        weights = {**tensors, **rotated(tensors, each.roles, turn.residual, turn.heads[each.index])}
        block = model.skeleton.model.get_submodule(name)
        local = {key[len(name) + 1 :]: value for key, value in weights.items()}
        products = rounding.products(block_sites(block, name), weights)
        with torch.no_grad(), ReplacedProducts(products):
            found = model.call_block(block, each.index, each.hidden @ turn.residual, local)
        error = (found - each.after @ turn.residual).square().mean()
        total += float((error / (each.after - each.hidden).square().mean()).sqrt())
    return total / len(sampled)
