"""What a person does on the page, and what they see there."""

from __future__ import annotations

import pathlib

SAMPLE = pathlib.Path(__file__).resolve().parents[1] / "docs/assets/sample.png"


def choose_sample(page, name: str = "Cards") -> None:
    page.get_by_role("button", name=name).click()
    page.get_by_placeholder("What would you like to know?").wait_for()


def upload(page, name: str, content: bytes, media_type: str = "image/png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": media_type, "buffer": content})


def ask(page, question: str) -> str:
    """Asks and waits for the end of the answer."""
    page.locator("#question-a").fill(question)
    page.keyboard.press("Enter")
    return answer(page)


def answer(page, side: int = 0) -> str:
    """The last answer of a side, once it is whole."""
    turn = page.locator(".lane").nth(side).locator(".talk li").last
    turn.locator(".answer:not(:empty), .note").first.wait_for()
    page.locator("#ask:visible").wait_for()
    return turn.locator(".answer:not(:empty), .note").first.inner_text()


def overlay(page, side: int = 0) -> str:
    """The drawing over the image, as a data: URL."""
    return page.locator(".overlay").nth(side).evaluate("canvas => canvas.toDataURL()")


def numbers(page, side: int = 0) -> list[int]:
    """Tokens of the image in full, merged and kept."""
    found = page.locator(".lane").nth(side).locator(".counter .number").all_inner_texts()
    return [int(text.replace(",", "")) for text in found]
