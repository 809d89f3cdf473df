"""Pictures of the playground for the docs: `python scripts/screenshots.py http://127.0.0.1:8000/ docs/assets`."""

from __future__ import annotations

import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import Page, sync_playwright

QUESTION = "What number is on the red card?"
COLOURS = 192
"""Colours of a picture, which the page hardly exceeds: files of a third of the size."""


def answered(page: Page, side: int = 0) -> None:
    page.locator(".lane").nth(side).locator(".counter:visible").wait_for()
    page.locator("#ask:visible").wait_for()


def take(page: Page, file: pathlib.Path) -> None:
    page.mouse.move(0, 0)
    page.locator("h1").evaluate("document.activeElement.blur()")
    page.screenshot(path=file)
    Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def main(url: str, folder: pathlib.Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 860}, color_scheme="light")
        page.goto(url)
        page.get_by_role("button", name="Cards").click()
        page.get_by_role("button", name=QUESTION).click()
        answered(page)
        take(page, folder / "playground.png")
        page.set_viewport_size({"width": 1360, "height": 1010})
        page.get_by_label("Dim what was dropped").uncheck()
        page.get_by_label("Regions", exact=True).check()
        page.get_by_role("button", name="Dark").click()
        page.get_by_role("button", name="Compare").click()
        answered(page, 1)
        take(page, folder / "playground-compare.png")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
