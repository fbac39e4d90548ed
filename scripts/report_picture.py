"""Draw docs/report.png: the top of the report of 4-bit GPTQ on the demo model, and its map with one site open.

    python scripts/report_picture.py [--out docs/report.png]

Needs playwright and a Chromium, its own or the distribution's: pip install 'bitwright[browser]'.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from bitwright.demo import CALIBRATION, demo_model
from bitwright.pipeline import quantize
from bitwright.recipe import Recipe
from bitwright.reports.page import write_report
from bitwright.samples import record_samples
from bitwright.schemes import Scheme

WIDTH, TIMEOUT_MS = 1200, 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/report.png"))
    out = Path(parser.parse_args().out).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the page's commands name no place of this machine
        model, run = Path("demo-model"), Path("w4a16-g128-gptq")
        shutil.copytree(demo_model(), model)
        recipe = Recipe(scheme=Scheme.parse("W4A16-g128"), method="gptq", calibration=CALIBRATION)
        quantize(model, recipe, run)
        record_samples(run)
        draw(write_report(run).absolute(), out)
        os.chdir(out.parent)


def draw(page_file: Path, out: Path) -> None:
    """Leave out what lies between the verdict and the map, so that one picture shows both."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = own if Path(own).exists() else shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(page_file.as_uri())
        page.add_style_tag(content="nav, #asked, #depth, #map-section ~ *, details.json { display: none }")
        page.locator("#map tbody tr").nth(6).locator("button").nth(3).click()
        page.screenshot(path=out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
