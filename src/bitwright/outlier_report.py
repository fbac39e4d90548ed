"""Where a model's activation outliers are, what they cost under common number formats, and what helps.

The unquantized model runs block by block over calibration text. For every group of sites that read one input: its
statistics over all tokens (`calibration.activity`), the measured and predicted losses on a bounded sample of tokens
(`calibration.losses`), and advice. A remedy is advised only where it gains measurably on the sample.

The result is plain data (`asdict`), one entry per group.
"""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.activity import ActivityStats, OutlierChannel
from bitwright.calibration.losses import (
    INPUT_FORMATS,
    WEIGHT_FORMATS,
    FormatLoss,
    OutputBench,
    TokenSample,
    smoothing_scale,
)
from bitwright.evaluation.streamed import batch_slices, enter_all
from bitwright.inspection import probe_streamed
from bitwright.model.activations import Activations
from bitwright.model.sites import Site, SiteCalls, SiteKind, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure, Edge
from bitwright.numerics.entropy import allocation_gain_db
from bitwright.numerics.granularity import Granularity
from bitwright.progress import Progress

SAMPLE_TOKENS = 512
SAMPLE_BYTES = 256_000_000
"""Memory that the samples of one block may take; a block with many experts keeps fewer tokens per group."""
FEWEST_SAMPLE_TOKENS = 16

ENOUGH_DB = 40.0
"""An error of 1 % of the outputs, about what 8-bit weights cost by themselves: less needs no remedy."""
CHEAP_GAIN_DB = 3.0
"""Half a bit: what another format or granularity must gain."""
COSTLY_GAIN_DB = 6.0
"""A bit: what a change of weights or a second path at run time must gain."""
ONE_SIDED = 0.5
"""From here on one end of the range is three times as far from 0 as the other."""
MAX_KEPT_SHARE = 0.05
"""Outlier channels beyond this share of all are too many to keep in 16 bit."""
SMOOTHING_ALPHAS = (0.5, 0.75)
ALLOCATED, UNIFORM_BITS = Granularity(kind="group", group_size=128), 4.0
DB_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputStatistics:
    """How the inputs of a group are spread; see the properties of `ActivityStats`.

    Attributes:
        channel_absmax_deciles: largest magnitude per channel: smallest, 10 %, ..., 90 % and largest of all channels.
        kurtosis: of all values; None where they hardly vary.
        max_channel_kurtosis: of the most heavy-tailed channel; None where all hardly vary.
        token_histogram: (lower border, tokens) of the tokens' largest magnitude, bins of an eighth of an octave.
    """

    low: float
    high: float
    rms: float
    dynamic_range_db: float
    kurtosis: float | None
    max_channel_kurtosis: float | None
    fraction_negative: float
    one_sidedness: float
    outlier_channels: tuple[OutlierChannel, ...]
    outlier_token_ratio: float | None
    channel_absmax_deciles: tuple[float, ...]
    token_histogram: tuple[tuple[float, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteActivity:
    """One group of sites that read one input.

    Attributes:
        sites: their names.
        kind: linear or expert.
        in_features: I.
        producers: norms or linears whose proven edge scales just this input.
        num_tokens: tokens that reached the sites.
        num_sampled: tokens on which losses were measured.
        statistics: None where no token arrived.
        inputs: losses of the inputs under `INPUT_FORMATS`; empty where no token arrived.
        weights: losses of the weights under `WEIGHT_FORMATS`; empty where no token arrived.
        water_filled_bits: bits per weight that would err as little as 4 bits everywhere if every group of 128 weights
            had bits of its own (reverse water-filling, Gaussian rates); None where no token arrived.
        advice: what follows, each with its measured gain; at least one entry.
    """

    sites: tuple[str, ...]
    kind: SiteKind
    in_features: int
    producers: tuple[str, ...]
    num_tokens: int
    num_sampled: int
    statistics: InputStatistics | None
    inputs: tuple[FormatLoss, ...]
    weights: tuple[FormatLoss, ...]
    water_filled_bits: float | None
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def analyse(model: StreamedModel, windows: Tensor, progress: Progress) -> tuple[SiteActivity, ...]:
    """Run a model over windows [N, T] and analyse the inputs of every group of sites, block by block.

    Routers stay in 16 bit everywhere and are left out.

    Args:
        model: unquantized.
        windows: token ids, int64.
        progress: called with (what, done, total).
    Raises:
        CheckpointError: the model is quantized already.
        VerificationError: NaN or Inf in the activations.
    """
    model.skeleton.checkpoint.require_original()
    structure = probe_streamed(model, progress)
    found: list[SiteActivity] = []
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        store = enter_all(model, windows, Path(folder) / "hidden.bin")
        for index, block_structure in enumerate(structure.blocks):
            with model.block(index) as block:
                records = _record(model, index, block, block_structure, store)
                found.extend(_entry(block, block_structure.name, record) for record in records)
            progress("analyse", index + 1, model.num_blocks)
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """What one run of a block tells about one group."""

    sites: tuple[Site, ...]
    edges: tuple[Edge, ...]
    stats: ActivityStats
    sample: TokenSample


def _record(
    model: StreamedModel, index: int, block: nn.Module, structure: BlockStructure, store: Activations
) -> list[_Record]:
    """Run a block over all hidden states, which move on to the next block, and watch the inputs of its groups."""
    kept = [site for site in structure.sites if site.kind != "router"]
    groups = [(group, tuple(site for site in kept if site.name in group.sites)) for group in structure.groups]
    groups = [(group, sites) for group, sites in groups if sites]
    bytes_per_token = 4 * sum(sites[0].in_features for _, sites in groups)
    size = min(SAMPLE_TOKENS, max(FEWEST_SAMPLE_TOKENS, SAMPLE_BYTES // max(1, bytes_per_token)))
    records = {
        sites[0].name: _Record(
            sites=sites,
            edges=tuple(edge for edge in structure.edges if set(edge.consumers) == set(group.sites)),
            stats=ActivityStats.empty(sites[0].in_features),
            sample=TokenSample(size, seed=index),
        )
        for group, sites in groups
    }

    def on_call(site: Site, x: Tensor) -> None:
        record = records.get(site.name)
        if record is not None:
            record.stats.observe(x)
            record.sample.add(x)

    with SiteCalls(block, [site for site in structure.sites if site.name in records], on_call):
        for start, end in batch_slices(store.shape[0], store.shape[1]):
            store.write(start, model.run_block(block, index, store.read(start, end, model.device)))
    return list(records.values())


def _entry(block: nn.Module, prefix: str, record: _Record) -> SiteActivity:
    sites, tokens = record.sites, record.sample.tokens
    inputs: tuple[FormatLoss, ...] = ()
    weights: tuple[FormatLoss, ...] = ()
    water_filled_bits: float | None = None
    advice = ("none: no token reached these sites, so nothing is known of their inputs; use more or other text",)
    if tokens is not None and tokens.shape[0]:
        views = [weight_view(block, site, prefix).float().contiguous() for site in sites]
        bench = OutputBench(tokens, views)
        low, high = float(record.stats.low.min()), float(record.stats.high.max())
        inputs = tuple(bench.input_loss(name, granularity, low, high) for name, granularity in INPUT_FORMATS)
        weights = tuple(bench.weight_loss(name, granularity) for name, granularity in WEIGHT_FORMATS)
        water_filled_bits = _water_filled_bits(views)
        advice = _advice(record, bench, inputs, weights)
    return SiteActivity(
        sites=tuple(site.name for site in sites),
        kind=sites[0].kind,
        in_features=sites[0].in_features,
        producers=tuple(edge.producer for edge in record.edges),
        num_tokens=record.stats.num_tokens,
        num_sampled=0 if tokens is None else tokens.shape[0],
        statistics=_statistics(record.stats) if record.stats.num_tokens else None,
        inputs=inputs,
        weights=weights,
        water_filled_bits=water_filled_bits,
        advice=advice,
    )


def _water_filled_bits(weights: list[Tensor]) -> float:
    """Bits per weight that reach the error of `UNIFORM_BITS` everywhere when each group gets what its variance asks."""
    groups = [ALLOCATED.split(weight) for weight in weights]
    variances = torch.cat([group.square().mean(-1).flatten() for group in groups])
    counts = torch.ones_like(variances)
    if not bool((variances > 0).any()):
        return 0.0
    gain_db = allocation_gain_db(variances, counts, UNIFORM_BITS)
    return UNIFORM_BITS - gain_db / DB_PER_BIT


def _statistics(stats: ActivityStats) -> InputStatistics:
    absmax = stats.channel_absmax.sort().values
    last = absmax.numel() - 1
    by_channel = [value for value in stats.channel_kurtosis.tolist() if not math.isnan(value)]
    return InputStatistics(
        low=float(stats.low.min()),
        high=float(stats.high.max()),
        rms=stats.rms,
        dynamic_range_db=stats.dynamic_range_db,
        kurtosis=None if math.isnan(stats.kurtosis) else stats.kurtosis,
        max_channel_kurtosis=max(by_channel, default=None),
        fraction_negative=stats.fraction_negative,
        one_sidedness=stats.one_sidedness,
        outlier_channels=stats.outlier_channels,
        outlier_token_ratio=stats.outlier_token_ratio,
        channel_absmax_deciles=tuple(float(absmax[last * tenth // 10]) for tenth in range(11)),
        token_histogram=stats.token_histogram,
    )


def _advice(
    record: _Record, bench: OutputBench, inputs: tuple[FormatLoss, ...], weights: tuple[FormatLoss, ...]
) -> tuple[str, ...]:
    """Say what gains, by the outputs of the sites. Each entry starts with a keyword and a colon."""
    db = {(loss.format, loss.granularity): loss.output_sqnr_db for loss in (*inputs, *weights)}
    stats, per_tensor, per_token = record.stats, db["int8", "tensor"], db["int8", "token"]
    advice: list[str] = []
    if _gains(per_token, per_tensor, CHEAP_GAIN_DB):
        advice.append(f"per-token: int8 inputs with a scale per token, not per tensor, {_from(per_tensor, per_token)}")
    if abs(stats.one_sidedness) >= ONE_SIDED and _gains(db["uint8", "tensor"], per_tensor, CHEAP_GAIN_DB):
        advice.append(
            f"asymmetric: the inputs lie on one side ({stats.low.min():.3g} to {stats.high.max():.3g}); "
            f"a zero point per tensor, {_from(per_tensor, db['uint8', 'tensor'])}"
        )
    advice.extend(_channel_advice(record, bench))
    if _gains(db["fp8-e4m3", "token"], per_token, CHEAP_GAIN_DB):
        advice.append(
            f"fp8: the inputs span {stats.dynamic_range_db:.0f} dB; fp8-e4m3 per token instead of int8, "
            f"{_from(per_token, db['fp8-e4m3', 'token'])}"
        )
    if _gains(db["int4", "g128"], db["int4", "channel"], CHEAP_GAIN_DB):
        advice.append(
            "groups: 4-bit weights in groups of 128 instead of per channel, "
            f"{_from(db['int4', 'channel'], db['int4', 'g128'])}"
        )
    if not advice:
        why = "enough" if _level(per_tensor) >= ENOUGH_DB else f"and no remedy gains {CHEAP_GAIN_DB:g} dB"
        advice.append(f"none: int8 inputs per tensor keep {_level(per_tensor):.1f} dB of the outputs, {why}")
    return tuple(advice)


def _channel_advice(record: _Record, bench: OutputBench) -> list[str]:
    """Smooth outlier channels into the weights, or keep them in 16 bit where that gains still more."""
    plain = bench.w8a8_sqnr_db()
    advice: list[str] = []
    best = plain
    for edge in record.edges:
        alpha, smoothed = _smoothed(record.stats, bench, edge)
        if _gains(smoothed, best, COSTLY_GAIN_DB):
            advice.append(f"smooth: over {edge.producer} with alpha {alpha:g}, W8A8 {_from(plain, smoothed)}")
            best = smoothed
    outliers = [channel.index for channel in record.stats.outlier_channels]
    if outliers and len(outliers) <= MAX_KEPT_SHARE * record.stats.num_channels:
        kept = bench.w8a8_sqnr_db(kept=torch.tensor(outliers, device=bench.inputs.device))
        if _gains(kept, best, COSTLY_GAIN_DB):
            advice.append(f"keep: {len(outliers)} outlier channels in 16 bit, W8A8 {_from(best, kept)}")
    return advice


def _smoothed(stats: ActivityStats, bench: OutputBench, edge: Edge) -> tuple[float, float | None]:
    """Return the best alpha and what W8A8 then keeps of the outputs."""
    channels = edge.channels(stats.num_channels)
    found: dict[float, float | None] = {}
    for alpha in SMOOTHING_ALPHAS:
        scale = smoothing_scale(stats.channel_absmax, bench.weights, channels, alpha=alpha)
        found[alpha] = bench.w8a8_sqnr_db(scale=scale.to(bench.inputs.device))
    best = max(found, key=lambda alpha: _level(found[alpha]))
    return best, found[best]


def _level(sqnr_db: float | None) -> float:
    """No error at all is better than any."""
    return math.inf if sqnr_db is None else sqnr_db


def _gains(after: float | None, before: float | None, least: float) -> bool:
    return _level(before) < ENOUGH_DB and _level(after) - _level(before) >= least


def _from(before: float | None, after: float | None) -> str:
    return f"{_level(before):.1f} -> {_level(after):.1f} dB of the outputs"
