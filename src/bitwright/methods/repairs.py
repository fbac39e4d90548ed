"""What a repair is, and the table of those that exist: what makes up for errors once codes are chosen."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.numerics.inputs import QuantizedSite
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Improves a quantized site.

    Attributes:
        apply: (weight [O, I] for transformed inputs, what became of the site, statistics of its inputs) -> the same
            site, improved.
        needs_own_layout: whether only bitwright's own layout holds the result.
    """

    apply: Callable[[Tensor, QuantizedSite, SiteStats], QuantizedSite]
    needs_own_layout: bool = True


REPAIRS: Registry[Repair] = Registry("repair")
