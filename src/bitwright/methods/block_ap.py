"""Block-AP: train the weights, scales and zero points of a whole block together on the block's output.

Learned rounding chooses between two neighbours of each weight. Here a weight may go as far as its gradient leads it:
weights are kept as floats during training and rounded on every forward pass, with gradients passed straight through
rounding and stopped by clipping; scales and zero points get the gradients of LSQ. What is left at the end are codes and
a grid, like those of any other method.

Published learning rates (1e-5 to 2e-5 for weights, 1e-4 for scales) belong to 4000 steps on models whose weights are
about 0.02. Here rates are in units of the step each group starts with, and what is chosen is how far a weight may
travel in all: Adam moves about as far as its rate says, so n steps take it n times the mean rate. That choice serves
models of every size and runs of every length.

Legend: O out features, I in features, R rows of scales, G groups, n weights per group.
"""

import math

import torch
from torch import Tensor

from bitwright.methods.block_training import TrainedBlock, Training, squared_error, start_weight
from bitwright.methods.stage import BlockStage, BlockTask
from bitwright.methods.trained_grid import TrainedGrid
from bitwright.numerics.grid import AnyGrid
from bitwright.numerics.qtensor import QTensor
from bitwright.options import BlockApOptions

# Gradients of a mean over a large output are tiny; Adam must not take them for nothing.
EPSILON = 1e-20


def block_ap(stage: BlockStage, tasks: list[BlockTask]) -> dict[str, QTensor]:
    """Train a block's weights and grids so that its output is closest to that of the unquantized model.

    The loss on all calibration windows is measured at the start and after every epoch; the lowest gives the result.

    Args:
        stage: with inputs and targets; its block is not modified.
        tasks: on integer grids.
    Raises:
        RecipeError: another grid.
    Reference:
        EfficientQAT, arXiv:2407.11062, Block-AP. Differs: learning rates in units of the step, starts from GPTQ's codes
        on a searched grid, and keeps the best epoch. LSQ, arXiv:1902.08153: gradients of scales, without its factor,
        which Adam would undo.
    """
    options = stage.recipe.block_ap
    block = TrainedBlock(stage, tasks)
    sites = {
        task.site.name: LearnedWeight(start_weight(task, options.start, stage.recipe.gptq), task.grid) for task in tasks
    }
    training = Training(block, sites, autocast=options.autocast)
    training.measure()
    _train(training, options)
    return training.finish("block_ap")


class LearnedWeight:
    """The trained parameters of one weight, in units of the starting step and 0 at the start.

    Attributes:
        moved: [R, G, n], how far each weight has moved.
        wider: [R, G], logarithm of the factor on the scale, whose sign so stays.
        shifted: [R, G], added to the zero point.
    """

    def __init__(self, weight: Tensor, grid: AnyGrid) -> None:
        self.grid = TrainedGrid(grid, weight.shape[0])
        self.groups = self.grid.split(weight)
        self.moved = torch.zeros_like(self.groups).requires_grad_()
        self.wider = torch.zeros_like(self.grid.scale).requires_grad_(not self.grid.fixed_scale)
        self.shifted = torch.zeros_like(self.grid.scale).requires_grad_(self.grid.zero_point is not None)

    def values(self) -> Tensor:
        """The weight [O, I] that the parameters stand for."""
        scale, zero = self._factors()
        return self.grid.values(self._codes(scale, zero), scale, zero)

    @torch.no_grad()
    def result(self) -> QTensor:
        """The same as codes and a grid."""
        scale, zero = self._factors()
        return self.grid.result(self._codes(scale, zero), scale, zero)

    def _factors(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [R, G] as stored."""
        scale, zero = self.grid.scale, self.grid.zero_point
        if not self.grid.fixed_scale:
            scale = self.grid.stored_scale(scale * torch.exp(self.wider))
        return scale, None if zero is None else self.grid.stored_zero(zero + self.shifted)

    def _codes(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        weight = self.groups + self.moved * self.grid.scale.unsqueeze(-1)
        return self.grid.codes(weight / scale.unsqueeze(-1), zero)


def _train(training: Training[LearnedWeight], options: BlockApOptions) -> None:
    per_epoch = math.ceil(training.num_windows / options.batch)
    total = options.epochs * per_epoch
    sites = training.sites.values()
    grids = [each for site in sites for each in (site.wider, site.shifted) if each.requires_grad]
    travels = [([site.moved for site in sites], options.weight_travel), (grids, options.scale_travel)]
    optimizer = torch.optim.Adam(
        # The mean of a cosine that falls from 1 to 0 is 1/2.
        [{"params": params, "lr": 2 * travel / max(1, total)} for params, travel in travels if params],
        eps=EPSILON,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total))
    batches = training.batches(options.batch)
    for done in range(1, total + 1):
        hidden, target = next(batches)
        optimizer.zero_grad()
        squared_error(training.forward(hidden), target).backward()
        optimizer.step()
        schedule.step()
        if done % per_epoch == 0:
            training.measure()
        training.report(done, total)
