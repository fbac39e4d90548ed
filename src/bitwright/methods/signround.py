"""SignRound: learn for every weight whether it is rounded up or down, by signed gradient descent on the block's output.

Rounding to nearest is best for each weight by itself, but not for the output of a block, in which errors add up or
cancel. An offset between -1/2 and 1/2 is added to each weight in units of its step before it is rounded, and the ends
of each group's range are multiplied by factors near 1. All are moved by the sign of their gradients alone, without
momentum: steps of fixed size, which shrinks linearly to 0. With n steps that begin at 1/n an offset can just reach the
end of its range, whatever the scale of its gradients, so that one rate serves every model.

Legend: O out features, I in features, R rows of scales, G groups, n weights per group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.methods.block_training import TrainedBlock, Training, squared_error, start_weight
from bitwright.methods.stage import BlockStage, BlockTask
from bitwright.methods.trained_grid import TrainedGrid
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.numerics.scales import FloatScale
from bitwright.options import SignRoundOptions

OFFSET_LIMITS = (-0.5, 0.5)
# Of the factors on the ends of a range: one that covers every weight can only shrink, a searched one may also grow.
COVERING_LIMITS, SEARCHED_LIMITS = (0.0, 1.0), (0.5, 1.5)
# Few codes and many steps: flipping a rounding takes more of the range than one sweep of it gives.
FEW_BITS, MANY_ITERATIONS = 3, 1000


def signround(stage: BlockStage, tasks: list[BlockTask]) -> dict[str, QTensor]:
    """Round the weights of a block so that its output is closest to that of the unquantized model.

    The result is the start or what training ended with, whichever has the lower loss on all calibration windows.

    Args:
        stage: with inputs and targets; its block is not modified.
        tasks: on integer grids.
    Raises:
        RecipeError: another grid.
    Reference:
        SignRound, arXiv:2309.05516, and V2, arXiv:2512.04746 (AutoRound). Differs: starts from GPTQ's codes, which lie
        farther from the nearest ones than an offset reaches; both ends of the run are measured on all windows, instead
        of keeping the best mini-batch. Steps shrink to 0, so that what lies between was never the best of a run.
    """
    options = stage.recipe.signround
    if not options.importance:
        tasks = [replace(task, grid=_covering(task)) for task in tasks]
    block = TrainedBlock(stage, tasks)
    roundings = {
        task.site.name: LearnedRounding(start_weight(task, options.start, stage.recipe.gptq), task.grid, options)
        for task in tasks
    }
    training = Training(block, roundings, autocast=options.autocast)
    training.measure()
    _train(training, options)
    training.measure()
    return training.finish("signround")


class LearnedRounding:
    """The trained parameters of one weight: offsets [R, G, n], and factors [R, G] on the two ends of each range."""

    def __init__(self, weight: Tensor, grid: AnyGrid, options: SignRoundOptions) -> None:
        self.grid = TrainedGrid(grid, weight.shape[0])
        self.groups = self.grid.split(weight)
        self.offset = torch.zeros_like(self.groups).requires_grad_()
        trains_range = not self.grid.fixed_scale
        self.low = torch.ones_like(self.grid.scale).requires_grad_(trains_range and self.grid.zero_point is not None)
        self.high = torch.ones_like(self.grid.scale).requires_grad_(trains_range)
        self.limits = SEARCHED_LIMITS if options.importance else COVERING_LIMITS

    def values(self) -> Tensor:
        """The weight [O, I] that the parameters stand for."""
        scale, zero = self._factors()
        return self.grid.values(self._codes(scale, zero), scale, zero)

    @torch.no_grad()
    def result(self) -> QTensor:
        """The same as codes and a grid."""
        scale, zero = self._factors()
        return self.grid.result(self._codes(scale, zero), scale, zero)

    @torch.no_grad()
    def step(self, size: float) -> None:
        """Move every parameter against the sign of its gradient."""
        for parameter, limits in ((self.offset, OFFSET_LIMITS), (self.low, self.limits), (self.high, self.limits)):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign_(), alpha=size).clamp_(*limits)
                parameter.grad = None

    def _factors(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [R, G] as stored; with factors of 1 exactly those of the start."""
        scale, zero, top = self.grid.scale, self.grid.zero_point, self.grid.format.qmax
        if self.grid.fixed_scale:
            return scale, zero
        if zero is None:
            return self.grid.stored_scale(scale * self.high), None
        # In units of the starting scale the range is -zero .. top - zero.
        wider = ((top - zero) * (self.high - 1) + zero * (self.low - 1)) / top
        stored = self.grid.stored_scale(scale * (1 + wider))
        return stored, self.grid.stored_zero(zero * self.low * (scale / stored))

    def _codes(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.grid.codes(self.groups / scale.unsqueeze(-1) + self.offset, zero)


def _train(training: Training[LearnedRounding], options: SignRoundOptions) -> None:
    bits = min(each.grid.format.bits for each in training.sites.values())
    total = options.num_iterations
    first = options.first_step or (2 if bits <= FEW_BITS and total >= MANY_ITERATIONS else 1) / max(1, total)
    batches = training.batches(options.batch)
    for done in range(total):
        hidden, target = next(batches)
        squared_error(training.forward(hidden), target, options.drop).backward()
        for each in training.sites.values():
            each.step(first * (1 - done / total))
        training.report(done + 1, total)


def _covering(task: BlockTask) -> Grid:
    """A grid of the same kind that clips no weight, as the first SignRound starts from."""
    grid = task.grid
    assert isinstance(grid, Grid)
    if grid.stored is not None:
        return grid
    return fit_grid(task.weight, grid.format, grid.granularity, method="minmax", scale=FloatScale(grid.scale.dtype))
