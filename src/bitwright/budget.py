"""What a compressed model may cost and lose, in the units that people have: `4GB`, `2%`, `30` tokens per second.

fit                 resident bytes: weights, cache of keys and values, workspace
size                bytes of the files
average_bits        stored bits per weight of the sites that can be quantized, scales included
max_kl              nats per token from the original
max_ppl_increase    of the original's perplexity; a share of p is ln(1 + p) nats per token
min_tokens_per_s    of all sequences of a batch together, on a named device
"""

import math
import re
from dataclasses import dataclass, field

from bitwright.errors import RecipeError
from bitwright.search.cost import Workload
from bitwright.search.hardware import Hardware

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMG]?i?B?)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Any mix of limits; None sets none.

    Attributes:
        fit_bytes: in memory, at the end of the context of `work`.
        size_bytes: on disk.
        average_bits: per weight.
        max_kl: nats per token.
        max_ppl_increase: a share; 0.02 is 2 %.
        min_tokens_per_s: on `hardware`.
        work: how the model is used.
        hardware: the device; None where no limit speaks of time.
    """

    fit_bytes: int | None = None
    size_bytes: int | None = None
    average_bits: float | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_tokens_per_s: float | None = None
    work: Workload = field(default_factory=Workload)
    hardware: Hardware | None = None

    def __post_init__(self) -> None:
        limits = (
            ("--average-bits", self.average_bits), ("--max-kl", self.max_kl),
            ("--max-ppl-increase", self.max_ppl_increase), ("--min-tokens-per-s", self.min_tokens_per_s),
        )  # fmt: skip
        for name, value in limits:
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise RecipeError(f"{name} {value}: must be a finite number above 0.")
        if self.min_tokens_per_s is not None and self.hardware is None:
            raise RecipeError("--min-tokens-per-s: says nothing without a device. Give --hardware, such as this-cpu.")
        if self.is_empty:
            raise RecipeError(
                "no budget: give at least one of --fit, --size, --average-bits, --max-kl, --max-ppl-increase and "
                "--min-tokens-per-s."
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is limited."""
        costs = (self.fit_bytes, self.size_bytes, self.average_bits, self.min_tokens_per_s)
        return self.max_loss is None and all(cost is None for cost in costs)

    @property
    def max_loss(self) -> float | None:
        """The loss that is allowed, in nats per token: the lower of the two limits on quality.

        Where a model's probabilities are right, its text's negative log-likelihood grows by the KL divergence.
        """
        increase = None if self.max_ppl_increase is None else math.log1p(self.max_ppl_increase)
        return min((each for each in (self.max_kl, increase) if each is not None), default=None)

    @property
    def limits_cost(self) -> bool:
        """Whether anything but quality is limited."""
        costs = (self.fit_bytes, self.size_bytes, self.average_bits, self.min_tokens_per_s)
        return any(cost is not None for cost in costs)


def parse_size(text: str, option: str) -> int:
    """Bytes of a text such as `4GB`, `700 MB` or `3.5GiB`; GB are 10^9 bytes, GiB 2^30.

    Raises:
        RecipeError: it is no size; names the option.
    """
    match = _SIZE.fullmatch(text)
    unit = "" if match is None else match["unit"].upper()
    factor = UNITS.get(unit if unit.endswith("B") else f"{unit}B") if match else None
    if match is None or factor is None or float(match["number"]) <= 0:
        raise RecipeError(f"{option} {text}: not a size. Write it as 4GB, 700MB or 3.5GiB.")
    return int(float(match["number"]) * factor)


def parse_share(text: str, option: str) -> float:
    """A share of a text such as `2%` or `0.02`.

    Raises:
        RecipeError: it is neither; names the option.
    """
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        return float(number) / (100 if is_percent else 1)
    except ValueError:
        raise RecipeError(f"{option} {text}: not a share. Write it as 2% or 0.02.") from None
