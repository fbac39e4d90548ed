"""What methods share that train the quantized weights of a whole block: its forward pass, batches, loss and results.

The loss is the mean squared error of the block's output against that of the unquantized block on the unquantized
prefix (`stage.targets`), while the inputs have gone through the quantized prefix: a block also repairs what the blocks
before it have broken.

Legend: N windows, B of them in a batch, T tokens, D hidden size, O out features, I in features.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import SingularHessian
from bitwright.methods.gptq import compensated, gptq
from bitwright.methods.stage import BlockStage, BlockTask
from bitwright.methods.trained_grid import TrainedGrid
from bitwright.model.products import Product, ReplacedProducts
from bitwright.model.sites import Site, StorageKey, storage_key, weight_view
from bitwright.numerics.inputs import InputQuantizer
from bitwright.numerics.linalg import multiplies_bfloat16
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ste import straight_through
from bitwright.options import GptqOptions, Start

# Base weights that start from GPTQ's codes lie so far inside the cell of their code that no rounding moves them out.
CELL = 0.499

Weights = Mapping[str, Tensor]
"""Site name -> weight [O, I] as it is coded: for transformed inputs, without the columns that stay floats."""


class TrainedBlock:
    """A block whose planned weights are given with every call, and everything else is as it will be at inference."""

    def __init__(self, stage: BlockStage, tasks: list[BlockTask]) -> None:
        self.stage = stage
        self.tasks = {task.site.name: task for task in tasks}
        self.parameters: dict[str, list[Site]] = {}  # full name -> the sites it holds, trained or not
        trained = {task.site.parameter for task in tasks}
        for site in stage.structure.sites:
            if site.parameter in trained:
                self.parameters.setdefault(site.parameter, []).append(site)

    @property
    def num_windows(self) -> int:
        """N, calibration windows."""
        assert self.stage.inputs is not None
        return len(self.stage.inputs)

    def forward(self, hidden: Tensor, weights: Weights) -> Tensor:
        """Return the block's output [B, T, D], differentiable with respect to the weights."""
        given: dict[str, Tensor] = {}
        products: dict[StorageKey, Product] = {}
        for parameter, sites in self.parameters.items():
            value = self._parameter(sites, weights)
            given[self.stage.local(parameter)] = value
            for site in sites:
                task = self.tasks.get(site.name)
                if task is not None and (task.inputs is not None or task.stats.transform is not None):
                    key = storage_key(value if site.index is None else value[site.index])
                    products[key] = partial(_product, task, weights[site.name])
        active: AbstractContextManager[object] = ReplacedProducts(products) if products else nullcontext()
        with active:
            return self.stage.forward(hidden, given)

    def loss(self, weights: Weights) -> float:
        """Return the mean squared error of the output over all calibration windows."""
        total, count = 0.0, 0
        with torch.no_grad():
            for start, end in self.stage.batches():
                error = self.forward(self.stage.hidden(start, end), weights) - self.stage.target(start, end)
                total += float(error.double().square().sum())
                count += error.numel()
        return total / count

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets) [B, T, D] of random windows for ever; every window once before any comes again."""
        num_windows = self.num_windows
        size = min(size, num_windows)
        waiting: list[int] = []
        while True:
            if len(waiting) < size:  # what is left over is drawn sooner than what was just seen
                waiting += torch.randperm(num_windows, generator=generator).tolist()
            chosen, waiting = waiting[:size], waiting[size:]
            yield (
                torch.cat([self.stage.hidden(i, i + 1) for i in chosen]),
                torch.cat([self.stage.target(i, i + 1) for i in chosen]),
            )

    def _parameter(self, sites: list[Site], weights: Weights) -> Tensor:
        """A parameter as the model stores it: one site, or a stack of experts of which some may be kept."""
        values = [self._stored(site, weights) for site in sites]
        return values[0] if sites[0].index is None else torch.stack(values)

    def _stored(self, site: Site, weights: Weights) -> Tensor:
        task = self.tasks.get(site.name)
        if task is None:
            value = weight_view(self.stage.block, site, self.stage.name)
        else:
            value = weights[site.name] if task.columns is None else task.columns.put_into(weights[site.name])
        value = value.to(self.stage.model.dtype)
        return value.T if site.transposed else value


class Learned(Protocol):
    """The trained parameters of one weight."""

    def values(self) -> Tensor:
        """Return the weight [O, I] that they stand for, differentiable."""
        ...

    def result(self) -> QTensor:
        """Return the same as codes and a grid."""
        ...


LearnedT = TypeVar("LearnedT", bound=Learned)


class Training(Generic[LearnedT]):
    """A training run of one block, which remembers the best of the states it is told to measure.

    Args:
        block: what is trained.
        sites: site name -> its parameters.
        autocast: whether steps compute products in bfloat16; None: of a float32 block, where the device has
            instructions for them.
    """

    def __init__(self, block: TrainedBlock, sites: Mapping[str, LearnedT], *, autocast: bool | None) -> None:
        self.block, self.sites = block, sites
        model = block.stage.model
        suits = model.dtype == torch.float32 and multiplies_bfloat16(model.device)
        self.autocast = suits if autocast is None else autocast
        self.losses: list[float] = []
        self._best: dict[str, QTensor] = {}

    @property
    def num_windows(self) -> int:
        """N, calibration windows."""
        return self.block.num_windows

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets) for ever, the same ones in every run."""
        return self.block.batches(size, self.block.stage.generator())

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's output [B, T, D] with the weights as they are now, for a step of training."""
        weights = {name: each.values() for name, each in self.sites.items()}
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.autocast):
            return self.block.forward(hidden, weights)

    def measure(self) -> None:
        """Measure the loss of the codes as they are now on all windows, and keep them if it is the lowest so far."""
        results = {name: each.result() for name, each in self.sites.items()}
        loss = self.block.loss({name: result.dequantize() for name, result in results.items()})
        if not self.losses or loss < min(self.losses):
            self._best = results
        self.losses.append(loss)

    def report(self, done: int, total: int) -> None:
        """Show how far this block is."""
        self.block.stage.progress(self.block.stage.name, done, total)

    def finish(self, method: str) -> dict[str, QTensor]:
        """Leave a note for the records and return the best codes and grids."""
        self.block.stage.notes.append({"method": method, "losses": self.losses, "autocast": self.autocast})
        return self._best


def squared_error(output: Tensor, target: Tensor, drop: float = 0.0) -> Tensor:
    """Return the mean squared error of an output [B, T, D] without the share `drop` of its largest errors.

    Reference:
        SignRound V2, arXiv:2512.04746: a few outliers, which no rounding can reach, would steer all the rest.
    """
    error = (output.float() - target.float()).square()
    num_dropped = int(drop * error.numel())
    if num_dropped == 0:
        return error.mean()
    largest = error.detach().flatten().kthvalue(error.numel() - num_dropped).values
    return error.masked_fill(error.detach() > largest, 0.0).sum() / (error.numel() - num_dropped)


def _product(task: BlockTask, weight: Tensor, x: Tensor, added: Tensor | None) -> Tensor:
    """Return the product of a site as it will be at inference [..., O], with rounding passed straight through."""
    if task.stats.transform is not None:
        x = task.stats.transform.apply(x)
    weight, apart = weight.to(x.dtype), None
    if task.columns is not None:
        index = task.columns.index.long()
        apart = functional.linear(x[..., index], task.columns.weight.to(x.dtype))
        x = x.index_fill(-1, index, 0.0)
    if task.inputs is not None:
        x = straight_through(x, partial(_rounded, task.inputs))
    result = functional.linear(x, weight, added)
    return result if apart is None else result + apart


def _rounded(quantizer: InputQuantizer, x: Tensor) -> Tensor:
    return quantizer.quantize(x.reshape(-1, x.shape[-1])).dequantize(x.dtype).reshape(x.shape)


def start_weight(task: BlockTask, start: Start, options: GptqOptions) -> Tensor:
    """Return a weight [O, I] that rounding to nearest turns into the codes to start from.

    For GPTQ that is the weight as its updates have left it, moved into the cell of its code where it was clipped.
    """
    if start == "rtn":
        return task.weight
    hessian, weight = task.stats.hessian, task.weight
    assert hessian is not None
    try:
        found = gptq(weight, hessian, task.grid, damp=options.damp, block=options.block, act_order=options.act_order)
        moved = compensated(weight, found, hessian, damp=options.damp, act_order=options.act_order)
    except SingularHessian as error:
        raise SingularHessian(f"{task.site.name}: {error} It saw {task.stats.num_tokens} tokens.") from None
    grid = TrainedGrid(task.grid, weight.shape[0])
    codes, scale = grid.split(found.codes).float(), grid.scale.unsqueeze(-1)
    centre = codes if grid.zero_point is None else codes - grid.zero_point.unsqueeze(-1)
    inside = torch.clamp(grid.split(moved) / scale, centre - CELL, centre + CELL)
    return grid.join(inside * scale)
