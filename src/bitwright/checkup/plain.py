"""What a block stores as floats: norms, biases, and weights that were left alone. They should be the original's."""

from collections.abc import Iterable

from torch import nn

from bitwright.checkup.findings import Finding
from bitwright.checkup.folding import Folding
from bitwright.checkup.stored import DamagedCheckpoint
from bitwright.model.layouts.stored import module_of
from bitwright.model.sites import block_sites
from bitwright.model.stream import StreamedModel
from bitwright.numerics.metrics import sqnr_db

ROUNDED_DB = 40.0
"""A plain tensor that is further from the original's than rounding to bfloat16 explains was changed."""


def compare_plain(
    original: StreamedModel,
    checkpoint: DamagedCheckpoint,
    index: int,
    block: nn.Module,
    folding: Folding,
    known: Iterable[Finding],
) -> list[Finding]:
    """Compare the plain tensors of a block, in memory, with those that a checkpoint holds.

    What was folded changes the producers' norms and biases; sites with a finding of their own are left out.
    """
    prefix = original.block_names[index]
    sites = {site.parameter: site for site in block_sites(block, prefix)}
    left_out = {*checkpoint.all_packed_names(), *checkpoint.stand_ins}
    mentioned = {finding.site for finding in known}
    findings: list[Finding] = []
    for parameter, sources in original.skeleton.sources.items():
        module = module_of(parameter) if parameter.endswith(".weight") else parameter.rpartition(".")[0]
        is_here = parameter.startswith(prefix + ".") and len(sources) == 1 and sources[0] not in left_out
        if not is_here or module in mentioned or (module in folding.producers and parameter not in sites):
            continue
        expected = block.state_dict()[parameter[len(prefix) + 1 :]].float()
        site = sites.get(parameter)
        if site is not None and site.index is None and not site.transposed:
            expected = folding.apply(site.name, expected)
        found = checkpoint.read(sources)[sources[0]].to(expected)
        level = sqnr_db(expected, found)
        if level < ROUNDED_DB:
            findings.append(_changed(parameter, level))
    return findings


def _changed(parameter: str, level_db: float) -> Finding:
    return Finding(
        severity="warning", kind="changed-tensor", site=module_of(parameter),
        what=f"{parameter} is stored as floats and differs from the original's; nothing was folded that explains it.",
        evidence=f"{level_db:.1f} dB",
        remedy="Nothing, if a method trained or corrected it. Otherwise copy it from the original.",
    )  # fmt: skip
