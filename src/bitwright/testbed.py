"""A test bed for outliers: a model with activation outliers of known place and size that computes the same function.

Large language models have a few hidden channels that are tens of times larger than the rest in every block; they are
why plain 8-bit activations fail. Small models mostly lack them. Here they are planted: the weight of a norm is
multiplied by a power of two in a few channels, and the columns that read them are divided by it (`model.edits`, along
proven edges). Powers of two are exact in floating point, so the logits stay what they were, while the inputs of
the sites now have outliers that an analysis must find and a method must survive.

A norm that anything but its proven consumers reads (the router of a mixture of experts) has no edge and is left alone.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bitwright.errors import RecipeError, RunError, StructureError, VerificationError, did_you_mean
from bitwright.inspection import probe_streamed
from bitwright.model.directory import complete_directory
from bitwright.model.edits import named_tensors, num_channels, scale_edges
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure, Edge
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.preparation import open_model, vocabulary_size
from bitwright.progress import Progress, no_progress
from bitwright.records import write_json_atomic

TESTBED_FILE = "testbed.json"
PROBE_WINDOWS, PROBE_TOKENS = 2, 32
ROUNDINGS = 4
"""Roundings of the largest logit that one block may add; those of several blocks are independent and add as a root."""

EdgeChoice = Literal["norm", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedEdge:
    """One edge along which channels were scaled.

    Attributes:
        producer: the norm or linear site whose channels grew.
        consumers: the sites that see outliers now.
        columns: their input channels that grew.
    """

    producer: str
    consumers: tuple[str, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierTestBed:
    """What was planted; also in `testbed.json` of the directory.

    Attributes:
        path: the model directory.
        source: the model it was made from.
        factor: by how much the channels grew.
        seed: of the choice of channels.
        edges: where.
        exact: every weight is its original times a power of two; not so for norms that scale by 1 + weight.
        max_logit_difference: largest difference from the original's logits on random tokens.
        logit_bound: what rounding explains.
    """

    path: str
    source: str
    factor: float
    seed: int
    edges: tuple[PlantedEdge, ...]
    exact: bool
    max_logit_difference: float
    logit_bound: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def plant_outliers(
    model_dir: str | Path,
    out: str | Path,
    *,
    channels: int = 4,
    factor: float = 64.0,
    seed: int = 0,
    edges: EdgeChoice = "norm",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> OutlierTestBed:
    """Write a model with planted activation outliers that computes the same function, and verify that it does.

    Producers of equal width get the same channels, so that the same hidden channels stand out in every block.

    Args:
        model_dir: model directory or hub id.
        out: directory to write; must not exist or be empty.
        channels: how many channels grow per producer.
        factor: by how much; a power of two above 1.
        seed: of the choice of channels.
        edges: norm (norms before linears, as in real models) or all (also v → o and up → down).
        device: where the model is probed and verified.
        progress: called with (what, done, total).
    Raises:
        RecipeError: a factor that is not a power of two above 1, more channels than there are, unknown edges.
        RunError: `out` exists and is not empty.
        CheckpointError: the model is quantized already.
        StructureError: the model has no proven edge of that kind.
        VerificationError: scaling leaves the exact range of the stored dtype, or the logits moved.
    """
    target = _check_request(Path(out), channels, factor, edges)
    model = open_model(model_dir, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    model.skeleton.checkpoint.require_original()
    plans = [
        _BlockPlan(
            structure=block,
            scales=[(edge, _scale(edge, block, channels, factor, seed)) for edge in _chosen(block, edges)],
        )
        for block in probe_streamed(model, progress).blocks
    ]
    scaled = [pair for plan in plans for pair in plan.scales]
    if not scaled:
        remedy = "Choose edges 'all', or another model." if edges == "norm" else "Choose another model."
        raise StructureError(f"{model_dir}: no proven edge of kind '{edges}' to plant outliers along. {remedy}")
    exact = all(edge.kind != "norm_plus_one" for edge, _ in scaled)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        written.mkdir()
        _write(model, plans, written, progress)
        planted = open_model(written, device=device, dtype="float32", trust_remote_code=trust_remote_code)
        difference, bound = _compare_logits(model, planted, exact, seed)
        result = OutlierTestBed(
            path=str(target), source=str(model_dir), factor=factor, seed=seed,
            edges=tuple(_planted(edge, scale) for edge, scale in scaled),
            exact=exact, max_logit_difference=difference, logit_bound=bound,
        )  # fmt: skip
        write_json_atomic(written / TESTBED_FILE, result.to_json())
        if target.exists():
            target.rmdir()
        written.replace(target)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockPlan:
    """The edges of one block along which channels are scaled, with their scales [S]."""

    structure: BlockStructure
    scales: list[tuple[Edge, Tensor]]


def _check_request(out: Path, channels: int, factor: float, edges: str) -> Path:
    if channels < 1:
        raise RecipeError(f"channels {channels}: plant at least 1.")
    if not (math.isfinite(factor) and factor > 1 and math.frexp(factor)[0] == 0.5):
        raise RecipeError(f"factor {factor}: must be a power of two above 1, which is exact. Use 32, 64 or 128.")
    if edges not in get_args(EdgeChoice):
        raise RecipeError(f"edges '{edges}': unknown.{did_you_mean(edges, get_args(EdgeChoice))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and is not empty. Choose another --out.")
    return out


def _chosen(block: BlockStructure, edges: EdgeChoice) -> list[Edge]:
    return [edge for edge in block.edges if edges == "all" or edge.kind != "linear"]


def _scale(edge: Edge, block: BlockStructure, channels: int, factor: float, seed: int) -> Tensor:
    """`factor` at the chosen channels, else 1: [S]. The choice depends on nothing but S and the seed."""
    width = num_channels(edge, block.sites)
    if channels > width:
        raise RecipeError(f"channels {channels}: {edge.producer} has {width}. Plant fewer.")
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]] = factor
    return scale


def _planted(edge: Edge, scale: Tensor) -> PlantedEdge:
    columns = edge.channels(scale.numel() * edge.repeat)
    grown = tuple(column for column, channel in enumerate(columns) if float(scale[channel]) != 1)
    return PlantedEdge(producer=edge.producer, consumers=edge.consumers, columns=grown)


def _write(model: StreamedModel, plans: Sequence[_BlockPlan], target: Path, progress: Progress) -> None:
    """Write a model directory: one shard per block and one for the rest, index, configuration, tokenizer."""
    checkpoint, skeleton = model.skeleton.checkpoint, model.skeleton
    num_shards = model.num_blocks + 1
    rest = set(checkpoint.stored)
    for index in range(num_shards):
        shard = target / f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        if index < model.num_blocks:
            names = set(skeleton.stored_names(model.block_names[index]))
            changed = _edited(model, index, plans[index])
            rest -= names
        else:
            names, changed = rest, {}
        save_tensors_atomic(shard, {**checkpoint.read_stored(names), **changed})
        progress("plant", index + 1, num_shards)
    complete_directory(checkpoint, target)


def _edited(model: StreamedModel, index: int, plan: _BlockPlan) -> dict[str, Tensor]:
    """Scale one block's edges; return the stored tensors that change, in the dtype they are stored in.

    Raises:
        VerificationError: undoing the edit on what is stored does not give the original, bit for bit.
    """
    skeleton, name, sites = model.skeleton, model.block_names[index], plan.structure.sites
    with model.block(index) as block:
        originals = named_tensors(block, name)
        stored: dict[str, Tensor] = {}
        rounded: dict[str, Tensor] = {}
        for parameter, value in scale_edges(originals, sites, plan.scales).items():
            pieces = skeleton.stored_tensors(parameter, value)
            dtype = next(iter(pieces.values())).dtype
            stored.update(pieces)
            rounded[parameter] = value.to(dtype).to(value.dtype)
        inverse = [(edge, 1 / scale) for edge, scale in plan.scales]
        inexact = {f"{edge.producer}.weight" for edge, _ in plan.scales if edge.kind == "norm_plus_one"}
        for parameter, value in scale_edges({**originals, **rounded}, sites, inverse).items():
            if parameter not in inexact and not torch.equal(value, originals[parameter]):
                dtype = skeleton.checkpoint.stored[skeleton.sources[parameter][0]].dtype
                raise VerificationError(
                    f"{parameter}: the scaled weight leaves the exact range of {dtype}. Use a smaller factor."
                )
    return stored


def _compare_logits(model: StreamedModel, planted: StreamedModel, exact: bool, seed: int) -> tuple[float, float]:
    """Return the largest logit difference on random tokens and what rounding explains.

    Raises:
        VerificationError: the difference is larger, or not a number.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # not the tokens on which the edges were proven
    ids = torch.randint(vocabulary_size(model), (PROBE_WINDOWS, PROBE_TOKENS), generator=generator)
    expected, found = model.logits(ids), planted.logits(ids)
    difference = float((found - expected).abs().max())
    stored = {info.dtype for info in model.skeleton.checkpoint.stored.values() if info.dtype.is_floating_point}
    eps = torch.finfo(model.dtype).eps if exact else max(torch.finfo(dtype).eps for dtype in stored)
    bound = ROUNDINGS * math.sqrt(model.num_blocks) * eps * float(expected.abs().max())
    if not difference <= bound:
        raise VerificationError(
            f"{planted.skeleton.checkpoint.path.name}: planting moved the logits by {difference:.3g}; rounding "
            f"explains {bound:.3g}. Nothing was written."
        )
    return difference, bound
