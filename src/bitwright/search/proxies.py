"""A first look at what rounding does to the weights of a model: seconds, no text, a sample of its sites."""

from collections.abc import Sequence
from statistics import median

import torch

from bitwright.errors import ShapeError
from bitwright.model.sites import Site, block_sites, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.numerics.metrics import sqnr_db
from bitwright.recipe import QUANTIZABLE_KINDS, Recipe
from bitwright.schemes import Scheme
from bitwright.search.rounding import Rounder

NUM_BLOCKS, MAX_ROWS = 3, 128


def sampled_sqnr_db(model: StreamedModel, schemes: Sequence[Scheme]) -> dict[str, float]:
    """Return, by scheme, the median SQNR in dB of the weights of a few blocks rounded to nearest.

    It says how schemes compare on these weights, not what the model loses: that needs text. Schemes that fit no row are
    left out.
    """
    names = [model.block_names[index] for index in _spread(model.num_blocks)]
    sites = {name: _sampled_sites(model, name) for name in names}
    every = [site for block in sites.values() for site in block]
    rounders: dict[str, Rounder] = {}
    for scheme in schemes:
        try:
            rounders[str(scheme)] = Rounder(model.skeleton, every, [scheme], Recipe(scheme=scheme, method="rtn"))
        except ShapeError:
            continue
    found: dict[str, list[float]] = {name: [] for name in rounders}
    for name, members in sites.items():
        with model.block(model.block_names.index(name)) as block:
            for site in members:
                weight = weight_view(block, site, name)[:MAX_ROWS].float()
                for scheme, rounder in rounders.items():
                    found[scheme].append(sqnr_db(weight, rounder.round(site, scheme, weight, None)))
    return {scheme: median(values) for scheme, values in found.items() if values}


def _sampled_sites(model: StreamedModel, name: str) -> list[Site]:
    """One site per parameter: of experts the first."""
    sites = block_sites(model.skeleton.model.get_submodule(name), name)
    return [site for site in sites if site.kind in QUANTIZABLE_KINDS and site.index in (None, 0)]


def _spread(count: int) -> list[int]:
    return sorted({int(place) for place in torch.linspace(0, count - 1, NUM_BLOCKS).round().tolist()})
