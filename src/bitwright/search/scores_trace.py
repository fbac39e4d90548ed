"""The trace of the loss's Hessian over each site's weights, by random vectors.

For a vector v of random signs E[v · H v] is the trace of H, and the part of v · H v that one site's weights have is, in
the mean, the trace of that site's own block of H. A product H v takes two backward passes, so one random vector per
window serves all sites at once. The whole model is in memory in float32, with its gradients' graph.

Reference: Hutchinson 1990; HAWQ-v2, arXiv:1911.03852, section 3.2.
"""

from typing import Any, cast

import psutil
import torch
from torch import Tensor

from bitwright.errors import ResourceError
from bitwright.model.checkpoint import Checkpoint
from bitwright.model.sites import Site
from bitwright.model.whole import load_whole
from bitwright.search.question import Question
from bitwright.search.score_cache import ScoreCache

COPIES = 5
"""Weights, their gradients, random vectors, products, and what the graph of the gradients keeps of them."""


def hessian_traces(question: Question) -> dict[str, float]:
    """Return, for each site, the trace of the Hessian of the loss per token over its weights.

    Raises:
        ResourceError: the whole model does not fit into memory.
        RunError: another rank does not deliver its probes.
    """
    num_probes = question.num_probes
    cache = question.cache("probe")
    names = [site.name for site in question.sites]
    own = [probe for probe in range(num_probes) if question.share.has(probe) and cache.missing(str(probe), names)]
    if own:
        _measure(question, cache, own)
    probes = [str(probe) for probe in range(num_probes)]
    cache.wait(probes, names, lambda done, total: question.progress("trace", done, total))
    return {name: sum(cache.rows[probe][name] for probe in probes) / num_probes for name in names}


def _measure(question: Question, cache: ScoreCache, probes: list[int]) -> None:
    skeleton = question.model.skeleton
    _require_memory(skeleton.checkpoint)
    loaded = load_whole(
        skeleton.checkpoint.path,
        dtype=torch.float32,
        attn_implementation="eager",  # others cannot be differentiated twice
        experts_implementation="eager",
        trust_remote_code=skeleton.trust_remote_code,
    )
    model = loaded.to(question.model.device).eval()
    model.requires_grad_(False)
    parameters = {name: cast(Tensor, model.get_parameter(name)) for name in _parameters(question.sites)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for done, probe in enumerate(probes):
        ids = question.calibration[probe : probe + 1].to(question.model.device)
        vectors = random_signs(parameters, question.seed, probe)
        products = _hessian_products(model, ids, parameters, vectors)
        cache.add(str(probe), {site.name: _part(site, vectors, products) for site in question.sites})
        question.progress("trace", done + 1, len(probes))


def _parameters(sites: tuple[Site, ...]) -> list[str]:
    return list(dict.fromkeys(site.parameter for site in sites))


def random_signs(parameters: dict[str, Tensor], seed: int, probe: int) -> dict[str, Tensor]:
    """Return a random vector of ±1 in the shape of each parameter."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + probe)
    return {
        name: (2.0 * torch.randint(2, parameter.shape, generator=generator) - 1).to(parameter.device)
        for name, parameter in parameters.items()
    }


def _hessian_products(
    model: Any, ids: Tensor, parameters: dict[str, Tensor], vectors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """H v, where the loss does not depend on a parameter 0."""
    inputs = list(parameters.values())
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        along = sum((gradient * vectors[name]).sum() for name, gradient in zip(parameters, gradients, strict=True))
    products = torch.autograd.grad(cast(Tensor, along), inputs, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, products, strict=True))


def _part(site: Site, vectors: dict[str, Tensor], products: dict[str, Tensor]) -> float:
    """The part of v · H v that a site's weights have."""
    vector, product = vectors[site.parameter], products[site.parameter]
    if site.index is not None:
        vector, product = vector[site.index], product[site.index]
    return float((vector * product).sum())


def _require_memory(checkpoint: Checkpoint) -> None:
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    needed, available = 4 * COPIES * weights, psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"score trace differentiates the whole model twice: {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB "
            "are available. Use score fisher or output_gradient, which take one block at a time."
        )
