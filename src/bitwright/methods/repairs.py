"""What a repair is, and the table of those that exist: what makes up for errors once codes are chosen."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.bias_correction import bias_correction
from bitwright.numerics.inputs import QuantizedSite
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Improves a quantized site.

    Attributes:
        about: what it does, in a few words.
        apply: (weight [O, I] for transformed inputs, what became of the site, statistics of its inputs) -> the same
            site, improved.
        needs_own_layout: whether only bitwright's own layout holds the result.
    """

    about: str
    apply: Callable[[Tensor, QuantizedSite, SiteStats], QuantizedSite]
    needs_own_layout: bool = True


def _bias(weight: Tensor, site: QuantizedSite, stats: SiteStats) -> QuantizedSite:
    """Add the mean of what rounding the weight takes from the output; nothing where no token was seen."""
    if stats.mean is None:
        return site
    return replace(site, correction=bias_correction(weight, site.weight.dequantize(), stats.mean))


REPAIRS: Registry[Repair] = Registry("repair")
REPAIRS.register("bias", Repair(about="adds the mean error that is left to the output", apply=_bias))
