"""The theory page says what the functions give now: its tables, the numbers in its prose, its figures."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PAGE = (ROOT / "docs" / "theory" / "quantization.md").read_text(encoding="utf-8")
TABLE_NAMES = re.findall(r"<!-- table: ([\w-]+) -->", PAGE)
DECIMAL = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("theory_tables")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def figures(tables: ModuleType) -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("draw_theory")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_every_table_is_on_the_page_once(tables: ModuleType) -> None:
    assert sorted(TABLE_NAMES) == sorted(tables.TABLES)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_a_table_is_what_the_functions_give(tables: ModuleType, name: str) -> None:
    start = PAGE.index(f"<!-- table: {name} -->\n")
    table = PAGE[PAGE.index("\n", start) + 1 : PAGE.index("<!-- end -->", start)]
    assert table == tables.TABLES[name](), "run: python scripts/draw_theory.py"


def test_every_number_in_the_prose_is_computed_or_marked_as_repeated(tables: ModuleType) -> None:
    prose = " ".join(tables.BLOCK.sub("", PAGE.partition("## Further reading")[0]).split())
    computed = tables.quoted()
    for name, text in computed.items():
        assert text in prose, f"'{name}' is now: {text}"
    known = {number for text in computed.values() for number in DECIMAL.findall(text)} | tables.PRINTED
    # 6.00 names a row of a table.
    assert set(DECIMAL.findall(re.sub(r"arXiv:[\d.]+", "", prose))) - known == {"6.00"}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs" / "theory").glob("*.svg")))
def test_a_figure_is_what_the_functions_give(figures: ModuleType, name: str) -> None:
    drawn = (ROOT / "docs" / "theory" / name).read_text(encoding="utf-8")
    assert drawn == figures.FIGURES[name](), "run: python scripts/draw_theory.py"
    assert f"]({name})" in PAGE


def test_every_figure_is_drawn(figures: ModuleType) -> None:
    assert {path.name for path in (ROOT / "docs" / "theory").glob("*.svg")} == set(figures.FIGURES)


def test_the_corrections_of_the_founding_texts() -> None:
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    scale = (x.max() - x.min()) / (2**4 - 1)
    # A fake-quantize without clamp and zero point: 17 codes, -8 to 8, in 4 bits.
    assert torch.unique(torch.round(x / scale)).tolist() == [float(code) for code in range(-8, 9)]
    # An integer zero point subtracted in units of x: what comes back is not what went in.
    zero_point = torch.round(-x.min() / scale)
    printed = scale * (torch.round((x - zero_point) / scale) - zero_point)
    right = scale * ((torch.round(x / scale) + zero_point).clamp(0, 15) - zero_point)
    assert (right - x).abs().max() <= scale
    assert (printed - x).abs().min() > scale
    # max|W| / 2^(b-1): the code of the largest weight does not exist, and an eighth of it is lost at 4 bits.
    assert torch.round(x / (x.abs().max() / 8)).clamp(-8, 7).max() / 8 == 7 / 8
