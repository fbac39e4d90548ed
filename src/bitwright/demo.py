"""`bitwright demo`: the main job on the embedded model, four ways, beside the original.

The model was trained by this project (scripts/train_demo_model.py) on the standard library's sources. It is calibrated
on files that it was trained on and evaluated on files that neither training nor calibration has seen.
"""

import shutil
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from bitwright.errors import VerificationError
from bitwright.pipeline import evaluate, quantize
from bitwright.preparation import open_model
from bitwright.progress import Progress
from bitwright.recipe import Calibration, Recipe
from bitwright.reports.comparison import write_comparison
from bitwright.reports.page import write_report
from bitwright.schemes import Scheme

CONFIGURATIONS = (
    ("8-bit RTN", "W8A16-channel", "rtn"),
    ("4-bit RTN", "W4A16-g128", "rtn"),
    ("4-bit GPTQ", "W4A16-g128", "gptq"),
    ("3-bit GPTQ", "W3A16-g128", "gptq"),
)
CALIBRATION = Calibration(text="stdlib", num_samples=48, seqlen=256)
EVALUATION_TEXT, EVALUATION_WINDOWS = "stdlib:heldout", 24


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRow:
    """One line of the demo's table; `report` is relative to the comparison page."""

    name: str
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    perplexity_stderr: float | None
    kl_mean: float
    kl_stderr: float | None
    same_top1: float
    seconds: float
    report: str | None


def demo_model() -> Path:
    """Directory of the embedded model."""
    return Path(str(resources.files("bitwright"))) / "assets" / "demo-model"


def run_demo(out: Path, progress: Progress) -> tuple[list[DemoRow], Path]:
    """Quantize and evaluate the demo model in every configuration; return the table and the comparison page.

    Raises:
        VerificationError: a configuration fails its gate.
    """
    model = demo_model()
    rows = [_reference_row(model, progress)]
    for name, scheme, method in CONFIGURATIONS:
        run = out / f"{scheme}-{method}".lower()
        recipe = Recipe(scheme=Scheme.parse(scheme), method=method, calibration=CALIBRATION)
        shutil.rmtree(run, ignore_errors=True)
        result = quantize(model, recipe, run, progress=progress)
        if result.failure is not None:
            raise VerificationError(f"{run}: {result.failure}")
        score, _ = evaluate(run, EVALUATION_TEXT, reference=model, max_windows=EVALUATION_WINDOWS, progress=progress)
        assert score.kl_mean is not None
        assert score.same_top1 is not None
        rows.append(
            DemoRow(
                name=name,
                bits_per_weight=result.results["bits_per_weight"],
                size_bytes=result.results["size_bytes"],
                perplexity=score.perplexity,
                perplexity_stderr=score.perplexity_stderr,
                kl_mean=score.kl_mean,
                kl_stderr=score.kl_stderr,
                same_top1=score.same_top1,
                seconds=result.results["seconds"],
                report=str(write_report(run, None).relative_to(out)),
            )
        )
    notes = [
        "The model is a small Llama that this project trained on the Python standard library (see its model card).",
        f"Calibration: {CALIBRATION.num_samples} windows of {CALIBRATION.seqlen} tokens of files it was trained on.",
        f"Evaluation: {EVALUATION_WINDOWS} windows of files that neither training nor calibration has seen.",
    ]
    page = write_comparison([asdict(row) for row in rows], out / "demo.html", title="bitwright demo", notes=notes)
    return rows, page


def _reference_row(model: Path, progress: Progress) -> DemoRow:
    opened = open_model(model, device="cpu", dtype="float32", trust_remote_code=False)
    checkpoint = opened.skeleton.checkpoint
    score, _ = evaluate(model, EVALUATION_TEXT, max_windows=EVALUATION_WINDOWS, progress=progress)
    return DemoRow(
        name="reference",
        bits_per_weight=16.0,
        size_bytes=checkpoint.num_bytes,
        perplexity=score.perplexity,
        perplexity_stderr=score.perplexity_stderr,
        kl_mean=0.0,
        kl_stderr=0.0,
        same_top1=1.0,
        seconds=0.0,
        report=None,
    )
