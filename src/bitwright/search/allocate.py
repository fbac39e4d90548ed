"""Which scheme for which item, exactly: a knapsack in which every item takes one of its choices.

    minimise   sum of one resource over the chosen        (loss, size or latency)
    such that  sum of each limited resource <= its limit
               every item has exactly one choice

All resources are sums over items, so this is a linear program in 0/1 variables, and HiGHS solves it to proven
optimality, but for its tolerances: a millionth of the largest loss. Sums of losses are a model of the loss of the
whole, which `polish` then corrects by measuring.

An item is a set of sites that must share a scheme; `fused` finds the sets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from bitwright.errors import RecipeError
from bitwright.search.highs import minimise

Objective = Literal["loss", "size", "latency"]
_RESOURCES: Mapping[Objective, str] = {"loss": "loss", "size": "size_bytes", "latency": "latency_s"}
_MAX_LOWERINGS = 5
_TOLERANCE = 1e-9
"""Relative: by how much a sum of floats may exceed a limit that it meets exactly."""
_Floats = NDArray[np.float64]


class Infeasible(RecipeError):
    """No allocation keeps the limits.

    Attributes:
        needed: resource -> the least that its limit would have to be: alone, or with the other limits as they are.
        is_joint: every limit can be kept alone, but not all together.
    """

    def __init__(self, message: str, *, needed: Mapping[str, float], is_joint: bool) -> None:
        super().__init__(message)
        self.needed, self.is_joint = needed, is_joint


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to store an item.

    Attributes:
        scheme: its name; None for 16 bit.
        loss: what it adds to the loss of the model, in nats per token.
        size_bytes: on disk.
        latency_s: added to a token.
        memory_bytes: on the device.
        energy_j: added to a token.
    """

    scheme: str | None
    loss: float
    size_bytes: int
    latency_s: float = 0.0
    memory_bytes: int = 0
    energy_j: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Sites that take one scheme together."""

    name: str
    sites: tuple[str, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise RecipeError(f"{self.name}: has no choices. Give it at least one scheme.")
        if len({choice.scheme for choice in self.choices}) != len(self.choices):
            raise RecipeError(f"{self.name}: offers a scheme twice. Name each once.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the sums over all items may not exceed; None sets no limit. What is not in any item is to be taken off."""

    max_loss: float | None = None
    max_size_bytes: float | None = None
    max_latency_s: float | None = None
    max_memory_bytes: float | None = None
    max_energy_j: float | None = None

    def given(self) -> dict[str, float]:
        """The limits that are set, by the resource that each is of."""
        pairs = {field.name.removeprefix("max_"): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in pairs.items() if value is not None}

    def hold(self, choices: Sequence[Choice]) -> bool:
        """Whether the sums over these choices keep every limit."""
        return _keeps(choices, self.given())


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One choice per item, and what they sum to.

    Attributes:
        chosen: item -> its choice.
        schemes: site -> name of its scheme, None for 16 bit.
        loss: sum of the choices' losses: a prediction.
        size_bytes: of all items.
        latency_s: of all items.
        memory_bytes: of all items.
        energy_j: of all items.
    """

    chosen: Mapping[str, Choice]
    schemes: Mapping[str, str | None]
    loss: float
    size_bytes: int
    latency_s: float
    memory_bytes: int
    energy_j: float


def allocate(items: Sequence[Item], *, objective: Objective = "loss", limits: Limits | None = None) -> Allocation:
    """Return the best allocation, with a proof of optimality by HiGHS.

    Where choices of an item are equally good, it takes the smallest, and of equally small ones the most faithful.

    Args:
        items: each takes one of its choices.
        objective: what to minimise.
        limits: what the sums may not exceed.
    Raises:
        Infeasible: nothing keeps the limits; says which limit is to blame and what can be reached.
        RecipeError: losses that are not finite.
    """
    _check(items)
    bounds = limits or Limits()
    primary = _RESOURCES[objective]
    best = _solve(items, primary, bounds.given())
    if best is None:
        raise _infeasible(items, bounds.given())
    return allocation_of(items, best)


def allocation_of(items: Sequence[Item], choices: Sequence[Choice]) -> Allocation:
    """Return the allocation in which each item has the choice at its place."""
    return Allocation(
        chosen={item.name: choice for item, choice in zip(items, choices, strict=True)},
        schemes={site: choice.scheme for item, choice in zip(items, choices, strict=True) for site in item.sites},
        loss=total(choices, "loss"),
        size_bytes=int(total(choices, "size_bytes")),
        latency_s=total(choices, "latency_s"),
        memory_bytes=int(total(choices, "memory_bytes")),
        energy_j=total(choices, "energy_j"),
    )


def total(choices: Sequence[Choice], resource: str) -> float:
    """Sum a resource over choices."""
    return float(sum(getattr(choice, resource) for choice in choices))


def _solve(items: Sequence[Item], objective: str, limits: Mapping[str, float]) -> list[Choice] | None:
    """Minimise the sum of `objective` over the chosen; None where the limits leave nothing.

    HiGHS keeps limits to a millionth. Where that lets a sum exceed its limit, the limit is lowered by as much, and the
    solution is the best below the lowered one.
    """
    resources = tuple(dict.fromkeys((objective, *limits, "size_bytes", "loss")))
    useful = [_undominated(item.choices, resources) for item in items]
    lowered = dict(limits)
    for _ in range(_MAX_LOWERINGS):
        chosen = _solve_once(useful, objective, lowered)
        if chosen is None:
            break
        if _keeps(chosen, limits):
            return chosen
        excess = {name: total(chosen, name) - limit for name, limit in limits.items()}
        lowered = {name: lowered[name] - max(0.0, excess[name]) for name in limits}
    return _least_of_all(useful, limits)


def _keeps(choices: Sequence[Choice], limits: Mapping[str, float]) -> bool:
    return all(_within(total(choices, name), limit) for name, limit in limits.items())


def _least_of_all(useful: Sequence[Sequence[Choice]], limits: Mapping[str, float]) -> list[Choice] | None:
    """Where limits hold by a hair: what takes least of one resource under the other limits, if it keeps them all."""
    for name in limits:
        least = _solve_once(useful, name, {other: limit for other, limit in limits.items() if other != name})
        if least is not None and _keeps(least, limits):
            return least
    return None


def _solve_once(useful: Sequence[Sequence[Choice]], objective: str, limits: Mapping[str, float]) -> list[Choice] | None:
    """Solve one linear program in 0/1 variables; each entry of `useful` gives one choice."""
    flat = [choice for choices in useful for choice in choices]
    places = np.repeat(np.arange(len(useful)), [len(choices) for choices in useful])
    columns = np.arange(len(flat))
    one_each = csr_array((np.ones(len(flat)), (places, columns)), shape=(len(useful), len(flat)))
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    for resource, limit in limits.items():
        values = _column(flat, resource)
        least = np.array([min(getattr(choice, resource) for choice in choices) for choices in useful])
        room, values = limit - float(least.sum()), values - least[places]
        scale = float(values.max()) or 1.0
        if resource.endswith("bytes"):
            scale = float(np.gcd.reduce(values.astype(np.int64))) or 1.0
            room = math.floor(room / scale * (1 + 1e-12)) * scale
        constraints.append(LinearConstraint(values[None, :] / scale, -np.inf, room / scale))
    cost = _column(flat, objective)
    cost = cost - np.array([min(getattr(choice, objective) for choice in choices) for choices in useful])[places]
    solution = minimise(cost / (float(cost.max()) or 1.0), constraints)
    if solution is None:
        return None
    starts = np.searchsorted(places, np.arange(len(useful)))
    parts = np.split(solution, starts[1:])
    return [choices[int(np.argmax(part))] for choices, part in zip(useful, parts, strict=True)]


def _undominated(choices: Sequence[Choice], resources: Sequence[str]) -> list[Choice]:
    """Leave out a choice that another one matches in every resource, and beats in one or precedes."""
    kept: list[Choice] = []
    ordered = sorted(choices, key=lambda choice: tuple(getattr(choice, name) for name in resources))
    for choice in ordered:
        if not any(all(getattr(other, name) <= getattr(choice, name) for name in resources) for other in kept):
            kept.append(choice)
    return kept


def _infeasible(items: Sequence[Item], limits: Mapping[str, float]) -> Infeasible:
    """Find which limit cannot be kept, alone or beside the others, and what can be reached instead."""
    for resource, limit in limits.items():
        least = _solve(items, resource, {})
        if least is not None and not _within(total(least, resource), limit):
            return Infeasible(
                f"max_{resource} {_show(resource, limit)} cannot be kept: the least that the choices reach is "
                f"{_show(resource, total(least, resource))}. Raise it, or offer smaller schemes.",
                needed={resource: total(least, resource)}, is_joint=False,
            )  # fmt: skip
    needed: dict[str, float] = {}
    for resource in limits:
        others = {name: value for name, value in limits.items() if name != resource}
        least = _solve(items, resource, others)
        if least is not None:
            needed[resource] = total(least, resource)
    if not needed:
        names = ", ".join(f"max_{name}" for name in limits)
        problem = f"{names} contradict each other, in more than one pair. Give two of them at a time."
        return Infeasible(problem, needed=needed, is_joint=True)
    reached = [f"max_{r} {_show(r, limits[r])} would have to be {_show(r, value)}" for r, value in needed.items()]
    return Infeasible(
        f"max_{' and max_'.join(limits)} cannot be kept together, though each can alone: with the others as they are, "
        f"{', or '.join(reached)}. Raise one of them, or offer more schemes.",
        needed=needed, is_joint=True,
    )  # fmt: skip


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise RecipeError("nothing to allocate: there are no items.")
    names = [item.name for item in items]
    if len(set(names)) != len(names):
        raise RecipeError("two items have one name. Name each once.")
    for item in items:
        for choice in item.choices:
            if not np.isfinite([choice.loss, choice.latency_s, choice.energy_j]).all():
                raise RecipeError(
                    f"{item.name}: {choice.scheme or '16 bit'} has a cost that is not finite. Leave it out."
                )


def _column(choices: Sequence[Choice], resource: str) -> _Floats:
    return np.array([getattr(choice, resource) for choice in choices], dtype=np.float64)


def _within(value: float, limit: float) -> bool:
    return value <= limit + abs(limit) * _TOLERANCE


def _show(resource: str, value: float) -> str:
    return f"{value:,.0f}" if resource.endswith("bytes") else f"{value:.6g}"
