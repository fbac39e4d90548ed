"""The divergence of whole choices, in which many sites are quantized at once: what a search calls again and again."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress, no_progress
from bitwright.recipe import Recipe
from bitwright.schemes import Scheme
from bitwright.search.divergence import Change, DivergenceBench
from bitwright.search.question import Question, Target, measurable_sites
from bitwright.search.score_cache import Share

ROUNDED_BYTES = 2_000_000_000
"""Memory that rounded weights may take; those that find no room are rounded again each time."""


class ChoiceBench:
    """Measures choices of schemes against the original; made by `open_bench`.

    Args:
        question: sites, menu, and on how much text divergences are measured.
    """

    def __init__(self, question: Question) -> None:
        self._question = question
        self._bench = DivergenceBench(question.model, question.prefix, question.num_measured_windows, question.work)
        self._sites = dict(zip(question.rows, question.sites, strict=True))
        self._rounded: dict[tuple[str, str], Tensor] = {}
        self._num_bytes = 0

    def divergences(self, choices: Sequence[Mapping[str, str | None]]) -> list[float]:
        """Return KL(original ‖ changed model), nats per token, of each choice: site -> scheme; None is 16 bit.

        Choices of one call share the loading of blocks and the original's predictions; each keeps a file of hidden
        states, so that a call of dozens is meant and one of thousands is not.

        Raises:
            RecipeError: a site or a scheme that the bench was not opened for.
        """
        return self._bench.measure(
            [[self._change(name, scheme) for name, scheme in each.items() if scheme is not None] for each in choices]
        )

    def _change(self, name: str, scheme: str) -> Change:
        if name not in self._sites or scheme not in self._question.names:
            raise RecipeError(f"{name} in {scheme}: not among the sites and schemes of this bench. Open it with both.")
        site = self._sites[name]
        change = change_of(self._question, site, scheme)
        if change.round_weight is None:
            return change
        return Change(site=site, block=change.block, round_weight=self._remembering(site, scheme, change.round_weight))

    def _remembering(
        self, site: Site, scheme: str, round_weight: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        def round_once(weight: Tensor) -> Tensor:
            known = self._rounded.get((site.name, scheme))
            if known is not None:
                return known
            stored = self._question.model.skeleton.stored_dtype(site.parameter)
            result = round_weight(weight).to(stored)  # exact: rounded weights are in the stored precision
            if self._num_bytes + result.nbytes <= ROUNDED_BYTES:
                self._rounded[site.name, scheme] = result
                self._num_bytes += result.nbytes
            return result

        return round_once


@contextmanager
def open_bench(
    model: StreamedModel,
    sites: Sequence[Site],
    calibration: Tensor,
    *,
    schemes: Sequence[Scheme],
    folder: Path,
    target: Target = "weights",
    recipe: Recipe | None = None,
    num_windows: int = 8,
    progress: Progress = no_progress,
) -> Generator[ChoiceBench, None, None]:
    """Run the original over the text once, then measure any choices; hidden states are in `folder` until the end.

    Args:
        model: the original.
        sites: those that choices may name.
        calibration: [N, T] token ids; E[x²] comes from all windows, divergences from the first.
        schemes: those that choices may name.
        folder: for hidden states.
        target: weights, inputs or cache.
        recipe: whose range method and treatment of ragged rows apply.
        num_windows: on how many windows divergences are measured.
        progress: called with (what, done, total).
    Raises:
        RecipeError, ShapeError: sites or schemes that do not fit together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="bench-") as work:
        question = Question.of(
            model, measurable_sites(target, sites), calibration, target=target, schemes=schemes, recipe=recipe,
            folder=Path(work), share=Share(), num_measured_windows=num_windows, progress=progress,
        )  # fmt: skip
        yield ChoiceBench(question)


def change_of(question: Question, site: Site, scheme: str) -> Change:
    """Return what quantizing one site's weight, inputs or cached outputs in a scheme of the menu changes."""
    block = question.block_of(site)
    if question.target == "inputs":
        return Change(site=site, block=block, inputs=question.quantizers[scheme])
    if question.target == "cache":
        return Change(site=site, block=block, outputs=question.quantizers[scheme])
    mean_square = question.prefix.mean_squares.get(site.name)
    return Change(
        site=site, block=block, round_weight=lambda weight: question.rounder.round(site, scheme, weight, mean_square)
    )
