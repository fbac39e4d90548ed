"""Static ranges of activations: what is remembered while calibration text runs, and the range chosen from it.

A range found once has no cost at inference, but must suit text that nobody has seen. An observer never keeps the
activations. It is a state that adds batches and merges with other states, and a rule that turns the state into a range:

    name         state                               range
    minmax       smallest and largest value          covers all: no clipping, coarse steps where there are outliers
    average      moving average of each batch's      the average: one extreme batch counts little, a lasting shift much
                 smallest and largest value
    percentile   histogram                           99.9 % of the values on each side
    mse          histogram                           the least squared error with the given format
    entropy      histogram                           the least divergence with the given format

Merging is associative for all, so that ranks can combine in a tree. For `minmax` and the histograms it is also
commutative and exact: neither batches nor order nor the number of ranks change a bit. The moving average weighs later
batches more, so that its batches and order matter by definition: it is associative up to float64 rounding, and ranks
must merge in the order of their batches.

Legend: T tokens, I columns (input features), G groups of columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bitwright.calibration.clipping import entropy_range, mse_range
from bitwright.calibration.histogram import Histogram, group_ends
from bitwright.errors import DataError, RecipeError, ShapeError
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.granularity import Granularity
from bitwright.registry import Registry

# The weight of the newest batch in the moving average.
AVERAGE_WEIGHT = 0.01

Range = tuple[Tensor, Tensor]


@dataclass(slots=True, eq=False)
class Ends:
    """Smallest and largest value per group; +Inf and -Inf, the neutral elements, before the first batch.

    Attributes:
        low: [G] float64.
        high: [G] float64.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, num_groups: int) -> "Ends":
        """Return the ends of nothing."""
        low = torch.full((num_groups,), math.inf, dtype=torch.float64)
        return cls(low, -low)

    @property
    def is_empty(self) -> bool:
        """Whether a group has seen no value."""
        return bool((self.low > self.high).any())

    def update(self, x: Tensor, groups: Tensor) -> None:
        """Add a batch x [T, I], T > 0, with the group [I] of each column."""
        low, high = group_ends(x, groups, self.low.numel())
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def merge(self, other: "Ends") -> "Ends":
        """Return the ends of both."""
        return Ends(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


@dataclass(slots=True, eq=False)
class MovingEnds:
    """The exponential moving average of each batch's ends, as a map that composes.

    With batch t, the average v becomes (1 - c) v + c m_t; the first batch sets it. A run of batches after the first is
    the affine map v -> kept v + added, and affine maps compose associatively, not commutatively.

    Attributes:
        num_batches: int64, no dimensions.
        first: [2, G] float64, lowest and highest value of the first batch.
        kept: float64, no dimensions: what is left of the first batch.
        added: [2, G] float64: what the later batches add.
    """

    num_batches: Tensor
    first: Tensor
    kept: Tensor
    added: Tensor

    @classmethod
    def empty(cls, num_groups: int) -> "MovingEnds":
        """Return the average of nothing."""
        return cls._of(torch.zeros(2, num_groups, dtype=torch.float64), num_batches=0)

    @classmethod
    def _of(cls, ends: Tensor, *, num_batches: int) -> "MovingEnds":
        one = torch.ones((), dtype=torch.float64)
        return cls(torch.tensor(num_batches), first=ends, kept=one, added=torch.zeros_like(ends))

    @property
    def is_empty(self) -> bool:
        """Whether there was no batch."""
        return int(self.num_batches) == 0

    @property
    def average(self) -> Tensor:
        """Averaged lowest and highest value, [2, G] float64."""
        return self.kept * self.first + self.added

    def update(self, x: Tensor, groups: Tensor) -> None:
        """Add a batch x [T, I], T > 0, with the group [I] of each column."""
        ends = torch.stack(group_ends(x, groups, self.first.shape[1]))
        merged = self.merge(MovingEnds._of(ends, num_batches=1))
        self.num_batches, self.first = merged.num_batches, merged.first
        self.kept, self.added = merged.kept, merged.added

    def merge(self, other: "MovingEnds") -> "MovingEnds":
        """Return the average over the batches of this one, then those of the other."""
        if self.is_empty or other.is_empty:
            return replace(other if self.is_empty else self)
        kept = 1 - AVERAGE_WEIGHT
        # The first batch of the other one is an ordinary batch here.
        joined = kept * self.added + AVERAGE_WEIGHT * other.first
        return MovingEnds(
            num_batches=self.num_batches + other.num_batches,
            first=self.first,
            kept=other.kept * kept * self.kept,
            added=other.kept * joined + other.added,
        )


class State(Protocol):
    """What an observer remembers: a dataclass of CPU tensors whose shapes depend on G alone."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen."""
        ...

    def update(self, x: Tensor, groups: Tensor, /) -> None:
        """Add a batch x [T, I], T > 0, with the group [I] of each column."""
        ...

    def merge(self, other: Any, /) -> Any:
        """Return the state after the batches of this one, then those of the other; modifies neither."""
        ...


S = TypeVar("S", bound=State)
RangeRule = Callable[[S, LevelFormat], Range]


class Observer(Generic[S]):
    """Watches the inputs of one site and answers with the range to represent; made by an entry of `OBSERVERS`."""

    def __init__(self, *, num_channels: int, granularity: Granularity, state: S, rule: RangeRule[S]) -> None:
        self.num_channels = num_channels
        self.granularity = granularity
        self.state = state
        self._rule = rule
        self._groups = column_groups(num_channels, granularity)

    def observe(self, x: Tensor) -> None:
        """Add a batch of activations; an empty one changes nothing, nor does one that raises.

        Args:
            x: [..., I], any float dtype, on any device.
        Raises:
            ShapeError: x has not I columns.
            VerificationError: NaN or Inf.
        """
        if x.ndim < 1 or x.shape[-1] != self.num_channels:
            raise ShapeError(f"observer: activations {list(x.shape)} must be [..., {self.num_channels}].")
        if x.numel() > 0:
            self.state.update(x.detach().reshape(-1, self.num_channels), self._groups)

    def merge(self, other: "Observer[S]") -> "Observer[S]":
        """Return an observer of this one's batches, then the other's, with this one's rule; modifies neither.

        Raises:
            RecipeError: the two observe differently.
        """
        if type(self.state) is not type(other.state) or self._layout != other._layout:
            raise RecipeError(
                f"observer: {self._describe()} and {other._describe()} do not merge. Make all from one recipe."
            )
        return self._with(self.state.merge(other.state))

    def range(self, format: LevelFormat) -> Range:
        """Return the smallest and the largest value to represent, (low [G], high [G]) in float64 on the CPU.

        Always low <= 0 <= high; both are 0 for a group that saw only zeros. The grid is then the min-max grid of this
        range. Only `mse` and `entropy` look at the format.

        Raises:
            DataError: no activations were seen.
        """
        if self.state.is_empty:
            raise DataError(
                "observer: saw no activations, so that it has no range. Calibrate with text that reaches this site, or "
                "leave its inputs unquantized."
            )
        low, high = self._rule(self.state, format)
        return low.clamp(max=0), high.clamp(min=0)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the state as CPU tensors, whose shapes are those of every observer made alike: ready to gather."""
        return {field.name: getattr(self.state, field.name) for field in fields(self._dataclass())}

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> "Observer[S]":
        """Return an observer like this one with a state from `to_tensors`.

        Raises:
            ShapeError: the tensors are not those of such a state.
        """
        mine = {name: list(tensor.shape) for name, tensor in self.to_tensors().items()}
        given = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if mine != given:
            raise ShapeError(f"observer: state {given} does not fit {mine}. Save and load with one recipe.")
        return self._with(self._dataclass()(**{name: tensor.cpu() for name, tensor in tensors.items()}))

    def _dataclass(self) -> Any:
        return type(self.state)

    def _with(self, state: S) -> "Observer[S]":
        return Observer(num_channels=self.num_channels, granularity=self.granularity, state=state, rule=self._rule)

    @property
    def _layout(self) -> tuple[int, Granularity]:
        return self.num_channels, self.granularity

    def _describe(self) -> str:
        size = self.granularity.group_size
        groups = self.granularity.kind if size is None else f"{self.granularity.kind} of {size}"
        return f"{type(self.state).__name__} over {self.num_channels} channels per {groups}"


class ObserverFactory(Protocol):
    """An entry of `OBSERVERS`."""

    def __call__(self, *, num_channels: int, granularity: Granularity) -> Observer[Any]:
        """Return an observer that has seen nothing, of activations [..., I = num_channels].

        Raises:
            RecipeError: a granularity other than `tensor` and `columns`.
        """
        ...


def column_groups(num_channels: int, granularity: Granularity) -> Tensor:
    """Return the group of each column, [I] int64.

    Raises:
        RecipeError: a granularity other than `tensor` and `columns`.
    """
    if not granularity.spans_rows:
        raise RecipeError(
            f"observer: a range per {granularity.kind} is not static, as rows are new at every call. Use tensor or "
            "columns."
        )
    return torch.arange(num_channels) // granularity.columns_per_group(num_channels)


def percentile(percent: float) -> ObserverFactory:
    """Return observers that leave out `100 - percent` percent of the values on each side.

    Raises:
        RecipeError: percent outside (50, 100].
    """
    if not 50 < percent <= 100:
        raise RecipeError(f"percentile: {percent} is outside (50, 100]. Use 99.9 or 99.99.")

    def rule(histogram: Histogram, _: LevelFormat) -> Range:
        return histogram.quantile(1 - percent / 100), histogram.quantile(percent / 100)

    return _factory(Histogram.empty, rule)


def _factory(empty: Callable[[int], S], rule: RangeRule[S]) -> ObserverFactory:
    def build(*, num_channels: int, granularity: Granularity) -> Observer[Any]:
        state = empty(granularity.num_groups(num_channels))
        return Observer(num_channels=num_channels, granularity=granularity, state=state, rule=rule)

    return build


def _ends(ends: Ends, _: LevelFormat) -> Range:
    return ends.low, ends.high


def _average(ends: MovingEnds, _: LevelFormat) -> Range:
    low, high = ends.average
    return low, high


OBSERVERS: Registry[ObserverFactory] = Registry("observer")
OBSERVERS.register("minmax", _factory(Ends.empty, _ends))
OBSERVERS.register("average", _factory(MovingEnds.empty, _average))
OBSERVERS.register("percentile", percentile(99.9))
OBSERVERS.register("entropy", _factory(Histogram.empty, entropy_range))
OBSERVERS.register("mse", _factory(Histogram.empty, mse_range))
