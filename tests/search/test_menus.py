"""The default menu fits the model it is for; tables are in it only where nothing has to load in vLLM."""

import pytest

from bitwright.errors import RecipeError
from bitwright.model.sites import Site
from bitwright.schemes import Scheme
from bitwright.search.menus import INTEGERS, TABLES, default_menu


def site(in_features: int) -> Site:
    return Site(
        name=f"block.{in_features}", parameter=f"block.{in_features}.weight", out_features=8, in_features=in_features,
        kind="linear", index=None, transposed=False,
    )  # fmt: skip


def test_wide_rows_have_all_of_it() -> None:
    assert default_menu([site(256)], "auto", tables=False) == INTEGERS
    assert default_menu([site(256)], "auto", tables=True) == (*INTEGERS, *TABLES)


def test_groups_longer_than_a_row_are_left_out_for_all_sites() -> None:
    menu = default_menu([site(256), site(64)], "auto", tables=False)
    assert menu == tuple(name for name in INTEGERS if Scheme.parse(name).weights.granularity.group_size != 128)


def test_a_model_that_nothing_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.search.menus.INTEGERS", ("W4A16-g128",))
    with pytest.raises(RecipeError, match="--schemes"):
        default_menu([site(64)], "auto", tables=False)
