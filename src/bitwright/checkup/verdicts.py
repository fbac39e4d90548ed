"""Findings that need the whole examination: scales of another site, losses without a known cause, inputs, depth."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitwright.checkup.examination import Examination, Suspect, rough_sqnr_db
from bitwright.checkup.faults import FIT_AGAIN, GAIN_DB, RESTORED_DB, SUSPICIOUS_DB, scale_gain_db
from bitwright.checkup.findings import BlockDepth, Finding, Severity
from bitwright.checkup.sites import Measured, SiteCase, groups_of
from bitwright.numerics.grid import Grid

FEW_BITS = 4
"""Below, a model may be lost without a fault in its checkpoint."""
BLOCK_MARGIN_DB = 9.0
"""By how much less than its weakest weight a block may keep: seven sites that err alike cost 8.5 dB."""
INPUT_DB = 20.0
"""Inputs that cost more than a tenth of the outputs' amplitude are worth a word."""
OUTLIER_RATIO = 8.0
SHOWN_CHANNELS = 4
DIVERGED_DB = 10.0
"""So far above its lowest level the error of the hidden state is a third of the largest."""
LOST_SHARE = 0.5
"""Of ln V: from here on the quantized model knows little of what the original does."""


def pair_findings(exam: Examination) -> list[Finding]:
    """Sites whose scales belong to another site."""
    findings: list[Finding] = []
    for suspect, partner, stored, restored in _swapped(exam.suspects):
        site, other = suspect.case.site, partner.case.site
        findings.append(
            Finding(
                severity="error",
                kind="swapped-scales",
                site=site,
                what=f"The scales of {site} fit those codes badly, and the scales of {other} fit them well.",
                evidence=f"weights {stored:.1f} dB as stored, {restored:.1f} dB with the scales of {other}",
                remedy=f"Exchange weight_scale (and weight_zero_point) between {site} and {other}.",
            )
        )
    return findings


def vague_findings(exam: Examination) -> list[Finding]:
    """Losses that no fault explains: errors where the block's outputs confirm them, warnings elsewhere."""
    explained = {finding.site for finding in exam.findings if finding.severity == "error"}
    found: list[Finding] = []
    for block, entries in exam.vague.items():
        others = any(case.site in explained for case, _ in entries) or _has_error(exam, block)
        lost = block >= 0 and not others and _is_lost(exam.depth[block], [measured for _, measured in entries])
        for case, measured in entries:
            if case.site not in explained and measured.loss_db >= SUSPICIOUS_DB:
                found.append(_vague(case, measured, exam.depth[block] if block >= 0 else None, lost=lost))
    return found


def input_findings(exam: Examination) -> list[Finding]:
    """Inputs that their format cannot bear, with the channels that are to blame."""
    findings: list[Finding] = []
    for figures in exam.figures:
        peaks = exam.input_peaks.get(figures.site)
        level = figures.input_sqnr_db
        if peaks is None or level is None or level >= INPUT_DB:
            continue
        ratio = peaks / peaks.median().clamp_min(1e-30)
        loud = torch.nonzero(ratio >= OUTLIER_RATIO).flatten()
        if not len(loud):
            continue
        findings.append(_outliers(figures.site, level, ratio, loud))
    return findings


def depth_findings(exam: Examination, kl: float, vocabulary: int) -> list[Finding]:
    """Where the hidden state leaves the original's, what was folded or turned, and whether logits are lost."""
    findings = [_divergence(exam, kl, vocabulary)]
    if exam.folds:
        findings.append(
            Finding(
                severity="note",
                kind="folded-transform",
                site="model",
                what="Scales were folded into norms and weights; weights were compared after the same scaling.",
                evidence=f"in {len(exam.folds)} blocks, first {exam.folds[0]}",
                remedy="None: AWQ, SmoothQuant and their like do this, and the function stays.",
            )
        )
    if exam.frame is not None:
        findings.append(
            Finding(
                severity="note",
                kind="changed-basis",
                site="model",
                what="The hidden basis was changed (a rotation): weights cannot be compared with the original's. "
                "Blocks and logits were.",
                evidence="the embedding is the original's times an orthogonal matrix",
                remedy="None, if it was rotated on purpose.",
            )
        )
    names = sorted(exam.checkpoint.stand_ins - set(exam.original.skeleton.unused))
    if names:
        findings.append(
            Finding(
                severity="note",
                kind="replaced",
                site="model",
                what="Weights that cannot be read were taken from the original, so that the rest could be run.",
                evidence=f"{len(names)} tensors, first {names[0]}",
                remedy="Read divergence and depth as those of the mended model.",
            )
        )
    return findings


def _swapped(suspects: list[Suspect]) -> Iterator[tuple[Suspect, Suspect, float, float]]:
    """Pairs of sites whose scales fit each other's codes: (site, partner, dB as stored, dB with the other's scales)."""
    for suspect in suspects:
        groups = groups_of(suspect.case)
        assert groups is not None
        limit, stored = groups.sqnr_db(*groups.best()), groups.sqnr_db(groups.scale)
        found: list[tuple[float, Suspect]] = []
        for other in suspects:
            grid = other.case.quantized.weight.grid
            if other is suspect or not isinstance(grid, Grid) or grid.scale.shape != groups.scale.shape:
                continue
            zero = None if grid.zero_point is None else grid.zero_point.float()
            tried = [None, zero] if zero is not None and groups.zero_point is not None else [None]
            found += [(groups.sqnr_db(grid.scale.float(), each), other) for each in tried]
        best = max(found, key=lambda entry: entry[0], default=None)
        if best is not None and best[0] >= max(limit - RESTORED_DB, stored + GAIN_DB):
            yield suspect, best[1], stored, best[0]


def _has_error(exam: Examination, block: int) -> bool:
    if block < 0:
        return False
    prefix = exam.original.block_names[block] + "."
    return any(finding.severity == "error" and finding.site.startswith(prefix) for finding in exam.findings)


def _is_lost(depth: BlockDepth, measured: list[Measured]) -> bool:
    """Whether a block keeps much less of what it adds than its weights, rounded to nearest, would let it."""
    weakest = min(each.expected_weight_db for each in measured)
    return depth.update_sqnr_db is not None and depth.update_sqnr_db < weakest - BLOCK_MARGIN_DB


def _vague(case: SiteCase, measured: Measured, depth: BlockDepth | None, *, lost: bool) -> Finding:
    groups = groups_of(case)
    gain = 0.0 if groups is None else scale_gain_db(groups)
    are_scales = gain >= SUSPICIOUS_DB
    what = (
        "The codes fit the original and the scales do not."
        if are_scales
        else "The weight is further from the original's than rounding to nearest, and no known fault explains it."
    )
    outputs = "" if measured.output_db is None else f", outputs {measured.output_db:.1f} dB"
    block = "" if depth is None or depth.update_sqnr_db is None else f"; its block keeps {depth.update_sqnr_db:.1f} dB"
    return Finding(
        severity="error" if lost else "warning", kind="wrong-scales" if are_scales else "weight-loss", site=case.site,
        what=what,
        evidence=f"weights {measured.weight_db:.1f} dB, expected {measured.expected_weight_db:.1f} dB{outputs}{block}",
        remedy=FIT_AGAIN
        if lost
        else "Look at the block's figure: a method that trains or folds weights in a way that is not recognised here "
        f"gives this and keeps the block's outputs. Otherwise: {FIT_AGAIN}",
    )  # fmt: skip


def _outliers(site: str, level_db: float, ratio: Tensor, loud: Tensor) -> Finding:
    order = loud[ratio[loud].argsort(descending=True)][:SHOWN_CHANNELS]
    shown = ", ".join(f"{int(channel)} ({float(ratio[channel]):.0f}×)" for channel in order)
    return Finding(
        severity="warning", kind="activation-outliers", site=site,
        what=f"{len(loud)} channels of the inputs are more than their format can bear: {shown} the median channel.",
        evidence=f"{level_db:.1f} dB of the outputs are left when only the inputs are quantized",
        remedy="Fold the outliers into the weights (smoothquant), spread them (rotation), keep these channels as "
        "floats (llm_int8), or give the inputs finer scales or FP8.",
    )  # fmt: skip


def first_to_diverge(depth: Sequence[BlockDepth]) -> BlockDepth | None:
    """The first block after which the hidden state errs a third as much as it does at worst; None if it never does."""
    lowest = min((each.hidden_sqnr_db for each in depth if each.hidden_sqnr_db is not None), default=0.0)
    near = (each for each in depth if each.hidden_sqnr_db is not None and each.hidden_sqnr_db <= lowest + DIVERGED_DB)
    return next(near, None)


def _divergence(exam: Examination, kl: float, vocabulary: int) -> Finding:
    """The block that loses most, and where that begins; an error where the model is lost and nothing else says why."""
    levels = {depth.block: depth.update_sqnr_db for depth in exam.depth if depth.update_sqnr_db is not None}
    worst = min(levels, key=lambda name: levels[name], default=exam.original.block_names[0])
    last = exam.depth[-1].hidden_sqnr_db
    hidden = "equal" if last is None else f"{last:.1f} dB"
    first = first_to_diverge(exam.depth)
    start = "" if first is None else f" The hidden state diverges first after {first.block}."
    at_start = "hidden state " if first is None else f"hidden state {first.hidden_sqnr_db:.1f} dB after {first.block}, "
    lost = not math.isfinite(kl) or kl > LOST_SHARE * math.log(vocabulary)
    bits = [site.bits for site in exam.figures] or [float(FEW_BITS)]
    known = any(finding.severity == "error" for finding in exam.findings)
    few = min(bits) < FEW_BITS or exam.checkpoint.quantizes_inputs
    severity: Severity = "note"
    if lost:
        severity = "warning" if known or few else "error"
    elif exam.frame is not None and levels and not known:  # weights say nothing in another basis; blocks do
        behind = rough_sqnr_db(min(bits)) - levels[worst]
        if behind > BLOCK_MARGIN_DB:
            severity = "warning" if few or behind < 2 * BLOCK_MARGIN_DB else "error"
    return Finding(
        severity=severity, kind="divergence", site=worst,
        what=(
            "The model's outputs have little in common with the original's; this block loses most."
            if lost
            else "This block loses most of what the blocks add to the hidden state."
        )
        + start,
        evidence=f"{levels.get(worst, math.inf):.1f} dB of what it adds are kept; {at_start}{hidden} after the last "
        f"block; KL divergence {kl:.4g} nats per token",
        remedy="See the findings on its sites; or give this block more bits." if lost or levels else "None.",
    )  # fmt: skip
