"""Scales that a method folded into a model (AWQ, SmoothQuant): weights differ from the original's and nothing is wrong.

Along a proven edge the producer's channels may be divided by any s if the consumers' columns are multiplied by it
(`model.edits`). Norms say their s outright: the original's weight over the stored one. For linear producers it is
fitted to the producer's rows or a consumer's columns. A scale is believed only if the consumers fit the original better
with it. Rotations of the hidden state fold an orthogonal matrix into all that reads or writes it; the embedding shows.

Legend: O out features, I in features, S channels of an edge.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import cast

import torch
from torch import Tensor

from bitwright.model.stream import StreamedModel
from bitwright.model.structure import Edge
from bitwright.numerics.metrics import sqnr_db

SAME_BASIS_DB = 3.0
"""An embedding that is nearer than this to the original's was at most rounded."""
LEAST_GAIN_DB = 0.05
"""Of consumers with a norm's s folded in: half of them at least fit better, or it is not there."""
CONTRADICTED_DB = 1.0
"""What one end of an edge may lose; an end that is broken gains and loses nothing."""
LEAST_FITTED_GAIN_DB = 3.0
"""The same for scales that were fitted to the consumers themselves."""


@dataclass(slots=True, eq=False)
class Folding:
    """What was folded into the sites of one block.

    Attributes:
        columns: site -> [I] what its columns were multiplied by.
        rows: site -> [O] what its rows were multiplied by.
        producers: where scales were taken from.
    """

    columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    producers: list[str] = field(default_factory=list[str])

    def apply(self, site: str, weight: Tensor) -> Tensor:
        """Return the weight [O, I] as it was folded."""
        rows, columns = self.rows.get(site), self.columns.get(site)
        weight = weight if columns is None else weight * columns
        return weight if rows is None else weight * rows.unsqueeze(1)

    def touches(self, site: str) -> bool:
        """Whether anything was folded into a site."""
        return site in self.columns or site in self.rows


def find_folding(
    edges: Iterable[Edge],
    originals: Mapping[str, Tensor],
    decoded: Mapping[str, Tensor],
    norm_ratio: Callable[[Edge], Tensor | None],
) -> Folding:
    """Find the scales that a block was folded with.

    Args:
        edges: proven on the original.
        originals: site -> weight [O, I].
        decoded: site -> weight [O, I] as the checkpoint holds it, for the sites that can be read.
        norm_ratio: stored over original weight [S] of the norm that an edge starts from; None where they are equal.
    """
    folding = Folding()
    # Norms first: what they fold into a linear producer's columns must not confuse the fit of its rows.
    for edge in sorted(edges, key=lambda each: each.kind == "linear"):
        consumers = [
            name for name in edge.consumers if name in decoded and decoded[name].shape == originals[name].shape
        ]
        if edge.kind == "linear":
            fits = (
                _fitted_to_rows(edge, folding, originals, decoded),
                _fitted_to_columns(edge, folding, originals, decoded, consumers[0]) if consumers else None,
            )
            candidates, needed = [fit for fit in fits if fit is not None], LEAST_FITTED_GAIN_DB
        else:
            ratio = norm_ratio(edge)
            candidates, needed = [] if ratio is None else [ratio], LEAST_GAIN_DB
        gains = [(_gain_db(edge, scale, folding, originals, decoded, consumers), scale) for scale in candidates]
        gain, scale = max(gains, key=lambda pair: pair[0], default=(0.0, None))
        if scale is not None and gain >= needed:
            _fold(edge, scale, folding, originals)
    return folding


def _fitted_to_rows(
    edge: Edge, folding: Folding, originals: Mapping[str, Tensor], decoded: Mapping[str, Tensor]
) -> Tensor | None:
    """Scale [S] that the producer's rows ask for."""
    if edge.producer not in decoded or decoded[edge.producer].shape != originals[edge.producer].shape:
        return None
    rows = slice(None) if edge.rows is None else slice(*edge.rows)
    expected, found = folding.apply(edge.producer, originals[edge.producer])[rows], decoded[edge.producer][rows]
    return _scale_or_none((expected * found).sum(1) / expected.square().sum(1))


def _fitted_to_columns(
    edge: Edge, folding: Folding, originals: Mapping[str, Tensor], decoded: Mapping[str, Tensor], consumer: str
) -> Tensor | None:
    """Scale [S] of the producer's channels that a consumer's columns ask for."""
    expected, found = folding.apply(consumer, originals[consumer]), decoded[consumer]
    channels = torch.tensor(edge.channels(expected.shape[1]), device=expected.device)
    zeros = torch.zeros(int(channels.max()) + 1, device=expected.device)
    power = zeros.index_add(0, channels, expected.square().sum(0))
    shared = zeros.index_add(0, channels, (expected * found).sum(0))
    return _scale_or_none(power / shared)


def _scale_or_none(scale: Tensor) -> Tensor | None:
    """Only positive factors leave the function as it is."""
    return scale if bool((torch.isfinite(scale) & (scale > 0)).all()) else None


def _gain_db(
    edge: Edge,
    scale: Tensor,
    folding: Folding,
    originals: Mapping[str, Tensor],
    decoded: Mapping[str, Tensor],
    consumers: list[str],
) -> float:
    gains: list[float] = []
    for name in consumers:
        expected, found = folding.apply(name, originals[name]), decoded[name]
        channels = torch.tensor(edge.channels(expected.shape[1]), device=expected.device)
        folded = expected / scale[channels]
        if edge.kind != "linear":  # the consumer may be a producer, whose rows are looked at later
            expected, folded = _with_best_rows(expected, found), _with_best_rows(folded, found)
        before, after = sqnr_db(expected, found), sqnr_db(folded, found)
        gains.append(0.0 if before == after else after - before)
    if edge.producer not in decoded:
        return median(gains) if gains else 0.0
    # A factor that only the consumer has is a fault of the consumer: the producer must not contradict it.
    expected, found = folding.apply(edge.producer, originals[edge.producer]), decoded[edge.producer]
    folded = _scaled_rows(edge, expected, scale)
    if folded.shape != found.shape:
        return 0.0
    before, after = sqnr_db(expected, found), sqnr_db(folded, found)
    ends = [0.0 if before == after else after - before, *([median(gains)] if gains else [])]
    return min(ends) if min(ends) < -CONTRADICTED_DB else sum(ends) / len(ends)


def _with_best_rows(expected: Tensor, found: Tensor) -> Tensor:
    """Every row times the factor with which it fits best."""
    power = expected.square().sum(1, keepdim=True)
    return expected * (expected * found).sum(1, keepdim=True) / power.clamp_min(torch.finfo(power.dtype).tiny)


def _scaled_rows(edge: Edge, weight: Tensor, scale: Tensor) -> Tensor:
    """The producer's weight [O, I] with its channels multiplied by `scale` [S]."""
    weight = weight.clone()
    weight[slice(None) if edge.rows is None else slice(*edge.rows)] *= scale.unsqueeze(1)
    return weight


def _fold(edge: Edge, scale: Tensor, folding: Folding, originals: Mapping[str, Tensor]) -> None:
    folding.producers.append(edge.producer)
    for name in edge.consumers:
        weight = originals[name]
        channels = torch.tensor(edge.channels(weight.shape[1]), device=weight.device)
        folding.columns[name] = folding.columns.get(name, torch.ones_like(weight[0])) / scale[channels]
    if edge.producer in originals:
        weight = originals[edge.producer]
        rows = folding.rows.get(edge.producer, torch.ones_like(weight[:, 0])).clone()
        rows[slice(None) if edge.rows is None else slice(*edge.rows)] *= scale
        folding.rows[edge.producer] = rows


def basis(original: StreamedModel, quantized: StreamedModel) -> Tensor | None:
    """Return the rotation [D, D] from the original's hidden basis to the quantized model's; None if they are equal.

    The nearest orthogonal matrix between the embeddings (Procrustes). Both models must hold what is outside the blocks.
    """
    one, other = (cast(Tensor, model.skeleton.model.get_input_embeddings().weight) for model in (original, quantized))
    if one.shape != other.shape or sqnr_db(one, other) > SAME_BASIS_DB:
        return None
    left, _, right = torch.linalg.svd(one.double().T @ other.double())
    return (left @ right).float()
