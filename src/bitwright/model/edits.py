"""Change a block's weights without changing its function: scale a producer's channels, unscale its consumers' columns.

Along a proven edge (`structure.Edge`) the producer's channel j may be multiplied by any s_j > 0 if every consumer
divides its column j by the same s_j. What flows between them grows by s_j, and the block computes what it did before.
SmoothQuant and AWQ choose s so that quantization hurts less; the outlier test bed chooses it so that it hurts more.

    kind            producer                     consumers
    norm            weight · s, bias · s         W[:, j] / s_j
    norm_plus_one   (1 + weight) · s - 1         W[:, j] / s_j
    linear          rows · s, bias · s           W[:, j] / s_channel(j)     (grouped heads: several columns per channel)

Nothing here changes a tensor it is given: weights come as a mapping from full parameter names and the changed ones go
back as new tensors, so that a search may try many scales. Results are rounded once, to the dtype of the weight.

Shapes: O out features, I in features, S scaled channels of the producer.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bitwright.errors import ShapeError, StructureError, VerificationError
from bitwright.model.sites import Site, join
from bitwright.model.structure import Edge
from bitwright.numerics.linalg import wide_dtype


def named_tensors(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return a block's parameters under their full names: what `scale_edge` works on.

    Args:
        block: a decoder block whose weights are in memory.
        prefix: its name in the full model.
    """
    return {join(prefix, name): parameter.detach() for name, parameter in block.named_parameters()}


def replace_tensors(block: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, as `scale_edge` returns them, into the parameters of a block."""
    for name, tensor in tensors.items():
        block.get_parameter(name[len(prefix) + 1 :] if prefix else name).detach().copy_(tensor)


def bias_name(parameter: str) -> str:
    """Return the name that the bias of a weight has, if it has one."""
    path, _, leaf = parameter.rpartition(".")
    return f"{path}.bias" if leaf == "weight" else f"{parameter}_bias"  # as transformers names experts' biases


def num_channels(edge: Edge, sites: Iterable[Site]) -> int:
    """Return S, how many channels of the producer the consumers read: the length of an edge's scale."""
    consumer = next(site for site in sites if site.name == edge.consumers[0])
    return consumer.in_features // edge.repeat


def scale_edge(tensors: Mapping[str, Tensor], sites: Iterable[Site], edge: Edge, scale: Tensor) -> dict[str, Tensor]:
    """Multiply the producer's channels by `scale` and divide the consumers' columns by it: the same function.

    Args:
        tensors: full parameter name to tensor, any float dtype; must hold what the edge touches; not modified.
        sites: the sites of the block.
        edge: proven.
        scale: [S], > 0; powers of two are exact as long as nothing leaves the range of the dtype.
    Returns:
        the parameters that change, whole and in their own dtype.
    Raises:
        ShapeError: the scale is not [S].
        StructureError: a parameter that the edge touches is not among the tensors.
        VerificationError: a scale is not positive and finite, or a result overflows its dtype.
    """
    return scale_edges(tensors, sites, [(edge, scale)])


def scale_edges(
    tensors: Mapping[str, Tensor], sites: Iterable[Site], scales: Iterable[tuple[Edge, Tensor]]
) -> dict[str, Tensor]:
    """Scale several edges, one after the other, and copy each parameter only once; see `scale_edge`."""
    changed = _Changed(tensors)
    by_name = {site.name: site for site in sites}
    for edge, scale in scales:
        _check_scale(edge, num_channels(edge, by_name.values()), scale)
        _scale_producer(changed, by_name, edge, scale)
        for name in edge.consumers:
            site = by_name[name]
            channels = torch.tensor(edge.channels(site.in_features), device=scale.device)
            view = _view(changed.writable(site.parameter), site)
            view.copy_(_wide(view).div_(_wide(scale[channels].to(view.device))))
    changed.check_finite()
    return changed.tensors


class _Changed:
    """The tensors that an edit changes: copied on first use, so that the originals stay."""

    def __init__(self, originals: Mapping[str, Tensor]) -> None:
        self._originals = originals
        self.tensors: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._originals

    def writable(self, name: str) -> Tensor:
        if name not in self._originals:
            raise StructureError(f"{name}: not among the tensors to edit. Pass all parameters of its block.")
        if name not in self.tensors:
            self.tensors[name] = self._originals[name].detach().clone()
        return self.tensors[name]

    def check_finite(self) -> None:
        for name, tensor in self.tensors.items():
            if not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(self._originals[name]).all()):
                raise VerificationError(f"{name}: scaling leaves the range of {tensor.dtype}. Use scales closer to 1.")


def _scale_producer(changed: _Changed, sites: Mapping[str, Site], edge: Edge, scale: Tensor) -> None:
    site = sites.get(edge.producer)
    weight = changed.writable(f"{edge.producer}.weight" if site is None else site.parameter)
    weight = weight if site is None else _view(weight, site)
    rows = slice(None) if edge.rows is None else slice(*edge.rows)
    factor = scale.to(weight.device)
    if edge.kind == "norm_plus_one":
        # The sum loses digits of the weight, which only the widest float has to spare.
        wide = wide_dtype(weight.device)
        weight.copy_((1 + weight.to(wide)).mul_(factor.to(wide)).sub_(1))
    else:
        part = weight[rows]
        part.copy_(_wide(part).mul_(_wide(factor if part.ndim == 1 else factor.unsqueeze(1))))
    name = _bias_name(edge, site)
    if name in changed:
        bias = changed.writable(name)
        part = (bias if site is None or site.index is None else bias[site.index])[rows]
        part.copy_(_wide(part).mul_(_wide(factor)))


def _bias_name(edge: Edge, site: Site | None) -> str:
    return f"{edge.producer}.bias" if site is None else bias_name(site.parameter)


def _view(weight: Tensor, site: Site) -> Tensor:
    """The site's weight [O, I] inside its parameter."""
    weight = weight if site.index is None else weight[site.index]
    return weight.T if site.transposed else weight


def _wide(x: Tensor) -> Tensor:
    """A copy in at least float32, so that the result is rounded once."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _check_scale(edge: Edge, expected: int, scale: Tensor) -> None:
    if tuple(scale.shape) != (expected,):
        raise ShapeError(f"{edge.producer}: a scale {list(scale.shape)} must be [{expected}], one per channel.")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise VerificationError(
            f"{edge.producer}: scales must be positive and finite; an edge is proven for no others."
        )
