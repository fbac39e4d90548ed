"""The knapsack against every assignment there is, its degenerate cases, and what it says where nothing fits."""

import itertools
import random

import pytest

from bitwright.errors import RecipeError
from bitwright.search.allocate import Allocation, Choice, Item, Limits, allocate, total
from bitwright.search.frontier import frontier

RESOURCES = {"loss": "loss", "size": "size_bytes", "latency": "latency_s"}


def _item(name: str, *choices: tuple[str | None, float, int]) -> Item:
    made = tuple(Choice(scheme=scheme, loss=loss, size_bytes=size) for scheme, loss, size in choices)
    return Item(name=name, sites=(f"{name}.a", f"{name}.b"), choices=made)


def _random_items(generator: random.Random) -> list[Item]:
    """Losses fall with size or not, repeat, and are zero now and then."""
    items: list[Item] = []
    for index in range(generator.randint(1, 5)):
        choices = tuple(
            Choice(
                scheme=f"s{place}",
                loss=generator.choice([0.0, 0.25, generator.random(), generator.random() ** 6]),
                size_bytes=generator.choice([100, 200, generator.randint(1, 10_000)]),
                latency_s=generator.choice([1e-6, generator.random() * 1e-5]),
                memory_bytes=generator.randint(1, 10_000),
            )
            for place in range(generator.randint(1, 4))
        )
        items.append(Item(name=f"i{index}", sites=(f"i{index}",), choices=choices))
    return items


def _limits(generator: random.Random, every: list[tuple[Choice, ...]]) -> Limits:
    """One to three limits, each at what some assignment needs, so that most of them bind."""
    names = generator.sample(["loss", "size_bytes", "latency_s", "memory_bytes"], generator.randint(1, 3))
    return Limits(**{f"max_{name}": total(generator.choice(every), name) for name in names})


@pytest.mark.parametrize("seed", range(200))
def test_no_assignment_is_better(seed: int) -> None:
    generator = random.Random(seed)
    items = _random_items(generator)
    every = list(itertools.product(*(item.choices for item in items)))
    limits = _limits(generator, every)
    objective = generator.choice(["loss", "size", "latency"])
    resource = RESOURCES[objective]
    possible = [choices for choices in every if limits.hold(choices)]
    if not possible:
        with pytest.raises(RecipeError, match=r"cannot be kept|contradict"):
            allocate(items, objective=objective, limits=limits)
        return
    best = min(total(choices, resource) for choices in possible)
    found = allocate(items, objective=objective, limits=limits)
    chosen = [found.chosen[item.name] for item in items]
    assert limits.hold(chosen)
    largest = max(getattr(choice, resource) for item in items for choice in item.choices)
    assert total(chosen, resource) <= best + 1e-6 * largest * len(items)


def test_sites_of_an_item_share_its_scheme() -> None:
    items = [_item("x", ("a", 1.0, 1), ("b", 0.0, 5)), _item("y", ("a", 0.1, 1), ("b", 0.0, 5))]
    found = allocate(items, limits=Limits(max_size_bytes=6))
    assert found.schemes == {"x.a": "b", "x.b": "b", "y.a": "a", "y.b": "a"}
    assert (found.loss, found.size_bytes) == (0.1, 6)


def test_of_equally_good_choices_the_smallest() -> None:
    zero = [_item("x", (None, 0.0, 9), ("a", 0.0, 2), ("b", 0.0, 4)), _item("y", ("a", 0.0, 3), ("b", 0.0, 3))]
    assert allocate(zero).size_bytes == 5
    same = [_item("x", ("a", 0.3, 7), ("b", 0.1, 7))]
    assert allocate(same, objective="size").loss == 0.1
    assert allocate([_item("x", ("a", 2.0, 3))]).loss == 2.0


def test_a_limit_that_nothing_keeps_is_named_with_what_can_be_reached() -> None:
    items = [_item("x", ("a", 1.0, 1000), ("b", 0.25, 5000)), _item("y", ("a", 1.0, 500), ("b", 0.25, 9000))]
    with pytest.raises(RecipeError, match=r"max_size_bytes 1,000 cannot be kept: the least .* is 1,500"):
        allocate(items, limits=Limits(max_size_bytes=1000, max_loss=9))
    with pytest.raises(RecipeError) as caught:
        allocate(items, limits=Limits(max_size_bytes=6000, max_loss=0.5))
    assert "max_size_bytes 6,000 would have to be 14,000" in str(caught.value)
    assert "max_loss 0.5 would have to be 1.25" in str(caught.value)


def test_bad_items_are_refused() -> None:
    with pytest.raises(RecipeError, match="no items"):
        allocate([])
    with pytest.raises(RecipeError, match="not finite"):
        allocate([_item("x", ("a", float("nan"), 1))])
    with pytest.raises(RecipeError, match="offers a scheme twice"):
        _item("x", ("a", 0.0, 1), ("a", 1.0, 2))
    with pytest.raises(RecipeError, match="one name"):
        allocate([_item("x", ("a", 0.0, 1)), _item("x", ("a", 0.0, 1))])


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(1)
    items = [
        _item(f"i{i}", *((f"w{b}", generator.random() * 4.0**-b, b * generator.randint(1, 9)) for b in range(2, 8)))
        for i in range(60)
    ]
    frontier(items, 6)
    assert capfd.readouterr().out == ""


def test_the_frontier_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(0)
    items = [
        _item(f"i{i}", (None, 0.0, 160), ("w8", 1e-5 * generator.random(), 80), ("w4", 0.1 * generator.random(), 40))
        for i in range(8)
    ]
    found = frontier(items, 20)
    assert found[0].size_bytes == 8 * 40
    assert found[-1].loss == 0.0
    pairs = [(each.size_bytes, each.loss) for each in found]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(pairs))
    for each in found:
        assert _least_loss(items, each.size_bytes) == pytest.approx(each.loss, abs=1e-7)


def _least_loss(items: list[Item], size: int) -> float:
    """By dynamic programming over sizes in steps of 40."""
    best = {0: 0.0}
    for item in items:
        step: dict[int, float] = {}
        for used, loss in best.items():
            for choice in item.choices:
                key = used + choice.size_bytes
                step[key] = min(step.get(key, float("inf")), loss + choice.loss)
        best = step
    return min(loss for used, loss in best.items() if used <= size)


def test_a_frontier_of_one_point() -> None:
    found: list[Allocation] = frontier([_item("x", ("a", 0.5, 3))], 5)
    assert [(each.size_bytes, each.loss) for each in found] == [(3, 0.5)]
    with pytest.raises(RecipeError, match="at least 2"):
        frontier([_item("x", ("a", 0.5, 3))], 1)
