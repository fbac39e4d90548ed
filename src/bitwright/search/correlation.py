"""How well a cheap score ranks what a measured one ranks: Spearman's rank correlation."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from bitwright.errors import RecipeError
from bitwright.search.sensitivity import Sensitivity

ALL = "all"
"""Every pair of site and scheme together."""


def rank_correlation(score: Sensitivity, measured: Sensitivity) -> dict[str, float | None]:
    """Return Spearman's rank correlation of two scores over all (site, scheme) pairs, and over sites per scheme.

    Over all pairs most of it is that fewer bits harm more; per scheme it says whether sites are told apart.

    Returns:
        `ALL` or scheme -> correlation; None where there are fewer than three sites or one score does not vary.
    Raises:
        RecipeError: the scores are not of the same sites and schemes.
    """
    if score.schemes != measured.schemes or set(score.values) != set(measured.values):
        raise RecipeError(f"{score.score} and {measured.score} are not of the same sites and schemes. Measure both so.")
    sites = list(score.values)

    def column(of: Sensitivity, schemes: Sequence[str]) -> list[float]:
        return [of.values[site][scheme] for scheme in schemes for site in sites]

    groups: Mapping[str, Sequence[str]] = {ALL: score.schemes, **{scheme: [scheme] for scheme in score.schemes}}
    return {name: _spearman(column(score, group), column(measured, group)) for name, group in groups.items()}


def _spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(cast(Any, spearmanr(x, y)).statistic)
