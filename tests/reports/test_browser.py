"""The pages in a real browser: they draw, react, fit a phone, turn dark, and fetch nothing.

Needs playwright and a Chromium: pip install 'bitwright[browser]', then `playwright install chromium` or the
distribution's own (apt-get install chromium).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitwright.reports.bench_page import write_bench_page
from bitwright.reports.comparison import compare_runs
from bitwright.reports.page import write_report

MAX_BYTES = 8_000_000
TIMEOUT_MS = 120_000
"""For machines that are busy with something else."""
NAMES = ("report", "plain", "trained", "comparison", "bench")
MARKS = ".point, .scatterlayer .trace, .barlayer path"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
INSTALL = "pip install 'bitwright[browser]', and playwright install chromium or the distribution's chromium"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed: {INSTALL}")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
        program = own if Path(own).exists() else next(iter(found), None)
        if program is None:
            pytest.skip(f"no Chromium found: {INSTALL}")
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(example_class: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with everything, one with the least, one of an adapter, a comparison and the page of a grid."""
    folder = tmp_path_factory.mktemp("pages")
    full, least, adapter = (example_class(folder / name) for name in ("full", "least", "adapter"))
    full.write(records=full.everything())
    training = {"kind": "training", "method": "lora", "perplexity_before": 120.0, "perplexity": 80.0}
    steps = [{"kind": "training_step", "step": step, "loss": 5 - step / 10} for step in range(1, 9)]
    adapter.write(results=training, records=[training, *steps], recipe={})
    full.write_statistics()
    least.write(records=[])
    asked = {"model": "m", "model_hash": "a", "text": "t", "text_hash": "b", "context": 8, "device": "cpu",
             "dtype": "float32", "calibration_hash": "c", "recipe": None}  # fmt: skip
    figures = {"bits_per_weight": 4.125, "size_bytes": 2e6, "perplexity": 3.2, "perplexity_stderr": 0.1,
               "kl_mean": 0.03, "kl_stderr": 0.002, "kl_p99": 0.4, "same_top1": 0.9, "seconds": 14.0,
               "peak_memory_bytes": 5e8,
               "window_kl": [0.02, 0.04]}  # fmt: skip
    cell = {"kind": "cell", "scheme": "W4A16-g128", "status": "done", "reason": None, "asked": asked, "machine": None}
    cells = [{**cell, "method": "gptq", "figures": figures},
             {**cell, "method": "rtn", "figures": {**figures, "kl_mean": 0.05, "window_kl": [0.04, 0.06]}}]  # fmt: skip
    return {
        "report": write_report(full.path, folder / "report.html"),
        "plain": write_report(least.path, folder / "plain.html"),
        "trained": write_report(adapter.path, folder / "trained.html"),
        "comparison": compare_runs([full.path, least.path], folder / "comparison.html"),
        "bench": write_bench_page(cells, folder / "bench.html"),
    }


class Opened:
    """A page in the browser, and everything that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int], scheme: str = "light") -> None:
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.set_default_timeout(TIMEOUT_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def evaluate(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture(scope="module")
def desktop(browser: Any, pages: dict[str, Path]) -> Iterator[dict[str, Opened]]:
    opened = {name: Opened(browser, path, DESKTOP) for name, path in pages.items()}
    yield opened
    for each in opened.values():
        each.page.close()


@pytest.fixture(scope="module")
def phone(browser: Any, pages: dict[str, Path]) -> Iterator[dict[str, Opened]]:
    opened = {name: Opened(browser, path, PHONE, "dark") for name, path in pages.items()}
    yield opened
    for each in opened.values():
        each.page.close()


@pytest.mark.parametrize("name", NAMES)
def test_page_is_small(pages: dict[str, Path], name: str) -> None:
    assert pages[name].stat().st_size < MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_page_loads_without_complaint_and_fetches_nothing(desktop: dict[str, Opened], name: str) -> None:
    assert desktop[name].complaints == []
    assert len(desktop[name].requests) == 1, "the page itself"


def marks_of(opened: Opened) -> list[tuple[str, int]]:
    """How many marks each chart has drawn."""
    return opened.evaluate(
        f"""[...document.querySelectorAll('[data-chart]:not([hidden])')].map(place => [
            place.dataset.chart, [...place.querySelectorAll({json.dumps(MARKS)})]
            .filter(mark => mark.getBoundingClientRect().width > 0).length])"""
    )


@pytest.mark.parametrize("name", ["report", "comparison", "bench"])
def test_every_chart_has_drawn_marks(desktop: dict[str, Opened], name: str) -> None:
    marks = marks_of(desktop[name])
    assert len(marks) >= 4
    assert [chart for chart, number in marks if number == 0] == []


@pytest.mark.slow
def test_the_pages_of_the_demo_draw_every_chart(browser: Any, demo_pages: tuple[Path, Path]) -> None:
    for path in demo_pages:
        opened = Opened(browser, path, DESKTOP)
        marks = marks_of(opened)
        assert marks
        assert [chart for chart, number in marks if number == 0] == []
        assert opened.complaints == []
        opened.page.close()


def test_the_loss_curve_and_its_level_are_drawn_in_the_colours_of_the_page(
    desktop: dict[str, Opened], phone: dict[str, Opened]
) -> None:
    script = (
        "[...document.querySelectorAll('[data-chart=training] .scatterlayer .js-line')].map(line => line.style.stroke)"
    )
    light, dark = desktop["trained"].evaluate(script), phone["trained"].evaluate(script)
    assert len(light) == len(dark) == 2
    assert not set(light) & set(dark)


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_scrolls_in_one_direction(phone: dict[str, Opened], name: str) -> None:
    if name == "report":
        phone[name].page.locator("#map tbody button").first.click()
    assert phone[name].evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert phone[name].complaints == []


def test_clicking_a_cell_opens_its_site_with_a_histogram(desktop: dict[str, Opened]) -> None:
    page = desktop["report"].page
    page.locator("#map tbody tr").nth(0).locator("button").nth(0).click()
    assert page.locator("#detail-name").inner_text() == "model.layers.0.q_proj"
    words = page.locator("#detail").inner_text()
    for figure in ("W4A16-g128 by gptq", "23.50 dB", "channel 2 is the loudest: 9.00", "0.0125", "3 lines"):
        assert figure in words
    assert page.locator("#detail-chart .barlayer path").count() == 4
    assert page.locator("#detail-chart .shapelayer path").count() == 3
    page.locator("#map tbody tr").nth(4).locator("button").click()
    assert page.locator("#detail-name").inner_text() == "model.layers.1.gate"
    assert "ignored by pattern" in page.locator("#detail-pairs").inner_text()
    assert not page.locator("#detail-chart").is_visible()


def test_the_map_switches_between_measures(desktop: dict[str, Opened]) -> None:
    page = desktop["report"].page
    first = page.locator("#map tbody button").first
    page.locator("#measure").select_option(label="Bits per weight")
    assert first.inner_text() == "4.13"
    page.locator("#measure").select_option(label="Sensitivity: fisher, W4A16-g128")
    assert first.inner_text() == "0.0125"
    page.locator("#measure").select_option(label="Output SQNR (dB)")
    assert first.inner_text() == "23.5"
    row = page.locator("#map tbody tr").first.locator("button")
    shares = row.evaluate_all("cells => cells.map(cell => parseFloat(cell.style.getPropertyValue('--share')))")
    assert shares[1] > shares[0], "11.75 dB is worse than 23.5 dB"


def test_the_map_is_used_without_a_mouse(desktop: dict[str, Opened]) -> None:
    page = desktop["report"].page
    page.locator("#map tbody tr").nth(0).locator("button").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#detail-name").inner_text() == "model.layers.1.q_proj"
    assert page.locator("#map button[tabindex='0']").count() == 1


def test_dark_mode_follows_the_system_and_the_button(desktop: dict[str, Opened], phone: dict[str, Opened]) -> None:
    def paper(opened: Opened) -> int:
        return opened.evaluate("+getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")

    for opened, dark_first in ((desktop["report"], False), (phone["report"], True)):
        assert (paper(opened) < 128) == dark_first
        lines = opened.evaluate("document.querySelector('[data-chart=depth] .js-line').style.stroke")
        opened.page.locator("#theme").click()
        assert (paper(opened) < 128) != dark_first
        assert opened.page.locator("#theme").get_attribute("aria-pressed") == str(not dark_first).lower()
        assert opened.evaluate("document.querySelector('[data-chart=depth] .js-line').style.stroke") != lines
        opened.page.locator("#theme").click()
        assert (paper(opened) < 128) == dark_first


@pytest.mark.parametrize("name", ["comparison", "bench"])
def test_tables_sort(desktop: dict[str, Opened], name: str) -> None:
    page = desktop[name].page
    head = page.locator("table[data-sortable] th button", has_text="KL divergence").first
    column = head.evaluate("button => button.parentElement.cellIndex")

    def order() -> list[float]:
        cells = page.locator(f"table[data-sortable] tbody tr > :nth-child({column + 1})")
        return cells.evaluate_all("cells => cells.map(cell => +cell.dataset.value)")

    head.click()
    assert order() == sorted(order())
    head.click()
    assert order() == sorted(order(), reverse=True)


def test_json_can_be_downloaded(desktop: dict[str, Opened]) -> None:
    page = desktop["comparison"].page
    page.locator("details.json summary").click()
    with page.expect_download() as waiting:
        page.locator("[data-download]").click()
    assert waiting.value.suggested_filename == "comparison.json"
    downloaded = json.loads(Path(waiting.value.path()).read_text(encoding="utf-8"))
    assert [row["name"] for row in downloaded["results"]] == ["full", "least"]
    assert desktop["comparison"].complaints == []


def test_the_site_table_filters(desktop: dict[str, Opened]) -> None:
    page = desktop["report"].page
    page.locator("#filter").fill("experts")
    assert page.locator("#sites-table tbody tr").count() == 1
    page.locator("#filter").fill("")
    assert page.locator("#sites-table tbody tr").count() == 5
