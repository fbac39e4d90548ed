"""What a run will need, estimated before any work, and refused when the machine does not have it."""

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from bitwright.errors import ResourceError
from bitwright.methods.composition import needs_of_site
from bitwright.methods.gatherer import STATISTICS_BYTES
from bitwright.methods.low_rank import LOW_RANK
from bitwright.methods.solvers import AUTO
from bitwright.methods.transforms import TRANSFORMS
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.numerics.low_rank import factor_shapes
from bitwright.recipe import Plan
from bitwright.walk import needs_of, needs_teacher

DISK_MARGIN = 1.05
HESSIAN_COPIES = 6
"""Alive at once: the Gram matrix, the Hessian made of it, its permutation, two of the factorisation; one to spare."""
ERROR_COPIES = 3
"""Of a weight's error and of the matrix whose eigenvectors a low-rank addend takes, beside Gram matrix and Hessian."""
LOGIT_COPIES = 3
"""Logits of a window by model and reference, and a copy while one is computed."""
WORKING_BYTES = 450_000_000
"""What does not grow with the model: buffers of the math libraries, the text while it is tokenised, and what the
allocator keeps of freed memory. The remainder of what benchmarks/memory.py measures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a run will take, in bytes.

    Attributes:
        model_bytes: the quantized model on disk.
        work_bytes: hidden states, and transformed models, on disk while the run lasts.
        memory_bytes: peak resident memory above the imports.
        quantized_bits_per_weight: over the quantized sites, scales and zero points included.
    """

    model_bytes: int
    work_bytes: int
    memory_bytes: int
    quantized_bits_per_weight: float


def estimate(
    model: StreamedModel,
    sites: Sequence[Site],
    plan: Plan,
    num_windows: int,
    num_gate: int,
    seqlen: int,
    *,
    transforms: Iterable[str] = (),
    guided_groups: int = 0,
    rank: int = 0,
    auto_blocks: int = 0,
) -> Estimate:
    """Predict sizes from shapes alone.

    Args:
        model: the original.
        sites: of it.
        plan: what becomes of them.
        num_windows: of calibration.
        num_gate: windows of the gate's text.
        seqlen: tokens of a window.
        transforms: those of the whole model write one each.
        guided_groups: groups of output channels with a Hessian of their own.
        rank: of addends.
        auto_blocks: on how many blocks method `auto` tries its candidates; its rival is a second model.
    """
    stored = model.skeleton.checkpoint.stored
    quantized_bits = quantized_weights = replaced_bytes = 0
    for site in sites:
        entry = plan.sites[site.name]
        if entry.scheme is None or entry.granularity is None:
            continue
        weights = site.out_features * site.in_features
        itemsize = stored[model.skeleton.sources[site.parameter][0]].dtype.itemsize
        scheme = replace(entry.scheme.weights, granularity=entry.granularity)
        quantized_bits += scheme.num_bits(site.out_features, site.in_features, float_bits=8 * itemsize)
        if LOW_RANK in entry.repairs:
            factors = factor_shapes(rank, site.out_features, site.in_features)
            quantized_bits += 8 * itemsize * sum(math.prod(dims) for dims in factors)
        quantized_weights += weights
        replaced_bytes += weights * itemsize
    hidden = int(getattr(model.skeleton.model.config.get_text_config(), "hidden_size", 0))
    needs = needs_of(plan)
    # Every stream alternates between two files; others hold what finished parts of a block put out (see `replay`).
    num_hidden = 2 * (num_windows + 2 * num_gate) + num_windows + (2 * num_windows if needs_teacher(needs) else 0)
    num_hidden += num_windows if "cross" in needs else 0
    is_auto = any(entry.method == AUTO for entry in plan.sites.values())
    num_hidden = 2 * num_hidden + 2 * auto_blocks * num_windows if is_auto else num_hidden
    work = num_hidden * seqlen * hidden * model.dtype.itemsize
    if model.device.type == "cpu":
        widest = max((site.in_features for site in sites if plan.sites[site.name].scheme is not None), default=0)
        kept = num_windows * seqlen * (hidden + widest) * model.dtype.itemsize
        work += kept * (2 if "cross" in needs else 1)
    if "guided" in needs:
        work += 4 * guided_groups * num_windows * seqlen * len(plan.quantized)
    models = sum(TRANSFORMS[name].apply_model is not None for name in transforms)
    written = model.skeleton.checkpoint.num_bytes - replaced_bytes + quantized_bits // 8
    work_disk = work + models * (model.skeleton.checkpoint.num_bytes + _tied_bytes(model))
    return Estimate(
        model_bytes=written,
        work_bytes=work_disk + (written if is_auto else 0),
        memory_bytes=_memory(model, sites, plan, num_windows, seqlen) + work,
        quantized_bits_per_weight=quantized_bits / max(1, quantized_weights),
    )


def check(needed: Estimate, out: Path) -> None:
    """Refuse a run that cannot finish on this machine.

    Raises:
        ResourceError: too little disk or memory.
    """
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    disk = int((needed.model_bytes + needed.work_bytes) * DISK_MARGIN)
    if disk > free:
        raise ResourceError(
            f"{out}: the run needs {_gb(disk)} of disk and {_gb(free)} are free. Free space, or choose another --out."
        )
    available = psutil.virtual_memory().available
    if needed.memory_bytes > available:
        raise ResourceError(
            f"the run needs about {_gb(needed.memory_bytes)} of memory and {_gb(available)} are available. "
            "Use fewer or shorter calibration windows, or --dtype bfloat16."
        )


def _memory(model: StreamedModel, sites: Sequence[Site], plan: Plan, num_windows: int, seqlen: int) -> int:
    """The larger of two peaks: a block's weights (float and stored) and Hessians; embedding, head and logits."""
    block_bytes = max(_parameter_bytes(model, name) for name in model.block_names)
    outside = sum(
        model.skeleton.model.get_parameter(name).numel() * model.dtype.itemsize
        for name, _ in model.skeleton.model.named_parameters()
        if not name.startswith(model.blocks_path + ".")
    )
    hessian = error = 0
    for site in sites if num_windows else ():
        entry, (rows, columns) = plan.sites[site.name], (site.out_features, site.in_features)
        if "hessian" in needs_of_site(entry):
            hessian = max(hessian, 8 * columns**2)
        if LOW_RANK in entry.repairs:
            error = max(error, 8 * ERROR_COPIES * (rows * columns + min(rows, columns) ** 2))
    needs = needs_of(plan)
    # Many sums at a time, up to the limit of a pass; a copy of the block, for what it was.
    sums = STATISTICS_BYTES if _has_experts(sites) or "guided" in needs else 0
    rounds = any(entry.scheme is not None and entry.scheme.activations is not None for entry in plan.sites.values())
    sums += hessian * (("cross" in needs) + rounds)
    copies = 3 if "cross" in needs else 2
    inside = copies * block_bytes + max(HESSIAN_COPIES * hessian, 2 * hessian + error) + sums
    vocabulary = int(getattr(model.skeleton.model.config.get_text_config(), "vocab_size", 0))
    return WORKING_BYTES + max(inside, outside + LOGIT_COPIES * 4 * seqlen * vocabulary)


def _tied_bytes(model: StreamedModel) -> int:
    """What weights that are tied take when they come apart, in the model's dtype."""
    tied = sum(model.skeleton.model.get_parameter(name).numel() for name in model.skeleton.tied_names())
    return tied * model.skeleton.checkpoint.dense_dtype.itemsize


def _parameter_bytes(model: StreamedModel, prefix: str) -> int:
    module = model.skeleton.model.get_submodule(prefix)
    return sum(p.numel() for p in module.parameters()) * torch.empty(0, dtype=model.dtype).element_size()


def _has_experts(sites: Sequence[Site]) -> bool:
    return any(site.kind == "expert" for site in sites)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
