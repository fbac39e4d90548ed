"""Budgets are read in the units of people, and refused where they say nothing."""

import math

import pytest

from bitwright.budget import Budget, parse_share, parse_size
from bitwright.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4GB", 4 * 10**9), ("3.5 GiB", int(3.5 * 2**30)), ("700mb", 7 * 10**8), ("512", 512), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text, "--fit") == num_bytes


@pytest.mark.parametrize("text", ["", "four GB", "-1GB", "0", "4 TB", "4GB!"])
def test_what_is_no_size_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(RecipeError, match="--fit"):
        parse_size(text, "--fit")


def test_shares() -> None:
    assert parse_share("2%", "--x") == parse_share("0.02", "--x") == 0.02
    with pytest.raises(RecipeError, match="--x two"):
        parse_share("two", "--x")


def test_a_share_of_perplexity_is_a_loss_and_the_lower_limit_counts() -> None:
    assert Budget(max_ppl_increase=0.02).max_loss == pytest.approx(math.log(1.02))
    assert Budget(max_ppl_increase=0.02, max_kl=0.01).max_loss == 0.01
    assert not Budget(max_kl=0.01).limits_cost
    assert Budget(average_bits=4.0).max_loss is None


def test_an_empty_budget_and_one_without_its_device_are_refused() -> None:
    with pytest.raises(RecipeError, match="no budget"):
        Budget()
    with pytest.raises(RecipeError, match="--hardware"):
        Budget(min_tokens_per_s=30.0)
    with pytest.raises(RecipeError, match="--max-kl"):
        Budget(max_kl=-1.0)
