"""What only some runs have recorded: trials of method auto, sensitivities, histograms, repairs, text, training.

Kinds of records, each with the fields of its class here:

    auto         one composition tried on one block (`automatic.Trial`)
    sensitivity  what one score says of one site under one scheme
    histogram    where the weights of a site lie, and the levels of its grid (`site_histogram.SiteHistogram`)
    repair       one step of an automatic repair
    generation   one continuation of a prompt, before and after (`samples`); of two for one prompt the later

What a training leaves is in `training`, how fast the models run in `speed`, what a search found in `mixes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.reports.entries import Figure, Records, figure, figures, is_finite, mapping_or_empty, text
from bitwright.reports.mixes import SearchFact, read_search
from bitwright.reports.speed import Speeds, read_speeds
from bitwright.reports.training import MergeFact, Training, read_training


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFact:
    """One composition on one block.

    Attributes:
        block: empty where the composition was refused before any block.
        solvers: where single groups had another solver: site -> solver.
        error: squared distance of the block's output from the original's, relative to what the block adds.
        refused: why it could not be tried; empty if it could.
    """

    block: str
    composition: str
    solvers: Mapping[str, str]
    error: Figure
    refused: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityFact:
    """What one score says of one site under one scheme."""

    site: str
    scheme: str
    score: str
    value: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class HistogramFact:
    """Where the weights of a site lie; the end bins also count what lies beyond.

    Attributes:
        levels: of a typical group of the grid; empty where they are too many to draw.
    """

    low: float
    high: float
    counts: tuple[float, ...]
    levels: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairFact:
    """One step of an automatic repair: what one site had, what it got, and the divergence in nats per token."""

    step: Figure
    site: str
    before: str
    after: str
    kl_before: Figure
    kl_after: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationFact:
    """One continuation of a prompt by the original and by the quantized model."""

    prompt: str
    before: str
    after: str

    @property
    def num_common(self) -> int:
        """Characters that both begin with."""
        pairs = zip(self.before, self.after, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.before), len(self.after)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All of them; histograms by site, training and search None where there was none."""

    trials: tuple[TrialFact, ...]
    sensitivities: tuple[SensitivityFact, ...]
    histograms: Mapping[str, HistogramFact]
    repairs: tuple[RepairFact, ...]
    generations: tuple[GenerationFact, ...]
    speeds: Speeds
    search: SearchFact | None
    training: Training | None
    merges: tuple[MergeFact, ...]


def read_findings(records: Records, task: Mapping[str, Any]) -> Findings:
    """Read them.

    Args:
        records: of the run.
        task: what a training was asked for; empty where there was none.
    Raises:
        RunError: an entry is not what bitwright writes.
    """
    return Findings(
        trials=tuple(_trial(record, where) for record, where in records.of("auto")),
        sensitivities=records.read(SensitivityFact, "sensitivity"),
        histograms=_histograms(records),
        repairs=tuple(_repair(record, where) for record, where in records.of("repair")),
        generations=tuple({fact.prompt: fact for fact in records.read(GenerationFact, "generation")}.values()),
        speeds=read_speeds(records),
        search=read_search(records),
        training=read_training(records, task),
        merges=records.read(MergeFact, "merge"),
    )


def _trial(record: Mapping[str, Any], where: str) -> TrialFact:
    return TrialFact(
        block=text(record, "block"),
        composition=text(record, "composition"),
        solvers={site: str(solver) for site, solver in mapping_or_empty(record.get("solvers")).items()},
        error=figure(record, "error", where),
        refused=text(record, "refused"),
    )


def _repair(record: Mapping[str, Any], where: str) -> RepairFact:
    return RepairFact(
        step=figure(record, "step", where),
        site=text(record, "site"),
        before=text(record, "from"),
        after=text(record, "to"),
        kl_before=figure(record, "kl_before", where),
        kl_after=figure(record, "kl_after", where),
    )


def _histograms(records: Records) -> dict[str, HistogramFact]:
    """Those that can be drawn; the ends may be given as edges of all bins."""
    found: dict[str, HistogramFact] = {}
    for record, where in records.of("histogram"):
        edges, counts = figures(record, "edges", where), figures(record, "counts", where)
        low, high = (edges[0], edges[-1]) if edges else (figure(record, key, where) for key in ("low", "high"))
        if counts and low is not None and high is not None and is_finite(low) and is_finite(high) and low < high:
            levels = figures(record, "levels", where)
            found[text(record, "site")] = HistogramFact(low=low, high=high, counts=counts, levels=levels)
    return found
