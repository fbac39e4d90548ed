"""Scores that run the changed model: its divergence from the original, and what it loses on a task."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from bitwright.model.sites import Site, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.search.choices import change_of
from bitwright.search.divergence import DivergenceBench
from bitwright.search.question import MEASURED, TASK, Question
from bitwright.search.score_cache import ScoreCache

ORIGINAL = "original"
"""Row and column of the score of the unchanged model."""


def measure_divergences(question: Question) -> None:
    """Measure the KL divergence with each site of this rank's share quantized alone, where it is not known."""
    cache = question.cache(MEASURED)
    own = [site for site in _own_sites(question) if cache.missing(_row(question, site), question.names)]
    if not own:
        return
    bench = DivergenceBench(question.model, question.prefix, question.num_measured_windows, question.work)
    for done, site in enumerate(own):
        missing = cache.missing(_row(question, site), question.names)
        found = bench.measure([[change_of(question, site, scheme)] for scheme in missing])
        cache.add(_row(question, site), dict(zip(missing, found, strict=True)))
        question.progress("measured", done + 1, len(own))


def measure_task(question: Question) -> None:
    """Measure what each site of this rank's share, quantized alone, takes from the score of the task."""
    assert question.task is not None
    cache = question.cache(TASK)
    missing = {site: cache.missing(site.name, question.names) for site in _own_sites(question)}
    if not any(missing.values()):
        return
    original = _original_score(question, cache)
    model = _RoundedModel(question)
    for done, (site, schemes) in enumerate(missing.items()):
        for scheme in schemes:
            model.changed = (site, scheme)
            cache.add(site.name, {scheme: original - question.task.evaluate(model)})
        question.progress("task", done + 1, len(missing))


class _RoundedModel(StreamedModel):
    """The original in its own dtype, but for one site whose weight is rounded as soon as its block is loaded."""

    def __init__(self, question: Question) -> None:
        source = question.source
        super().__init__(
            source.skeleton.checkpoint,
            device=str(source.device),
            dtype=source.dtype,
            trust_remote_code=source.skeleton.trust_remote_code,
        )
        self._question = question
        self.changed: tuple[Site, str] | None = None

    @contextmanager
    def block(self, index: int) -> Generator[nn.Module, None, None]:
        """Hold a block in memory, changed if the site is in it."""
        with super().block(index) as block:
            if self.changed is not None:
                site, scheme = self.changed
                if self._question.block_of(site) == index:
                    weight = weight_view(block, site, self.block_names[index])
                    mean_square = self._question.prefix.mean_squares.get(site.name)
                    weight.copy_(self._question.rounder.round(site, scheme, weight.float(), mean_square))
            yield block


def _original_score(question: Question, cache: ScoreCache) -> float:
    assert question.task is not None
    if cache.missing(ORIGINAL, [ORIGINAL]):
        cache.add(ORIGINAL, {ORIGINAL: question.task.evaluate(question.source)})
    return cache.rows[ORIGINAL][ORIGINAL]


def _own_sites(question: Question) -> list[Site]:
    return [site for index, site in enumerate(question.sites) if question.share.has(index)]


def _row(question: Question, site: Site) -> str:
    return dict(zip(question.sites, question.rows, strict=True))[site]
