"""What each site can bear: a score for every site in every scheme of a menu, by whichever measure the search trusts.

One interface, nine scores. Seven are cheap: `scores_layer` says what they are and how they follow from each other; all
of them together take one pass over the blocks. `measured` is the divergence with that one site quantized, `task` the
loss of a task's score. All grow with the harm, and 16 bit has score 0.

Weights are rounded to nearest, with the recipe's range method and E[x²] of the calibration text: what a better solver
makes of a site is for the search to measure, not for a score to foresee. Scores are kept on disk as they come; the same
call goes on where a killed one stopped. Under torchrun every rank does its share and all return the whole.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.data.windows import hash_tokens
from bitwright.errors import RunError
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress, no_progress
from bitwright.recipe import Recipe
from bitwright.records import deciding_versions
from bitwright.schemes import Scheme
from bitwright.search.question import (
    LAYER_SCORES,
    MEASURED,
    TASK,
    TRACE,
    Question,
    Target,
    Task,
    check_scores,
    measurable_sites,
)
from bitwright.search.score_cache import Share
from bitwright.search.scores_cheap import CheapScores
from bitwright.search.scores_measured import measure_divergences, measure_task
from bitwright.search.scores_trace import hessian_traces

MENUS: Mapping[Target, tuple[str, ...]] = {
    "weights": (
        "W2A16-g64", "W3A16-g128", "W4A16-g128", "W4A16-g32", "W5A16-g128", "W6A16-g128", "W8A16-channel"
    ),
    "inputs": ("W8A8", "W8A6", "W8A4"),
    "cache": ("W8A8-actasym", "W8A4-actasym", "W8A2-actasym"),
}  # fmt: skip
SIXTEEN_BIT = "16-bit"
"""Where a site stays as it is; every score is 0 there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """One score of all sites in all schemes.

    Attributes:
        score: its name.
        target: weights, inputs or cache. For the latter two a scheme stands for its activations alone.
        model_hash: of the checkpoint.
        data_hash: of the calibration tokens.
        schemes: names of the menu, without 16 bit.
        values: site -> scheme -> score; the larger the worse.
    """

    score: str
    target: Target
    model_hash: str
    data_hash: str
    schemes: tuple[str, ...]
    values: Mapping[str, Mapping[str, float]]

    def value(self, site: str, scheme: Scheme | None) -> float:
        """Return the score of a site in a scheme; None is 16 bit."""
        return 0.0 if scheme is None else self.values[site][str(scheme)]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "schemes": list(self.schemes)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Sensitivity":
        """Rebuild what `to_json` returned.

        Raises:
            RunError: it did not return this.
        """
        try:
            return Sensitivity(
                score=data["score"],
                target=data["target"],
                model_hash=data["model_hash"],
                data_hash=data["data_hash"],
                schemes=tuple(data["schemes"]),
                values={str(site): dict(row) for site, row in data["values"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"not a sensitivity: {error!r}. Was it written by another version?") from None


def measure_sensitivity(
    model: StreamedModel, sites: Sequence[Site], calibration: Tensor, *, score: str, folder: Path, **options: Any
) -> Sensitivity:
    """Return one score; see `measure_sensitivities`, whose options these are."""
    return measure_sensitivities(model, sites, calibration, scores=[score], folder=folder, **options)[score]


def measure_sensitivities(
    model: StreamedModel,
    sites: Sequence[Site],
    calibration: Tensor,
    *,
    scores: Sequence[str],
    folder: Path,
    schemes: Sequence[Scheme] | None = None,
    target: Target = "weights",
    recipe: Recipe | None = None,
    num_measured_windows: int = 8,
    num_probes: int = 32,
    seed: int = 0,
    task: Task | None = None,
    progress: Progress = no_progress,
) -> dict[str, Sensitivity]:
    """Return scores of every site in every scheme; cheap ones together cost little more than one of them.

    Args:
        model: the original, not quantized.
        sites: some or all of its blocks' sites; routers are left out.
        calibration: [N, T] token ids.
        scores: `weight_sqnr`, `output_sqnr`, `hessian`, `trace`, `fisher`, `output_gradient`, `window_gradient`,
            `measured`, `task`; of inputs `output_sqnr`, `hessian`, `output_gradient`, `measured`; of the cache
            `measured`.
        folder: where scores are kept, shared by all ranks; those of other models, texts and seeds do no harm.
        schemes: the menu; that of `MENUS` unless given.
        target: what is quantized: weights, inputs of the sites, or keys and values that blocks cache.
        recipe: whose range method and treatment of ragged rows apply.
        num_measured_windows: how many of the windows divergences are measured on.
        num_probes: how many windows, with one random vector each, the trace is estimated on.
        seed: of sampled labels and random vectors.
        task: for score `task`.
        progress: called with (what, done, total).
    Raises:
        UnknownName, RecipeError: scores, schemes or sites that do not fit together.
        ShapeError: a scheme does not fit a site; see `recipe.resolve`.
        CheckpointError: a model that is quantized already.
        ResourceError: no room; only `trace` needs the whole model in memory.
        RunError: another process is at work in the same place, or another rank has stopped.
        VerificationError: a site that no token reached, or a score that is not finite.
    """
    check_scores(target, scores, task)
    wished, share = recipe or Recipe(), Share.of_environment()
    model_hash, data_hash = model.skeleton.checkpoint.audit(), hash_tokens(calibration)
    place = folder / circumstances(model_hash, data_hash, wished, seed, model.device.type)
    question = Question.of(
        model, measurable_sites(target, sites), calibration, target=target,
        schemes=schemes or [Scheme.parse(name) for name in MENUS[target]], recipe=wished, folder=place, share=share,
        num_measured_windows=num_measured_windows, seed=seed, num_probes=num_probes, task=task, progress=progress,
    )  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    with share.locked(place):
        try:
            tables = _answer(question, scores)
        finally:
            shutil.rmtree(question.work, ignore_errors=True)
    return {
        score: Sensitivity(
            score=score, target=target, model_hash=model_hash, data_hash=data_hash, schemes=question.names, values=table
        )
        for score, table in tables.items()
    }


def _answer(question: Question, scores: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure this rank's share, then wait for the others': score -> site -> scheme -> value."""
    cheap = [score for score in scores if score in LAYER_SCORES]
    traces = hessian_traces(question) if TRACE in cheap else {}
    if cheap:
        CheapScores(question, cheap, traces).run()
    if MEASURED in scores:
        measure_divergences(question)
    if TASK in scores:
        measure_task(question)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        cache = question.cache(score)
        cache.wait(question.rows, question.names, lambda done, total: question.progress("together", done, total))
        columns = question.names
        tables[score] = {
            row: {SIXTEEN_BIT: 0.0, **{scheme: cache.rows[row][scheme] for scheme in columns}} for row in question.rows
        }
    return tables


def circumstances(model_hash: str, data_hash: str, recipe: Recipe, seed: int, device: str) -> str:
    """Name all that determines a score or a measured loss, but for sites, schemes, target and score."""
    parts = [model_hash, data_hash, recipe.range_method, recipe.ragged, seed, device, *deciding_versions().values()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
