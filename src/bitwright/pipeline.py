"""The verbs, as on the command line: inspect, quantize (calibrates and decides on its way), evaluate, export."""

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from bitwright.automatic import BASELINE, adopt, baseline_job, gate_loss, is_automatic, work_beside
from bitwright.calibration.fisher import fisher_information
from bitwright.calibration.output_gradients import output_gradients
from bitwright.chooser import Chooser
from bitwright.data.overlap import require_disjoint
from bitwright.errors import CheckpointError, RecipeError, RunError, VerificationError
from bitwright.evaluation.score import Score
from bitwright.evaluation.streamed import evaluate as evaluate_streamed
from bitwright.exporters.registered import EXPORTERS
from bitwright.inspection import Inspection, inspect_model
from bitwright.methods.solvers import TRAINED_ELSEWHERE
from bitwright.model.activations import Activations
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.outcome import CALIBRATION_TOKENS, conclude, gate_failure
from bitwright.outlier_report import analyse
from bitwright.preflight import Estimate
from bitwright.preparation import (
    Job,
    check_seqlen,
    max_length,
    open_model,
    prepare,
    text_sample,
    text_windows,
    vocabulary_size,
)
from bitwright.process_memory import PeakMemory
from bitwright.progress import Progress, no_progress
from bitwright.recipe import Recipe
from bitwright.records import append_jsonl
from bitwright.runs import RunDirectory, model_directory, open_run, run_behind
from bitwright.train.given_sites import GivenSites
from bitwright.transformation import transformed
from bitwright.walk import FISHER, GUIDED, Walk, needs_gradients

LONGEST_DEFAULT_WINDOW = 2048
ANALYSIS_WINDOW = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What training leaves for a run to write.

    Attributes:
        model: directory of the dense model, with everything that was trained beside the sites.
        sites: folder of given sites; see `train.given_sites`.
    """

    model: Path
    sites: Path

    def hash(self) -> str:
        """SHA-256 of both."""
        digest = hashlib.sha256(open_checkpoint(self.model).audit().encode())
        for file in sorted(self.sites.iterdir()):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def open(self, original: StreamedModel) -> StreamedModel:
        """Open the trained model as the original is open."""
        return StreamedModel(
            open_checkpoint(self.model), device=str(original.device), dtype=original.dtype,
            trust_remote_code=original.skeleton.trust_remote_code,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeResult:
    """A finished run.

    Attributes:
        run: its directory; `run / "4-model"` is a Hugging Face model directory, and so is the run itself.
        results: headline figures, as in run.json.
        failure: why the result failed its gate; None if it passed.
        resumed_blocks: blocks that an earlier, interrupted start had already done.
    """

    run: Path
    results: dict[str, Any]
    failure: str | None
    resumed_blocks: int


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    fresh: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    announce: Callable[[Estimate], None] = lambda _: None,
    trained: Trained | None = None,
) -> QuantizeResult:
    """Quantize a model into a run directory; the same call resumes an interrupted run and returns a finished one.

    Args:
        model: model directory or hub id.
        recipe: what to do.
        out: the run directory.
        fresh: discard what an earlier run left in `out`.
        device: where blocks are computed.
        dtype: compute type of activations: float32, bfloat16 or float16.
        progress: called with (what, done, total).
        announce: called once with what the run will need, when every check has passed.
        trained: codes to write for the sites whose method is `trained`.
    Raises:
        BitwrightError: see `errors`; nothing is written unless every check has passed.
    """
    begun = time.perf_counter()
    run = RunDirectory(Path(out))
    if trained is None and TRAINED_ELSEWHERE in recipe.methods:
        raise RecipeError(f"method {TRAINED_ELSEWHERE}: is what training leaves. Use bitwright train qat.")
    job = prepare(
        model,
        recipe,
        run,
        fresh=fresh,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=progress,
        trained="" if trained is None else trained.hash(),
    )
    done = 0
    if fresh or not run.is_complete or run.work.exists():
        try:
            run.start(job.fingerprint, _asked(model, job), fresh=fresh)
            announce(job.needed)
            done = 0 if run.is_complete else _carry_out(job, run, begun, trust_remote_code, progress, trained)
        finally:
            run.release()
    info = run.info
    assert info is not None
    failure = gate_failure(float(info["results"]["kl_mean"]), recipe.max_kl)
    run.judge(failure)
    return QuantizeResult(run=run.path, results=info["results"], failure=failure, resumed_blocks=done)


def _carry_out(
    job: Job, run: RunDirectory, begun: float, trust_remote_code: bool, progress: Progress, trained: Trained | None
) -> int:
    """Do what is left of a run; return how many blocks were done before."""
    if job.recipe.importance == "fisher":
        _measure_fisher(job, run, trust_remote_code, progress)
    try:
        model, frame = transformed(job, run.work, progress)
        given: GivenSites | None = None
        if trained is not None:
            model, given = trained.open(job.model), GivenSites(trained.sites)
        _measure_output_gradients(job, model, run, trust_remote_code, progress)
        memory = PeakMemory()
        rival: _Finished | None = None
        if is_automatic(job.plan):
            chooser, baseline = Chooser(job, model, run.work, progress), baseline_job(job)
            walk = _walk(baseline, model, frame, work_beside(run.work, run.work / BASELINE), progress)
            rival = _Finished(baseline, walk, *walk.execute(chooser.keep))
            job = chooser.choose()
        walk = _walk(job, model, frame, run, progress, given)
        best = _Finished(job, walk, *walk.execute())
        if rival is not None and gate_loss(*rival) < gate_loss(*best):
            adopt(rival.walk.run, run)
            best = rival._replace(walk=_walk(rival.job, model, frame, run, progress))
        conclude(best.job, run, best.walk, best.gate, best.reference, time.perf_counter() - begun, memory)
    except VerificationError as error:
        run.judge(str(error))
        raise
    return best.walk.resumed_blocks


class _Finished(NamedTuple):
    """A walk that has reached the end, with the last hidden states of the gate's text in both models."""

    job: Job
    walk: Walk
    gate: Activations
    reference: Activations


def _walk(
    job: Job, model: StreamedModel, frame: Tensor | None, run: RunDirectory, progress: Progress,
    given: GivenSites | None = None,
) -> Walk:  # fmt: skip
    return Walk(
        model, run, job.recipe, job.plan, job.layouts, job.calibration, job.gate, progress,
        original=job.model, frame=frame, given=given,
    )  # fmt: skip


def _measure_fisher(job: Job, run: RunDirectory, trust_remote_code: bool, progress: Progress) -> None:
    """Leave the Fisher information of the planned sites in the work folder; a resumed run finds it there."""
    file = run.work / FISHER
    if file.exists():
        return
    found = fisher_information(
        job.model.skeleton.checkpoint,
        dict.fromkeys(site.parameter for site in job.sites if job.plan.sites[site.name].scheme is not None),
        job.calibration,
        device=str(job.model.device),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    save_tensors_atomic(file, found)


def _measure_output_gradients(
    job: Job, model: StreamedModel, run: RunDirectory, trust_remote_code: bool, progress: Progress
) -> None:
    """Leave the gradients of the model to quantize, where methods weigh tokens by them, in the work folder."""
    file = run.work / GUIDED
    methods = {name: entry.method for name, entry in job.plan.sites.items()}
    wanted = [site for site in job.sites if site.kind != "expert" and needs_gradients(methods[site.name])]
    if file.exists() or not wanted:
        return
    found = output_gradients(
        model.skeleton.checkpoint,
        wanted,
        job.calibration,
        num_groups=job.recipe.gptq.guided_groups,
        device=str(job.model.device),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    save_tensors_atomic(file, found)


def inspect(
    model: str | Path,
    *,
    calibration: str | None = None,
    num_samples: int = 16,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Inspection:
    """Find a model's sites, groups and edges, and what the common schemes would weigh; changes nothing.

    Args:
        model: model directory, hub id, or a run directory, whose result is then inspected.
        calibration: a text to run, for outliers and for what each format would lose; None for neither.
        num_samples: windows of that text.
        seqlen: tokens per window; at most 512 unless given.
        seed: of the choice of windows.
        device: where blocks are computed.
        progress: called with (what, done, total).
    Raises:
        BitwrightError: see `errors`.
    """
    streamed = open_model(model_directory(model), device=device, dtype="float32", trust_remote_code=trust_remote_code)
    found = inspect_model(streamed, model, progress)
    if calibration is None:
        return found
    length = min(max_length(streamed) or ANALYSIS_WINDOW, ANALYSIS_WINDOW) if seqlen is None else seqlen
    windows = text_sample(
        streamed, calibration, length, num_samples=num_samples, seed=seed, trust_remote_code=trust_remote_code
    )
    return replace(found, activity=analyse(streamed, windows, progress))


def _asked(model: str | Path, job: Job) -> dict[str, Any]:
    return {
        "model": str(model),
        "recipe": job.recipe.to_mapping(),
        "model_hash": job.model_hash,
        "data_hash": job.data_hash,
        "estimate": asdict(job.needed),
    }


def evaluate(
    target: str | Path,
    text: str,
    *,
    reference: str | Path | None = None,
    seqlen: int | None = None,
    max_windows: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> tuple[Score, dict[str, Any]]:
    """Measure perplexity on a text and, with a reference, the divergence from it.

    Returns:
        the score and the circumstances (model, text, context length) that belong to it.
    Raises:
        DataError: the text is empty, too short, or overlaps the text that the run was calibrated on.
        CheckpointError: the reference has another vocabulary.
    """
    model = open_model(model_directory(target), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    longest = min(max_length(model) or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    length = longest if seqlen is None else seqlen
    windows = text_windows(model, text, length, trust_remote_code=trust_remote_code)
    run = run_behind(target)
    if run is not None:
        _require_unseen(run, windows, text)
    windows = windows[:max_windows]
    other = None
    if reference is not None:
        other = open_model(model_directory(reference), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        check_seqlen(other, length)
        if vocabulary_size(other) != vocabulary_size(model):
            raise CheckpointError(
                f"{reference}: knows {vocabulary_size(other)} tokens, {target} knows {vocabulary_size(model)}. "
                "Give a reference with the same tokenizer."
            )
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        score = evaluate_streamed(model, windows, Path(work), progress, reference=other)
    circumstances = {
        "model": str(target),
        "reference": None if reference is None else str(reference),
        "text": text,
        "seqlen": length,
        "dtype": dtype,
        "device": device,
    }
    if run is not None:
        append_jsonl(run.records, {"kind": "evaluate", **circumstances, **asdict(score)})
    return score, circumstances


def _require_unseen(run: RunDirectory, windows: Any, text: str) -> None:
    with safe_open(run.stats, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
        calibration = handle.get_tensor(CALIBRATION_TOKENS)
    if calibration.numel():
        require_disjoint(
            calibration.long(), windows, calibration_source=f"{run.path}'s calibration", evaluation_source=text
        )


def export(
    run: str | Path,
    to: str,
    out: str | Path,
    *,
    verify: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a finished run's model for an engine, load it with that engine and compare.

    Returns:
        what was compared and how far it differed.
    Raises:
        UnknownName: no such exporter.
        RunError: not a finished run, one in another layout, or `out` exists.
        VerificationError: the run's model is not what the run left, or the engine's tensors or logits differ from ours.
    """
    exporter = EXPORTERS[to]
    finished = open_run(Path(run))
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target}: exists and is not empty. Choose another --out.")
    info = finished.info
    assert info is not None
    exporter.check(finished.model, info["results"]["layouts"])
    _require_intact(finished)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        exporter.write(finished.model, written)
        comparison = exporter.verify(written, trust_remote_code) if verify else {}
        if target.exists():
            target.rmdir()
        written.replace(target)
    append_jsonl(finished.records, {"kind": "export", "to": to, "out": str(target), **comparison})
    progress("export", 1, 1)
    return comparison


def _require_intact(run: RunDirectory) -> None:
    """Raises VerificationError if the finished model has changed since the run ended."""
    info = run.info
    assert info is not None
    changed = f"{run.model}: its tensors or configuration are not those that the run wrote. Quantize again, --fresh"
    try:
        found = open_checkpoint(run.model).audit()
    except CheckpointError as error:
        raise VerificationError(f"{changed} ({error})") from None
    if found != info["results"]["result_hash"]:
        raise VerificationError(f"{changed}.")
