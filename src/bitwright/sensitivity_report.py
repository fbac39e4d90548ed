"""The sensitivity of a model as a command measures it: from a model and a text to scores, correlations and a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.preparation import model_sites, open_model, text_sample
from bitwright.progress import Progress, no_progress
from bitwright.records import Environment, write_json_atomic
from bitwright.schemes import Scheme
from bitwright.search.correlation import rank_correlation
from bitwright.search.question import CHEAP_SCORES, MEASURED, Target
from bitwright.search.sensitivity import MENUS, Sensitivity, measure_sensitivities

RESULT_FILE = "sensitivity.json"
SCORES_FOLDER = "scores"


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityReport:
    """Scores of one model on one text.

    Attributes:
        circumstances: model, text, windows and options.
        scores: by name.
        correlations: cheap score -> `all` or scheme -> rank correlation with the measured one; empty without it.
        file: where all this is written.
    """

    circumstances: Mapping[str, Any]
    scores: Mapping[str, Sensitivity]
    correlations: Mapping[str, Mapping[str, float | None]]
    file: Path

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "circumstances": dict(self.circumstances),
            "correlations": {score: dict(found) for score, found in self.correlations.items()},
            "scores": {score: found.to_json() for score, found in self.scores.items()},
        }


def report_sensitivity(
    model: str | Path,
    out: Path,
    *,
    calibration: str,
    scores: Sequence[str] = (),
    schemes: Sequence[str] = (),
    target: Target = "weights",
    num_samples: int = 64,
    seqlen: int = 256,
    num_measured_windows: int = 8,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> SensitivityReport:
    """Measure scores of all sites of a model and write them to `out`; the same call resumes.

    Args:
        model: model directory or hub id.
        out: folder of the result and of the scores as they come.
        calibration: text the scores are found on.
        scores: names; every cheap one and `measured` unless given.
        schemes: the menu; that of the target unless given.
        target: weights, inputs or cache.
        num_samples: windows of the text.
        seqlen: tokens per window.
        num_measured_windows: how many of them divergences are measured on.
        seed: of the choice of windows, of labels and of random vectors.
        progress: called with (what, done, total).
    Raises:
        BitwrightError: see `measure_sensitivities`; also for a model or text that cannot be read.
    """
    opened = open_model(model, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    menu = [Scheme.parse(name) for name in schemes or MENUS[target]]
    windows = text_sample(
        opened, calibration, seqlen, num_samples=num_samples, seed=seed, trust_remote_code=trust_remote_code
    )
    found = measure_sensitivities(
        opened, model_sites(opened), windows, scores=scores or (*CHEAP_SCORES[target], MEASURED),
        folder=out / SCORES_FOLDER, schemes=menu, target=target, num_measured_windows=num_measured_windows, seed=seed,
        progress=progress,
    )  # fmt: skip
    measured = found.get(MEASURED)
    others = {name: score for name, score in found.items() if name != MEASURED}
    report = SensitivityReport(
        circumstances={
            "model": str(model), "text": calibration, "target": target, "num_samples": num_samples, "seqlen": seqlen,
            "num_measured_windows": num_measured_windows, "seed": seed, "device": device,
            "environment": Environment.capture().to_mapping(),
        },
        scores=found,
        correlations={name: rank_correlation(score, measured) for name, score in others.items()} if measured else {},
        file=out / RESULT_FILE,
    )  # fmt: skip
    write_json_atomic(report.file, report.to_json())
    return report
