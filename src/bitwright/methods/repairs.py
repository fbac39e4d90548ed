"""What a repair is, and the table of those that exist: what makes up for errors once codes are chosen."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.bias_correction import bias_correction
from bitwright.methods.low_rank import LOW_RANK, low_rank_addend
from bitwright.methods.solvers import Need
from bitwright.numerics.inputs import QuantizedSite
from bitwright.recipe import Recipe
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RepairTask:
    """All that a repair may know beside what became of the site.

    Attributes:
        weight: [O, I] float32, what was coded: for transformed inputs, 0 in columns that stay floats.
        stats: of the inputs, as they will be at inference.
        recipe: holds the options of every repair.
        dtype: of the original's weight, in which floats are stored.
    """

    weight: Tensor
    stats: SiteStats
    recipe: Recipe
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Improves a quantized site.

    Attributes:
        about: what it does, in a few words.
        apply: (what became of the site, task) -> the same site, improved.
        needs: what must have been collected.
        needs_own_layout: whether only bitwright's own layout holds the result.
    """

    about: str
    apply: Callable[[QuantizedSite, RepairTask], QuantizedSite]
    needs: frozenset[Need] = frozenset({"moments"})
    needs_own_layout: bool = True


def _bias(site: QuantizedSite, task: RepairTask) -> QuantizedSite:
    """Add the mean of what rounding the weight takes from the output; nothing where no token was seen."""
    if task.stats.mean is None:
        return site
    return replace(site, correction=bias_correction(task.weight, site.coded(), task.stats.mean))


def _low_rank(site: QuantizedSite, task: RepairTask) -> QuantizedSite:
    """Add what the directions with the largest output error lack; of an expert that no token reached, of the weight."""
    stats, hessian = task.stats, task.stats.hessian
    addend = low_rank_addend(
        task.weight, site.coded(), task.recipe.low_rank.rank,
        moments=stats.mean_square if hessian is None else hessian, dtype=task.dtype,
    )  # fmt: skip
    return replace(site, low_rank=addend)


REPAIRS: Registry[Repair] = Registry("repair")
REPAIRS.register("bias", Repair(about="adds the mean error that is left to the output", apply=_bias))
REPAIRS.register(
    LOW_RANK,
    Repair(
        about="adds a thin product B A that takes the most of the output error",
        apply=_low_rank, needs=frozenset({"hessian"}),
    ),
)  # fmt: skip
