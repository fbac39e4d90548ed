"""AWQ: weights that meet large inputs are made larger before rounding, so that their rounding errors count less.

A column j multiplied by s_j before it is rounded, and its input divided by s_j, has the same step as its neighbours in
its group, but its error reaches the output divided by s_j. Too large an s widens the group's range and all others lose:
which s is best is searched on a grid of exponents, s = x̄^r, x̄ the root mean square of each input channel. `duo` scales
also weigh against the weights, s = x̄^r / (w̄^(1-r) + ε), w̄ the mean of |w| over the largest of its group. Without
scaling (r = 0) is one of the candidates, so that the loss is never above what it was.

The loss is the squared error of the output of the closest module that holds all sites which share the inputs: the
attention for q, k, v, the MLP for gate and up. Running it for every candidate would take most of the time. So it is run
with one site rounded at a time, which tells how much an error of each site counts; the sum of the sites' own errors
with these weights, for which the Gram matrix of the inputs is enough, ranks the candidates, and only the best few are
run. A site alone, as o and down are, is judged by its own error. While scales are compared, ranges are searched
coarsely. The clip search of the paper follows when the codes are chosen: it is the importance-weighted range search
that every method here uses, on E[(x/s)²].

Shapes: I in features, S channels of an edge, G groups of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.methods.scaling import (
    ParentLoss,
    ScalableGroup,
    capture_calls,
    fold_all,
    parent_of,
    scalable_groups,
    sites_loss,
)
from bitwright.methods.stage import BlockStage

SMALLEST = 1e-4
SHORTLIST = 3
"""How many candidates are tried on the whole module."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """A scale [S] of a group's channels, how it came about, and the loss with it."""

    scale: Tensor
    exponent: float
    duo: bool
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AwqChoice:
    """What is best for a group: a candidate, or None where none is better than the identity."""

    group: ScalableGroup
    candidate: Candidate | None
    identity_loss: float


def awq(stage: BlockStage) -> None:
    """Scale the inputs of every group of sites for which that lowers the loss; see `Transform.apply`.

    Raises:
        VerificationError: the block's output moved by more than rounding explains.
    Reference:
        Lin et al., AWQ, arXiv:2306.00978, and the duo scales of its public implementation. Differs: edges are proven;
        x̄ is a root mean square; candidates are ranked by weighted errors of the sites over all calibration tokens
        before the output of their module decides; both kinds of scale are tried.
    """
    choices = [
        choose(stage, group) for batch in scalable_groups(stage, explicit=stage.recipe.awq.explicit) for group in batch
    ]
    moved = fold_all(stage, [(each.group, each.candidate.scale) for each in choices if each.candidate is not None])
    for choice in choices:
        edge, best = choice.group.edge, choice.candidate
        stage.notes.append(
            {
                "transform": "awq",
                "sites": list(choice.group.names),
                "edge": None if edge is None else edge.producer,
                "exponent": 0.0 if best is None else best.exponent,
                "duo": best is not None and best.duo,
                "loss": choice.identity_loss if best is None else best.loss,
                "identity_loss": choice.identity_loss,
                "invariance": moved,
            }
        )


def choose(stage: BlockStage, group: ScalableGroup) -> AwqChoice:
    """Try every exponent and return the best scale of a group."""
    own = sites_loss(stage, group)
    if len(group.sites) == 1:
        candidates = _ranked(stage, group, lambda columns: own(columns)[0])
        return _best(group, candidates, own(None)[0])
    parent = parent_of(stage, group.sites)
    together = ParentLoss(stage, group, capture_calls(stage, [parent], stage.recipe.awq.tokens)[parent])
    factors = [
        together(None, only=site) / alone if alone > 0 else 0.0
        for site, alone in zip(group.sites, own(None), strict=True)
    ]

    def weighted(columns: Tensor) -> float:
        return sum(factor * alone for factor, alone in zip(factors, own(columns), strict=True))

    shortlist = [
        replace(each, loss=together(group.per_column(each.scale)))
        for each in _ranked(stage, group, weighted)[:SHORTLIST]
    ]
    return _best(group, shortlist, together(None))


def _ranked(stage: BlockStage, group: ScalableGroup, loss: Callable[[Tensor], float]) -> list[Candidate]:
    """Every candidate but the identity, the best first."""
    options = stage.recipe.awq
    x, w = _input_size(group), _weight_size(stage, group) if options.duo else None
    candidates: list[Candidate] = []
    for step in range(options.grid):
        exponent = step / options.grid
        for weights in (None,) if w is None else (None, w):
            if exponent > 0 or weights is not None:
                scale = awq_scale(x, weights, exponent)
                found = loss(group.per_column(scale))
                candidates.append(Candidate(scale=scale, exponent=exponent, duo=weights is not None, loss=found))
    return sorted(candidates, key=lambda each: each.loss)


def _best(group: ScalableGroup, candidates: list[Candidate], identity: float) -> AwqChoice:
    best = min(candidates, key=lambda each: each.loss, default=None)
    kept = best if best is not None and best.loss < identity else None
    return AwqChoice(group=group, candidate=kept, identity_loss=identity)


def awq_scale(x: Tensor, w: Tensor | None, exponent: float) -> Tensor:
    """Return s [S] for typical sizes of inputs `x` [S] and, for duo scales, weights `w` [S].

    Normalised so that its largest and smallest entry are inverse to each other. Channels without any input get the
    smallest.
    """
    scale = x**exponent if w is None else x**exponent / (w ** (1 - exponent) + SMALLEST)
    lives = x > 0
    scale = scale.clamp(min=SMALLEST)
    low, high = (scale[lives].min(), scale[lives].max()) if bool(lives.any()) else (scale.min(), scale.max())
    return torch.where(lives, scale, low) / (low * high).sqrt()


def _input_size(group: ScalableGroup) -> Tensor:
    mean_square = group.seen.stats.mean_square
    assert mean_square is not None
    return group.per_channel(mean_square, reduce="mean").sqrt()


def _weight_size(stage: BlockStage, group: ScalableGroup) -> Tensor:
    """The mean over rows of |w|, each divided by the largest that shares its scale: [S]."""
    total: Tensor | None = None
    num_rows = 0
    for site in group.sites:
        entry = stage.planned(site.name)
        assert entry is not None
        assert entry.granularity is not None
        magnitude = stage.weight(site).abs()
        width = entry.granularity.columns_per_group(site.in_features)
        largest = [part.amax(1, keepdim=True).expand_as(part) for part in magnitude.split(width, dim=1)]
        relative = (magnitude / torch.cat(largest, dim=1).clamp(min=torch.finfo(torch.float32).tiny)).sum(0)
        total = relative if total is None else total + relative
        num_rows += site.out_features
    assert total is not None
    return group.per_channel(total / num_rows, reduce="mean")
