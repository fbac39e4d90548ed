"""Every scheme family in one table: what `bitwright formats` shows."""

from dataclasses import dataclass
from typing import cast

from bitwright.exporters.layout_choice import carried_by
from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.formats import Format, LevelFormat
from bitwright.numerics.integer import MAX_BITS, MIN_BITS
from bitwright.schemes import FAMILIES, Scheme

INTEGER_REFERENCE = "arXiv:1712.05877"


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueRow:
    """One family of schemes with its default options.

    Attributes:
        scheme: a name that `--scheme` accepts.
        bits: per weight, without scales.
        levels: how many values a code can name.
        range: smallest and largest level in units of the scale; `learned` where weights decide.
        granularities: options that its weights take, the default first.
        bits_per_weight: with scales, for a weight of 4096 x 4096 in bfloat16.
        activations: what happens to them; `16 bit` if nothing.
        exports: which exports carry it.
        reference: where it was published.
        about: one line.
    """

    scheme: str
    bits: float
    levels: int
    range: str
    granularities: tuple[str, ...]
    bits_per_weight: float
    activations: str
    exports: tuple[str, ...]
    reference: str
    about: str


def catalogue() -> list[CatalogueRow]:
    """Return a row per family, integers first."""
    rows = [
        _row(f"W{bits}A16", INTEGER_REFERENCE, "integers; -asym adds zero points, -floatzero float ones")
        for bits in range(MAX_BITS, MIN_BITS - 1, -1)
    ]
    rows += [_row(f"W{w}A{a}", INTEGER_REFERENCE, "integers, inputs too") for w, a in ((8, 8), (4, 8), (4, 4))]
    for name in FAMILIES:
        family = FAMILIES[name]
        rows.append(_row(name, family.reference, family.about))
        if family.activations is not None:
            rows.append(_row(f"{name}-a16", family.reference, f"{family.about}; weights only"))
    return rows


def _row(name: str, reference: str, about: str) -> CatalogueRow:
    scheme = Scheme.parse(name)
    weights = scheme.weights
    size = 4096
    return CatalogueRow(
        scheme=name,
        bits=float(weights.format.bits),
        levels=weights.format.num_codes,
        range=_range(weights.format),
        granularities=_granularities(scheme),
        bits_per_weight=weights.num_bits(size, size, float_bits=16) / size**2,
        activations=_inputs(scheme),
        exports=carried_by(scheme),
        reference=reference,
        about=about,
    )


def _inputs(scheme: Scheme) -> str:
    acts = scheme.activations
    return "16 bit" if acts is None else f"{acts.format.name.removesuffix('-restricted')} per {acts.granularity.kind}"


def _range(format: Format) -> str:
    if isinstance(format, CodebookFormat):
        return "learned"
    levels = cast(LevelFormat, format)
    return f"{levels.min_value:g} … {levels.max_value:g}"


def _granularities(scheme: Scheme) -> tuple[str, ...]:
    default = str(scheme).removeprefix(f"{scheme.base}-").split("-")[0]
    if scheme.weights.scale in ("e8m0", "e8m0-int8", "e4m3"):
        return (default,)
    others = ("tensor", "channel", "g<n>", "block<n>")
    if isinstance(scheme.weights.format, CodebookFormat):
        others = others[:3]
    return (default, *(each for each in others if each != default))
