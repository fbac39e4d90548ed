"""What the methods benchmark concludes from its rows, lost ones included."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "methods_page.py"


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_page", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(by: str, method: str, kl: float, scheme: str = "W3A16-g128", seconds: float = 10.0) -> dict[str, Any]:
    windows = [kl * factor for factor in (0.9, 1.0, 1.1)]
    return {
        "budget": "W3A16-g128", "by": by, "method": method, "scheme": scheme, "bits_per_weight": 3.125, "kl_mean": kl,
        "kl_stderr": 0.1 * kl, "perplexity": 13.0, "seconds": seconds, "peak_memory_bytes": 10**8,
        "memory_before_bytes": 10**7, "window_kl": windows,
    }  # fmt: skip


def test_a_margin_that_is_missed_is_said(pages: ModuleType) -> None:
    rows = [row("bitwright", "gptq", 0.095), row("peer", "gptq", 0.1)]
    assert "5 % lower" in pages.answers(rows)[0]
    assert "NOT REACHED" in pages.answers(rows)[0]
    rows = [row("bitwright", "gptq", 0.08), row("peer", "gptq", 0.1)]
    assert "NOT REACHED" not in pages.answers(rows)[0]


def test_the_same_method_is_compared_on_the_same_kind_of_grid(pages: ModuleType) -> None:
    mine, asymmetric = row("bitwright", "gptq", 0.2), row("bitwright", "gptq", 0.2, "W3A16-g128-asym")
    assert pages.is_same(mine, row("peer", "gptq", 0.1))
    assert not pages.is_same(mine, row("peer", "gptq-asym", 0.1))
    assert pages.is_same(asymmetric, row("peer", "gptq-asym", 0.1))
    assert pages.is_same(row("bitwright", "signround", 0.2), row("peer", "signround-v2", 0.1))
    assert "WORSE" in "".join(pages.same_answers("W3A16-g128", [mine], [row("peer", "gptq", 0.1)]))


def test_differences_are_paired(pages: ModuleType) -> None:
    a, b = row("bitwright", "gptq", 0.2), row("peer", "gptq", 0.1)
    # 0.09, 0.1 and 0.11: mean 0.1, standard error 0.01 / sqrt(3)
    assert pages.paired(a, b) == pytest.approx(0.1 / (0.01 / 3**0.5))
    assert pages.paired(a, a) == 0.0


def test_a_page_has_a_table_per_budget_and_what_failed(pages: ModuleType) -> None:
    circumstances = dict.fromkeys(("samples", "seqlen", "windows", "threads", "dtype", "alone", "seed"), 1) | {
        "name": "m", "date": "d", "machine": "c", "calibration": "a", "text": "b", "known": True,
    }  # fmt: skip
    failed = {"budget": "W3A16-g128", "by": "peer", "method": "awq", "scheme": "W3A16-g128", "error": "no\n GPU"}
    page = pages.page(circumstances, [row("bitwright", "gptq", 0.2), row("peer", "gptq", 0.1), failed])
    assert page.index("| peer | gptq") < page.index("| **bitwright** | gptq")
    assert "peer awq W3A16-g128: no GPU" in page
    assert "Not all cells were measured" in page
