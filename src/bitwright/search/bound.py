"""How much the best mix could gain over a uniform scheme, if sites could have any number of bits.

One bit more divides a site's loss by four, whatever the site: the loss of sites with n_i weights and s_i nats per
weight at the uniform width is Σ n_i s_i 4^(-d_i), d_i being the bits that site i has more than uniform. With the bits
of all weights together held fixed (Σ n_i d_i = 0) it is least where every weight loses the same, and then

    least / uniform = geometric mean of s / arithmetic mean of s        (both over weights)

which is the gain of transform coding. The same mean says how many bits per weight may go at equal loss:
½ log₂(arithmetic / geometric). Menus have steps, and change the format and the overhead as well as the bits, so an
allocation may beat this by a little; sites that share a scheme fall short of it.

Reference: Jayant and Noll, Digital Coding of Waveforms, 1984, section 12.1; Cover and Thomas, Elements of Information
Theory, section 10.3.3 (reverse water-filling).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class WaterFilling:
    """The gain of the best mix over uniform under the law of four per bit.

    Attributes:
        share: of the uniform loss that is left at the same number of bits; 1 where all weights lose alike.
        saved_bits: per weight at the same loss.
    """

    share: float
    saved_bits: float


def water_filling(losses: Sequence[float], num_weights: Sequence[int]) -> WaterFilling:
    """Return the gain over a uniform scheme in which the items lose `losses`.

    Args:
        losses: of each item, nats per token; above 0.
        num_weights: of each item.
    Raises:
        RecipeError: no items, or one that loses nothing, of which there is no geometric mean.
    """
    if not losses or min(losses) <= 0:
        raise RecipeError("water-filling needs items that all lose something. Leave out those kept in 16 bit.")
    total = sum(num_weights)
    pairs = list(zip(losses, num_weights, strict=True))
    geometric = sum(count * math.log(loss / count) for loss, count in pairs) / total
    share = math.exp(geometric - math.log(sum(losses) / total))
    return WaterFilling(share=share, saved_bits=-0.5 * math.log2(share))
