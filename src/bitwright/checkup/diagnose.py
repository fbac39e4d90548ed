"""`bitwright diagnose`: compare a quantized checkpoint with its original and say in words what is wrong with it.

Weights are compared with the original's, site by site, and where a method folded scales into the model, with those that
the original has after the same scaling. A model whose hidden basis was rotated holds other weights on purpose: it is
judged by what its blocks add to the hidden state, in that basis, and by its logits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bitwright.checkup.accounting import account
from bitwright.checkup.examination import Examination
from bitwright.checkup.findings import Checkup, Finding, worst_first
from bitwright.checkup.folding import basis
from bitwright.checkup.stored import DamagedCheckpoint, open_damaged
from bitwright.checkup.verdicts import depth_findings, input_findings, pair_findings, vague_findings
from bitwright.errors import CheckpointError
from bitwright.evaluation.score import Scorer
from bitwright.model.checkpoint import Checkpoint
from bitwright.model.layouts.stored import module_of
from bitwright.model.stream import StreamedModel
from bitwright.preparation import check_seqlen, open_model, text_windows, vocabulary_size
from bitwright.progress import Progress, no_progress
from bitwright.runs import RUN_FILE, open_run

WINDOWS, SEQLEN = 4, 128
SAME_IN_VERSIONS = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
MOST_EXPLAINED = 8
"""Findings for which the model is run again with the original's weight in its place."""


def diagnose_checkpoint(
    original: str | Path,
    quantized: str | Path,
    *,
    text: str | None = None,
    num_windows: int = WINDOWS,
    seqlen: int = SEQLEN,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Checkup:
    """Compare a quantized checkpoint with its original; memory is one decoder block of each.

    Args:
        original: model directory or hub id of the unquantized model.
        quantized: model directory, hub id or run directory in compressed-tensors' layouts or bitwright's own.
        text: what the models are run on; None for random tokens.
        num_windows: of that text.
        seqlen: tokens per window.
        seed: of random tokens.
        device: where blocks are computed.
        progress: called with (what, done, total).
    Raises:
        CheckpointError: a model that cannot be opened at all; the original is quantized, or the other is not.
        DataError: text or windows that do not fit the model.
    """
    first = open_model(original, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    first.skeleton.checkpoint.require_original()
    checkpoint = open_damaged(_directory(quantized), first.skeleton.checkpoint)
    _check_same_kind(first.skeleton.checkpoint, checkpoint, quantized)

    def opened(files: DamagedCheckpoint) -> StreamedModel:
        return StreamedModel(files, device=device, trust_remote_code=trust_remote_code)

    second = opened(checkpoint)
    windows = _windows(first, text, num_windows, seqlen, seed, trust_remote_code)
    exam = Examination(
        original=first, quantized=second, checkpoint=checkpoint, frame=None, progress=progress,
        findings=account(first, second, checkpoint),
    )  # fmt: skip
    kl = _examine(exam, windows)
    exam.findings += pair_findings(exam)
    exam.findings += vague_findings(exam)  # of what nothing before explains
    exam.findings += [*input_findings(exam), *depth_findings(exam, kl, vocabulary_size(first))]
    return Checkup(
        original=str(original), quantized=str(quantized), text=text, num_windows=windows.shape[0],
        seqlen=windows.shape[1], num_quantized=len(checkpoint.all_packed_names()), kl=kl,
        findings=worst_first(_explained(exam, windows, kl, opened)),
        sites=tuple(exam.figures), depth=tuple(exam.depth),
    )  # fmt: skip


def _directory(target: str | Path) -> str | Path:
    return open_run(Path(target)).model if (Path(target) / RUN_FILE).is_file() else target


def _check_same_kind(first: Checkpoint, second: Checkpoint, quantized: str | Path) -> None:
    """Refuse models of which one cannot be a version of the other."""
    for key in SAME_IN_VERSIONS:
        wanted, found = (_setting(files.config, key) for files in (first, second))
        if wanted != found:
            raise CheckpointError(
                f"{quantized}: {key} is {found}, the original {first.path} has {wanted}. "
                "Give the model that it was made from."
            )


def _setting(config: Mapping[str, Any], key: str) -> Any:
    text = cast(Mapping[str, Any], config.get("text_config") or {})
    return config.get(key, text.get(key))


def _windows(
    model: StreamedModel, text: str | None, num_windows: int, seqlen: int, seed: int, trust_remote_code: bool
) -> Tensor:
    if text is not None:
        return text_windows(model, text, seqlen, trust_remote_code=trust_remote_code)[:num_windows]
    check_seqlen(model, seqlen)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_size(model), (num_windows, seqlen), generator=generator)


def _examine(exam: Examination, windows: Tensor) -> float:
    """Go through the whole model; return the KL divergence in nats per token."""
    first, second = exam.original, exam.quantized
    inside = {name for block in first.block_names for name in first.skeleton.stored_names(block)}
    outside = [name for name in exam.checkpoint.names if name not in inside]
    decoded = exam.decode(outside)
    with first.outside(), second.outside():
        exam.frame = basis(first, second)
    exam.examine_outside(decoded)
    expected, found = exam.run(windows)
    scorer = Scorer()
    with first.outside(), second.outside():
        for index in range(windows.shape[0]):
            ids = windows[index : index + 1]
            logits = second.leave(ids, found[index : index + 1])
            scorer.add(ids[0], logits[0], first.leave(ids, expected[index : index + 1])[0])
    score = scorer.result()
    return math.nan if score.kl_mean is None else score.kl_mean


def _explained(
    exam: Examination, windows: Tensor, kl: float, opened: Callable[[DamagedCheckpoint], StreamedModel]
) -> list[Finding]:
    """Measure what of the divergence goes when the original's weight stands in for that of a finding."""
    names = set(exam.checkpoint.packed_names()) - exam.folded
    by_site = {module_of(name): name for name in names}
    results: list[Finding] = []
    budget = MOST_EXPLAINED if exam.frame is None and math.isfinite(kl) and kl > 0 else 0
    for finding in exam.findings:
        if finding.severity == "note" or finding.explained is not None or finding.site not in by_site or not budget:
            results.append(finding)
            continue
        budget -= 1
        mended = opened(exam.checkpoint.with_originals([by_site[finding.site]]))
        left = _kl(exam.original, mended, windows)
        results.append(replace(finding, explained=max(0.0, 1 - left / kl)))
    return results


def _kl(original: StreamedModel, other: StreamedModel, windows: Tensor) -> float:
    scorer = Scorer()
    for ids in windows.split(1):
        scorer.add(ids[0], other.logits(ids)[0], original.logits(ids)[0])
    score = scorer.result()
    return math.inf if score.kl_mean is None or math.isnan(score.kl_mean) else score.kl_mean
