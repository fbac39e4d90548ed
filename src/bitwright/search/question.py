"""What is asked of a model's sensitivity: of which sites, in which schemes, by which scores; and where answers go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from bitwright.errors import RecipeError, UnknownName, did_you_mean
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.numerics.inputs import InputQuantizer
from bitwright.progress import Progress
from bitwright.recipe import QUANTIZABLE_KINDS, Recipe
from bitwright.schemes import Scheme
from bitwright.search.differentiable import DifferentiableModel, Prefix
from bitwright.search.rounding import Rounder, activation_quantizers
from bitwright.search.score_cache import ScoreCache, Share

Target = Literal["weights", "inputs", "cache"]
"""What is quantized: a site's weight, its inputs, or the keys and values that a block caches."""

LAYER_SCORES = ("weight_sqnr", "output_sqnr", "hessian", "trace", "fisher", "output_gradient", "window_gradient")
CHEAP_SCORES: Mapping[Target, tuple[str, ...]] = {
    "weights": LAYER_SCORES,
    "inputs": ("output_sqnr", "hessian", "output_gradient"),
    "cache": (),
}
GRADIENT_SCORES = ("fisher", "output_gradient", "window_gradient")
TRACE, MEASURED, TASK = "trace", "measured", "task"
CACHED_OUTPUTS = {"k_proj": "k_cache", "v_proj": "v_cache"}
"""The last part of a site's name -> that of the cache its output goes to. Structure alone does not tell k from v."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Task:
    """A task whose score tells what a changed model can still do.

    Attributes:
        name: of the task and its settings; scores are kept under it.
        evaluate: returns the score of a model, more being better: an accuracy from 0 to 1.
    """

    name: str
    evaluate: Callable[[StreamedModel], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """All that the scores need to know.

    Attributes:
        model: the original, in float32.
        source: as given, in its own compute dtype; tasks are evaluated in it.
        sites: those asked for.
        calibration: [N, T] token ids.
        target: what is quantized.
        schemes: the menu.
        recipe: range method and treatment of ragged rows.
        folder: of the score caches; shared by all ranks.
        work: of this rank's hidden states.
        share: which part of the work is this rank's.
        seed: of labels and probes.
        num_measured_windows: windows on which divergences are measured.
        num_probes: windows, and so random vectors, of the trace.
        task: for score `task`.
        progress: called with (what, done, total).
    """

    model: DifferentiableModel
    source: StreamedModel
    sites: tuple[Site, ...]
    calibration: Tensor
    target: Target
    schemes: tuple[Scheme, ...]
    recipe: Recipe
    folder: Path
    work: Path
    share: Share
    seed: int
    num_measured_windows: int
    num_probes: int
    task: Task | None
    progress: Progress

    @staticmethod
    def of(
        model: StreamedModel,
        sites: tuple[Site, ...],
        calibration: Tensor,
        *,
        target: Target,
        schemes: Sequence[Scheme],
        recipe: Recipe | None,
        folder: Path,
        share: Share,
        num_measured_windows: int,
        seed: int = 0,
        num_probes: int = 1,
        task: Task | None = None,
        progress: Progress,
    ) -> "Question":
        """Ask, and refuse at once what does not fit together.

        Raises:
            CheckpointError: a model that is quantized already.
            RecipeError: no text; or schemes that say nothing of the target.
            ShapeError: a scheme does not fit a site; see `recipe.resolve`.
        """
        model.skeleton.checkpoint.require_original()
        if calibration.ndim != 2 or calibration.shape[0] == 0:
            raise RecipeError(
                f"sensitivity: calibration tokens {list(calibration.shape)} must be [N, T], N at least 1."
            )
        question = Question(
            model=DifferentiableModel.of(model), source=model, sites=sites, calibration=calibration, target=target,
            schemes=tuple(schemes), recipe=recipe or Recipe(), folder=folder, work=folder / f"work-{share.rank}",
            share=share, seed=seed, num_measured_windows=min(num_measured_windows, calibration.shape[0]),
            num_probes=min(num_probes, calibration.shape[0]), task=task, progress=progress,
        )  # fmt: skip
        _ = question.rounder if target == "weights" else question.quantizers
        return question

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the schemes."""
        return tuple(str(scheme) for scheme in self.schemes)

    @property
    def rows(self) -> tuple[str, ...]:
        """What each site is called in the result."""
        return tuple(row_name(self.target, site) for site in self.sites)

    @cached_property
    def prefix(self) -> Prefix:
        """Hidden states and E[x²] of the calibration text, computed when first asked for."""
        self.work.mkdir(exist_ok=True)
        return Prefix(self.model, self.calibration, self.work, self.progress)

    @cached_property
    def rounder(self) -> Rounder:
        """Rounds weights."""
        return Rounder(self.model.skeleton, self.sites, self.schemes, self.recipe)

    @cached_property
    def quantizers(self) -> Mapping[str, InputQuantizer]:
        """Round inputs and caches, by the name of the scheme."""
        return activation_quantizers(self.schemes)

    def cache(self, score: str) -> ScoreCache:
        """The rows of a score that are known."""
        return ScoreCache(self.folder, f"{self.target}-{self._table(score)}", self.share.rank)

    def _table(self, score: str) -> str:
        """The score with what it depends on beside what the folder stands for."""
        if score == MEASURED:
            return f"{score}-{self.num_measured_windows}"
        if score == TRACE:
            return f"{score}-{self.num_probes}"
        if score == TASK:
            assert self.task is not None
            return f"{score}-{self.task.name}-{str(self.source.dtype).removeprefix('torch.')}"
        return score

    def block_of(self, site: Site) -> int:
        """Index of the block that a site is in."""
        return next(i for i, name in enumerate(self.model.block_names) if site.name.startswith(name + "."))


def row_name(target: Target, site: Site) -> str:
    """What a site is called in the result: by its name, or that of the cache which its output goes to."""
    if target != "cache":
        return site.name
    path, _, leaf = site.name.rpartition(".")
    return f"{path}.{CACHED_OUTPUTS[leaf]}"


def measurable_sites(target: Target, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites that have a sensitivity: no routers, and for the cache only those whose outputs are cached.

    Raises:
        RecipeError: there are none.
    """
    found = [site for site in sites if site.kind in QUANTIZABLE_KINDS]
    if target == "cache":
        found = [site for site in found if site.name.rpartition(".")[2] in CACHED_OUTPUTS]
    if not found:
        wanted = f"sites called {' or '.join(CACHED_OUTPUTS)}" if target == "cache" else "sites that can be quantized"
        raise RecipeError(f"sensitivity of {target}: no {wanted} among the {len(sites)} given.")
    return tuple(found)


def check_scores(target: Target, scores: Sequence[str], task: Task | None) -> None:
    """Refuse scores that do not exist or do not apply.

    Raises:
        UnknownName: no such score.
        RecipeError: not of this target; or score `task` without a task.
    """
    known = (*LAYER_SCORES, MEASURED, TASK)
    allowed = (*CHEAP_SCORES[target], MEASURED, *((TASK,) if target == "weights" else ()))
    for score in scores:
        if score not in known:
            raise UnknownName(f"unknown score '{score}'.{did_you_mean(score, known)}")
        if score not in allowed:
            raise RecipeError(f"score {score}: not for {target}. Use {', '.join(allowed)}.")
    if TASK in scores and task is None:
        raise RecipeError("score task: needs a task to evaluate. Give one, or use score measured.")
