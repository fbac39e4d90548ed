"""How unequal the input channels of each group of sites are, from the mean squares in 2-stats.safetensors.

Sites that read one input share its statistics, which are stored under the first of them; 1-structure.json names the
others. A channel many times as loud as the median one is an outlier: where inputs are quantized with a scale per token
or tensor, it decides the step for all the others.

Legend: I in features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitwright.errors import RunError
from bitwright.reports import wording
from bitwright.runs import RunDirectory

SUFFIX = ".mean_square"
NUM_LOUDEST = 5
NUM_SHOWN = 10
OUTLIER_RATIO = 6.0
"""From here on a channel counts as an outlier, as in `bitwright inspect`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelFact:
    """The inputs of one group of sites.

    Attributes:
        site: the first site of the group.
        sites: all of them.
        num_channels: I.
        median_rms: of all channels; above 0.
        loudest: (channel, its RMS over the median), loudest first; at most `NUM_LOUDEST`.
        num_outliers: channels at least `OUTLIER_RATIO` times as loud as the median.
    """

    site: str
    sites: tuple[str, ...]
    num_channels: int
    median_rms: float
    loudest: tuple[tuple[int, float], ...]
    num_outliers: int

    @property
    def ratio(self) -> float:
        """The loudest channel's RMS over the median."""
        return self.loudest[0][1]


def read_channels(run: RunDirectory) -> tuple[ChannelFact, ...]:
    """Read the statistics of a run; nothing where it kept none.

    Raises:
        RunError: a file cannot be read.
    """
    if not run.stats.is_file():
        return ()
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = cast(dict[str, Any], load_file(run.stats))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{run.stats}: cannot be read ({error}). Restore the file, or run again.") from None
    groups = _groups(run.structure)
    measured = {name.removesuffix(SUFFIX): value for name, value in tensors.items() if name.endswith(SUFFIX)}
    found = (_channels(site, groups.get(site, (site,)), value) for site, value in measured.items())
    return tuple(fact for fact in found if fact is not None)


def loudest(facts: Sequence[ChannelFact]) -> list[ChannelFact]:
    """Those with the largest ratio, the largest first."""
    return sorted(facts, key=lambda fact: -fact.ratio)[:NUM_SHOWN]


def summary(facts: Sequence[ChannelFact]) -> str:
    """How unequal the inputs are, in words."""
    first = max(facts, key=lambda fact: fact.ratio)
    with_outliers = sum(fact.num_outliers > 0 for fact in facts)
    return (
        f"{wording.count(with_outliers)} of {wording.things(len(facts), 'input')} have outlier channels. The loudest "
        f"is channel {first.loudest[0][0]} of the input of {first.site}: {wording.number(first.ratio)} times the "
        "median channel."
    )


def _groups(path: Path) -> dict[str, tuple[str, ...]]:
    """The sites that read the same input as a site; empty where the run kept no structure."""
    if not path.is_file():
        return {}
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        groups = [tuple(map(str, group["sites"])) for block in blocks for group in block["groups"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not what bitwright writes ({error!r}). Restore the file, or run again.") from None
    return {site: group for group in groups for site in group}


def _channels(site: str, sites: tuple[str, ...], mean_square: Any) -> ChannelFact | None:
    """None where half of the channels are silent, or a figure is not finite."""
    import numpy

    rms = numpy.sqrt(numpy.asarray(mean_square, dtype=numpy.float64).ravel())
    median = float(numpy.median(rms)) if rms.size else 0.0
    if not (numpy.isfinite(rms).all() and median > 0):
        return None
    relative = rms / median
    loudest = numpy.argsort(-relative, kind="stable")[:NUM_LOUDEST]
    return ChannelFact(
        site=site,
        sites=sites,
        num_channels=int(rms.size),
        median_rms=median,
        loudest=tuple((int(channel), float(relative[channel])) for channel in loudest),
        num_outliers=int((relative >= OUTLIER_RATIO).sum()),
    )
