"""The evolution never returns worse than it began with, keeps limits, repeats by its seed, and resumes."""

import itertools
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from bitwright.errors import RecipeError
from bitwright.records import read_jsonl
from bitwright.search.allocate import Choice, Item, Limits, allocate
from bitwright.search.polish import polish

LEVELS = (2, 3, 4, 8)
LIMITS = Limits(max_size_bytes=8 * 300)


def _items() -> list[Item]:
    generator = random.Random(3)
    return [
        Item(
            name=f"i{i}",
            sites=(f"i{i}.q", f"i{i}.k"),
            choices=tuple(Choice(scheme=f"W{b}", loss=4.0**-b * generator.random(), size_bytes=b * 80) for b in LEVELS),
        )
        for i in range(8)
    ]


class Measure:
    """A loss with interactions that the sums do not know: neighbours in few bits hurt each other."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, assignment: Mapping[str, str | None]) -> float:
        self.calls += 1
        bits = [int(str(assignment[f"i{i}.q"])[1:]) for i in range(8)]
        assert bits == [int(str(assignment[f"i{i}.k"])[1:]) for i in range(8)]
        return sum(4.0**-b for b in bits) + sum(2.0 ** -(a + b) for a, b in itertools.pairwise(bits))


@pytest.mark.parametrize("seed", range(5))
def test_it_improves_within_the_limits_and_never_worsens(seed: int) -> None:
    items, measure = _items(), Measure()
    start = allocate(items, limits=LIMITS)
    found = polish(start, items, measure, limits=LIMITS, offspring=6, rounds=10, seed=seed)
    assert found.start_loss == measure(start.schemes)
    assert found.measured_loss == measure(found.allocation.schemes)
    assert found.measured_loss < found.start_loss
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert LIMITS.hold(list(found.allocation.chosen.values()))
    assert polish(start, items, Measure(), limits=LIMITS, offspring=6, rounds=10, seed=seed) == found


def test_what_cannot_be_improved_stays() -> None:
    items = _items()
    start = allocate(items, limits=LIMITS)
    best = start.schemes
    found = polish(start, items, lambda schemes: 0.0 if schemes == best else 1.0, limits=LIMITS, rounds=4)
    assert found.allocation == start
    alone = [Item(name="x", sites=("x",), choices=(Choice(scheme="a", loss=1.0, size_bytes=1),))]
    assert polish(allocate(alone), alone, lambda _: 0.5, limits=Limits(), rounds=2).measured_loss == 0.5


def test_a_killed_run_measures_nothing_twice(tmp_path: Path) -> None:
    items, start = _items(), allocate(_items(), limits=LIMITS)
    whole = polish(start, items, Measure(), limits=LIMITS, offspring=4, rounds=6)
    dying = Measure()

    def killed(assignment: Mapping[str, str | None]) -> float:
        if dying.calls == 9:
            raise KeyboardInterrupt
        return dying(assignment)

    cache = tmp_path / "measured.jsonl"
    with pytest.raises(KeyboardInterrupt):
        polish(start, items, killed, limits=LIMITS, offspring=4, rounds=6, cache=cache)
    rest = Measure()
    assert polish(start, items, rest, limits=LIMITS, offspring=4, rounds=6, cache=cache) == whole
    assert rest.calls == whole.num_measured - 9
    assert len({record["assignment"] for record in read_jsonl(cache)}) == whole.num_measured


def test_a_start_outside_the_limits_is_refused() -> None:
    items = _items()
    with pytest.raises(RecipeError, match="does not keep the limits"):
        polish(allocate(items), items, Measure(), limits=LIMITS)
    with pytest.raises(RecipeError, match="not one of these items"):
        polish(allocate(items), items[:1] + _other(), Measure(), limits=Limits())


def _other() -> list[Item]:
    return [Item(name="z", sites=("z",), choices=(Choice(scheme="a", loss=0.0, size_bytes=1),))]
