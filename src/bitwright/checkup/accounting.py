"""Is every tensor of the original there, is there one too many, and is a site floats while its like are codes?"""

import re
from collections import defaultdict
from typing import Any, cast

from bitwright.checkup.findings import Finding
from bitwright.checkup.stored import QUANTIZATION, DamagedCheckpoint, is_covered, missing_finding
from bitwright.errors import CheckpointError
from bitwright.model.layouts.stored import module_of
from bitwright.model.sites import block_sites
from bitwright.model.stream import StreamedModel

SHOWN = 3
CACHE_PARTS = ("k_scale", "k_zero_point", "v_scale", "v_zero_point")
"""What engines read from an attention layer where the configuration gives the cache a format."""


def account(original: StreamedModel, quantized: StreamedModel, checkpoint: DamagedCheckpoint) -> list[Finding]:
    """Return findings on tensors that are missing, too many, or stored in another way than their like."""
    unused = set(original.skeleton.unused)
    needed = [name for name in original.skeleton.checkpoint.names if name not in unused]
    packed = set(checkpoint.all_packed_names())
    missing = [name for name in needed if name not in checkpoint.held and name not in packed]
    findings = [missing_finding(name) for name in missing]
    extra = sorted(set(quantized.skeleton.unused) - unused - set(original.skeleton.checkpoint.names))
    if cast(dict[str, Any], checkpoint.config[QUANTIZATION]).get("kv_cache_scheme"):
        extra = [name for name in extra if name.rpartition(".")[2] not in CACHE_PARTS]
    if extra:
        findings.append(_extra(extra))
    return [*findings, *_unquantized(original, checkpoint, packed, set(missing))]


def _unquantized(
    model: StreamedModel, checkpoint: DamagedCheckpoint, packed: set[str], missing: set[str]
) -> list[Finding]:
    """Sites that hold floats although those of the same role in other blocks hold codes, or the configuration does."""
    roles: dict[str, list[str]] = defaultdict(list)
    for block in model.block_names:
        for site in block_sites(model.skeleton.model.get_submodule(block), block):
            if site.kind != "router":
                for name in _stored(model, site.parameter, site.index):
                    roles[re.sub(r"\d+", "*", name)].append(name)
    findings: list[Finding] = []
    for names in roles.values():
        floats = [name for name in names if name not in packed and name not in missing]
        for name in floats:
            covered = is_covered(checkpoint.config, module_of(name))
            if covered or len(floats) <= len(names) - len(floats):
                findings.append(_left(name, len(names) - len(floats), covered=covered))
    return findings


def _stored(model: StreamedModel, parameter: str, index: int | None) -> list[str]:
    try:
        pieces = model.skeleton.stored_pieces(parameter)
    except CheckpointError:
        return []
    return [name for name, expert, _, _ in pieces if expert == index]


def _left(name: str, num_alike: int, *, covered: bool) -> Finding:
    site = module_of(name)
    if covered:
        what = f"{site} is stored as floats, but the configuration says that it is quantized: an engine will refuse it."
        remedy = f"Quantize it like the others, or add {site} to the configuration's ignore list."
    else:
        what = f"{site} is stored as floats, as the configuration says, while others of its role are codes."
        remedy = "Nothing, if it was left out on purpose; otherwise quantize it like the others."
    return Finding(
        severity="error" if covered else "warning", kind="unquantized-site", site=site, what=what,
        evidence=f"{num_alike} sites of the same role in other blocks are quantized", remedy=remedy,
    )  # fmt: skip


def _extra(names: list[str]) -> Finding:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return Finding(
        severity="warning", kind="extra-tensor", site=module_of(names[0]),
        what=f"Tensors that neither the original nor the architecture has: {', '.join(names[:SHOWN])}{more}.",
        evidence=f"{len(names)} tensors",
        remedy="Remove them, or find out which layer they were meant for: engines ignore them or refuse the file.",
    )  # fmt: skip
