"""What goes wrong on the page, told in words: broken files, a slow or lost server, a key that is asked for."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.page_steps import SAMPLE, answer, ask, choose_sample, upload

RED = "What number is on the red card?"


def test_what_takes_longer_says_so_and_can_be_stopped(open_page):
    page = open_page()
    choose_sample(page)
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 3000, "downloadThroughput": -1, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", slow)
    page.locator("#question-a").fill(RED)
    page.keyboard.press("Enter")
    page.locator(".working-words", has_text="The model looks at the image").wait_for(timeout=2500)
    page.get_by_role("button", name="Stop").click()
    assert answer(page) == "Stopped."
    network.send("Network.emulateNetworkConditions", {**slow, "latency": 0})
    page.get_by_role("button", name="Ask again").click()
    page.locator(".answer", has_text="60").wait_for()
    assert page.locator(".working").is_hidden()


LONG = """() => {
    const ask = window.fetch;
    const longer = (body) => JSON.stringify({ ...JSON.parse(body), max_tokens: 900, ignore_eos: true });
    window.fetch = (url, options) => ask(url, options?.body ? { ...options, body: longer(options.body) } : options);
}"""
"""Has the page ask for long answers, which the shipped model does not give by itself."""


def test_an_answer_is_seen_as_it_comes_and_can_be_stopped_half_way(open_page):
    page = open_page()
    choose_sample(page)
    page.evaluate(LONG)
    page.locator("#question-a").fill(RED)
    page.keyboard.press("Enter")
    shown = page.locator(".talk li .answer")
    page.locator(".working-words", has_text="Answering").wait_for()
    longer = "length => document.querySelector('.talk li .answer').textContent.length > length"
    for _ in range(3):
        page.wait_for_function(longer, arg=len(shown.text_content()))
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped here.").wait_for()
    stopped = shown.text_content()
    assert stopped.startswith("60") and page.locator(".working").is_hidden()
    page.reload()  # the page asks for answers as they are again
    choose_sample(page)
    assert ask(page, RED) == "60" and len(stopped) > 2, "a stopped request holds up nothing"


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(SAMPLE).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def test_an_image_that_the_browser_cannot_show(open_page):
    page = open_page()
    upload(page, "scan.tiff", image("TIFF"), "image/tiff")
    page.get_by_text("This browser cannot show this kind of image.").wait_for()
    assert ask(page, RED) == "60"
    box = page.locator(".frame").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(1027 / 714, rel=0.01)  # as the map says


def test_broken_files_are_told_in_words(open_page):
    page = open_page()
    upload(page, "broken.png", SAMPLE.read_bytes()[:4000])
    page.get_by_text("broken.png cannot be opened as an image. It may be damaged or cut off").wait_for()
    upload(page, "notes.txt", b"no image at all", "text/plain")
    page.get_by_text("notes.txt cannot be opened as an image").wait_for()
    upload(page, "empty.png", b"")
    page.get_by_text("empty.png is empty.").wait_for()
    upload(page, "icon.ico", image("ICO"), "image/x-icon")  # which browsers open
    said = ask(page, RED)
    assert said.startswith("The server cannot use this image: ") and "messages[" not in said
    upload(page, "mine.png", SAMPLE.read_bytes())
    assert ask(page, RED) == "60"


def test_a_server_that_is_gone_and_back(open_page):
    page = open_page()
    choose_sample(page)
    page.context.set_offline(True)
    assert ask(page, RED).startswith("The server does not answer.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Ask again").click()
    page.locator(".answer", has_text="60").wait_for()
    assert page.locator(".talk li").count() == 1


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(open_page, key):
    page = open_page(keyed=False)
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    dialog.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Without a key this server gives no answers.").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.get_by_label("Key", exact=True).fill("fl-wrong")
    page.keyboard.press("Enter")
    dialog.get_by_text("The server does not know this key.").wait_for()
    page.get_by_label("Key", exact=True).fill(key)
    page.keyboard.press("Enter")
    page.locator("#model", has_text="focusllava-tiny").wait_for()
    choose_sample(page)
    assert ask(page, RED) == "60"
    stored = page.evaluate("[JSON.stringify(localStorage), document.cookie, JSON.stringify(sessionStorage)]")
    assert [key in text for text in stored] == [False, False, True]
    page.reload()
    page.locator("#model", has_text="focusllava-tiny").wait_for()
    page.get_by_role("button", name="Forget key").click()
    choose_sample(page)
    page.locator("#question-a").fill(RED)
    page.keyboard.press("Enter")
    dialog.wait_for()
    page.get_by_label("Key", exact=True).fill(key)
    page.keyboard.press("Enter")
    assert answer(page) == "60"
