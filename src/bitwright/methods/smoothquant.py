"""SmoothQuant: inputs with outliers are divided by what their weights are multiplied by, so that 8 bits hold both.

A few hidden channels are tens of times larger than the rest. One scale for a token then leaves the others a few levels.
Dividing channel j by s_j = max|x_j|^α / max|w_j|^(1-α) moves that difficulty to the weights, whose columns are much
more alike: α = 0 evens out the weights, α = 1 the inputs. A fixed `alpha` applies where norms produce the inputs, as
published. Without one, α is searched for every group of sites along every proven edge, and no scaling is one of the
candidates: the least squared error of the sites' outputs wins, with weights and inputs quantized as the plan says.

Shapes: I in features, S channels of an edge.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.methods.scaling import ScalableGroup, fold_all, scalable_groups, sites_loss
from bitwright.methods.stage import BlockStage
from bitwright.recipe import Recipe, SitePlan

SMALLEST = 1e-5
STEPS = 20
"""Steps of the search for α, from 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SmoothChoice:
    """What is best for a group: a scale [S] and its α, or None where nothing is better than the identity."""

    group: ScalableGroup
    scale: Tensor | None
    alpha: float | None
    loss: float
    identity_loss: float


def smoothquant(stage: BlockStage) -> None:
    """Move the outliers of every group's inputs into the weights; see `Transform.apply`.

    Raises:
        VerificationError: the block's output moved by more than rounding explains.
    Reference:
        Xiao et al., SmoothQuant, arXiv:2211.10438. Differs: edges are proven; α is searched per group unless given,
        also along v → o and up → down.
    """
    choices = [
        choose(stage, group)
        for batch in scalable_groups(stage)
        for group in batch
        if stage.recipe.smoothquant.alpha is None or (group.edge is not None and group.edge.kind != "linear")
    ]
    moved = fold_all(stage, [(each.group, each.scale) for each in choices if each.scale is not None])
    for choice in choices:
        edge = choice.group.edge
        stage.notes.append(
            {
                "transform": "smoothquant",
                "sites": list(choice.group.names),
                "edge": None if edge is None else edge.producer,
                "alpha": choice.alpha,
                "loss": choice.loss,
                "identity_loss": choice.identity_loss,
                "invariance": moved,
            }
        )


def choose(stage: BlockStage, group: ScalableGroup) -> SmoothChoice:
    """Return the scale of a group for the α that was asked for, or for the best one."""
    loss, asked = sites_loss(stage, group), stage.recipe.smoothquant.alpha
    identity = sum(loss(None))
    x, w = _peaks(stage, group)
    candidates: list[SmoothChoice] = []
    for alpha in [step / STEPS for step in range(STEPS + 1)] if asked is None else [asked]:
        scale = smoothing_scale(x, w, alpha)
        found = sum(loss(group.per_column(scale)))
        candidates.append(SmoothChoice(group=group, scale=scale, alpha=alpha, loss=found, identity_loss=identity))
    best = min(candidates, key=lambda each: each.loss)
    if asked is None and not best.loss < identity:
        return SmoothChoice(group=group, scale=None, alpha=None, loss=identity, identity_loss=identity)
    return best


def smoothing_scale(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """Return s [S] for the largest magnitudes of inputs `x` [S] and weights `w` [S].

    A common factor would change nothing but the size of the weights: the geometric mean of the smallest and the largest
    entry is 1. Channels without any input stay as they are.
    """
    scale = x.clamp(min=SMALLEST) ** alpha / w.clamp(min=SMALLEST) ** (1 - alpha)
    lives = (x > SMALLEST) & (w > SMALLEST)
    if not bool(lives.any()):
        return torch.ones_like(scale)
    scale = scale / (scale[lives].min() * scale[lives].max()).sqrt()
    return torch.where(lives, scale, torch.ones_like(scale))


def refuses(_site: str, plan: SitePlan, _recipe: Recipe) -> str | None:
    """Why a site must not be asked for: only quantized inputs gain."""
    if plan.scheme is None or plan.scheme.activations is not None:
        return None
    return "its inputs stay in 16 bit, where outliers do no harm. Use awq, or a scheme such as W8A8."


def _peaks(stage: BlockStage, group: ScalableGroup) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each channel in the inputs and in the weights: [S] each."""
    assert group.seen.peak is not None
    weights = torch.stack([stage.weight(site).abs().amax(0) for site in group.sites]).amax(0)
    return group.per_channel(group.seen.peak, reduce="amax"), group.per_channel(weights, reduce="amax")
