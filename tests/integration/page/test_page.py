"""The playground in a real browser, against a real server: what a person does with it, step by step."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys

import pytest

from tests.page_steps import SAMPLE, answer, ask, choose_sample, numbers, overlay, upload

RED, WORD = "What number is on the red card?", "What word is on the yellow card?"


def test_an_image_is_uploaded_and_a_question_answered(open_page):
    page = open_page()
    upload(page, "mine.png", SAMPLE.read_bytes())
    assert ask(page, RED) == "60"
    full, merged, kept = numbers(page)
    assert full > merged > kept > 0
    counter = page.locator(".counter").inner_text()
    share = int(re.search(r"(\d+) % converted", counter)[1])
    assert 100 * kept / full < share < 100 * merged / full
    saved = re.search(r"KV cache saved\s+([\d.]+) (kB|MB) \((\d+) %\)", counter)
    assert saved and 0 < int(saved[3]) < 100, counter
    assert re.search(r"First token\s+[\d.]+ m?s", counter) and re.search(r"Speed\s+[\d.]+ tokens/s", counter)


def test_an_answer_streams(open_page):
    """The page writes the answer piece by piece: each of its texts on the way begins the next one."""
    page = open_page()
    choose_sample(page)
    page.evaluate("""() => {
        window.seen = [];
        const isAnswer = (record) => record.target.className === "answer";
        const note = (records) => seen.push(...records.filter(isAnswer).flatMap((record) => [...record.addedNodes]));
        new MutationObserver(note).observe(document.querySelector(".talk"), {childList: true, subtree: true});
    }""")
    whole = ask(page, "Where is the diamond?")
    seen = list(dict.fromkeys(page.evaluate("seen.map((text) => text.data)")))
    assert seen[-1] == whole == "top right" and len(seen) >= 2, seen
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False)), seen


def test_overlays_switch_on_and_off_and_change_with_the_question(open_page):
    page = open_page()
    choose_sample(page)
    clear = overlay(page)
    ask(page, RED)
    first = overlay(page)
    seen = {clear, first}
    for name in ("Importance", "Regions", "Overview tile", "Kept tokens", "Dim what was dropped"):
        box = page.get_by_label(name, exact=True)
        box.set_checked(not box.is_checked())
        assert overlay(page) not in seen, name
        seen.add(overlay(page))
        if name == "Regions":
            assert re.search(r"1×1, full detail: [\d.]+ % of the regions", page.locator(".legend").inner_text())
    for name in ("Importance", "Regions", "Overview tile", "Kept tokens", "Dim what was dropped"):
        box = page.get_by_label(name, exact=True)
        box.set_checked(not box.is_checked())
    assert overlay(page) == first
    ask(page, WORD)
    second = overlay(page)
    assert second not in (clear, first)
    page.get_by_role("button", name="Show where it looked").first.click()
    assert overlay(page) == first


def test_follow_up_questions_keep_the_conversation_and_a_new_one_forgets_it(open_page):
    page = open_page()
    choose_sample(page)
    sent = []
    page.on("request", lambda request: sent.append(request) if request.url.endswith("/chat/completions") else None)
    ask(page, RED), ask(page, WORD)
    roles = [[message["role"] for message in request.post_data_json["messages"]] for request in sent]
    assert roles == [["user"], ["user", "assistant", "user"]]
    assert sent[1].post_data_json["messages"][2]["content"] == WORD  # the image goes with the first turn alone
    page.get_by_role("button", name=WORD).click()  # a question to try is no follow-up
    assert answer(page) == "hen" and len(sent.pop().post_data_json["messages"]) == 1
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".talk li").count() == 0 and page.locator(".counter").is_hidden()
    ask(page, RED)
    assert len(sent[2].post_data_json["messages"]) == 1


def test_settings_change_what_is_sent_and_what_is_counted(open_page):
    page = open_page()
    choose_sample(page)
    page.locator(".settings summary").click()
    page.get_by_label("a budget of tokens").check()
    page.get_by_label("Budget: share of the tokens to keep").fill("5")
    ask(page, RED)
    _, merged, kept = numbers(page)
    assert kept == pytest.approx(0.05 * merged, abs=1)
    page.get_by_label("Merge plain regions").uncheck()
    page.get_by_label("Drop what the question does not need").uncheck()
    ask(page, RED)
    full, merged, kept = numbers(page)
    assert full == merged == kept
    page.get_by_label("Drop what the question does not need").check()
    page.get_by_label("another threshold").check()
    page.get_by_label("Threshold: share of the importance to keep").fill("0.6")
    ask(page, RED)
    assert 0 < numbers(page)[2] < 0.1 * full
    assert page.locator(".settings-now").inner_text() == "nothing merged, threshold 0.6"


def test_two_settings_and_two_questions_stand_side_by_side(open_page):
    page = open_page()
    choose_sample(page)
    ask(page, RED)
    page.get_by_role("button", name="Compare").click()
    assert answer(page, 1) == "60"  # the question that was asked, without the samplers
    assert numbers(page, 0)[2] < numbers(page, 1)[2] == numbers(page, 0)[0]
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Questions", exact=True).check()
    page.get_by_label("Question B").fill(WORD)
    page.get_by_label("Question A").fill(RED)
    page.get_by_role("button", name="Ask both").click()
    assert (answer(page, 0), answer(page, 1)) == ("60", "hen")
    assert overlay(page, 0) != overlay(page, 1) and numbers(page, 1)[1] == numbers(page, 0)[1]
    page.get_by_role("button", name="Compare").click()
    assert page.locator(".lane").count() == 1


@pytest.mark.parametrize("kind", ["curl", "Python"])
def test_the_copied_code_runs_and_gives_the_same_answer(open_page, kind, key, server, tmp_path):
    page = open_page()
    upload(page, "it's mine.png", SAMPLE.read_bytes())
    (tmp_path / "it's mine.png").write_bytes(SAMPLE.read_bytes())
    page.locator(".settings summary").click()
    page.get_by_label("another threshold").check()
    page.get_by_label("Threshold: share of the importance to keep").fill("0.95")
    ask(page, 'What\'s 100% on the "red" card?')
    page.get_by_role("button", name="Copy as code").click()
    page.get_by_label(kind, exact=True).check()
    code = page.locator("#code-text").inner_text()
    assert key not in code
    command = ["bash", "-c", code] if kind == "curl" else [sys.executable, "-c", code]
    environment = {**os.environ, "FOCUSLLAVA_API_KEY": key, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    shown = page.locator(".talk .answer").inner_text()
    converted = re.search(r"(\d+) % converted", page.locator(".counter").inner_text())[1]
    if kind == "curl":
        said = json.loads(ran.stdout)
        text, share = said["choices"][0]["message"]["content"], said["focus"]["converted_share_percent"]
    else:
        text, share = ran.stdout.splitlines()[0], float(ran.stdout.split("\n")[1].split()[0])
    assert text.strip() == shown and round(share) == int(converted), ran.stderr


def test_an_image_is_dropped_and_another_pasted(open_page):
    page = open_page()
    transfer = """([kind, name, data]) => {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        const held = new DataTransfer();
        held.items.add(new File([bytes], name, {type: "image/png"}));
        const options = {bubbles: true, cancelable: true};
        const event = kind === "drop" ? new DragEvent("drop", {...options, dataTransfer: held})
                                      : new ClipboardEvent("paste", {...options, clipboardData: held});
        document.body.dispatchEvent(event);
    }"""
    page.locator("#model:not(:empty)").wait_for()
    page.evaluate(transfer, ["drop", "dropped.png", base64.b64encode(SAMPLE.read_bytes()).decode()])
    page.locator(".picture[alt='dropped.png']").wait_for()
    assert ask(page, RED) == "60"
    page.evaluate(transfer, ["paste", "pasted.png", base64.b64encode(SAMPLE.read_bytes()).decode()])
    page.locator(".picture[alt='pasted.png']").wait_for()
    assert page.locator(".talk li").count() == 0


def test_two_tabs_at_once(open_page):
    tabs = [open_page(), open_page()]
    for page, question in zip(tabs, (RED, WORD), strict=True):
        choose_sample(page)
        page.locator("#question-a").fill(question)
    for page in tabs:
        page.keyboard.press("Enter")
    assert [answer(page) for page in tabs] == ["60", "hen"]


def test_the_whole_way_by_keyboard(open_page):
    page = open_page()
    page.locator("#model:not(:empty)").wait_for()

    def tab_to(words: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.innerText || document.activeElement.name || ''")
            if words in focused:
                return
        raise AssertionError(f"no tab stop: {words}")

    tab_to("Cards")
    page.keyboard.press("Enter")
    page.locator("#question-a:focus").wait_for()
    page.keyboard.type(RED)
    page.keyboard.press("Enter")
    assert answer(page) == "60"
    assert page.locator("#said").inner_text() == "Answer: 60"  # what a screen reader says
    before = overlay(page)
    tab_to("importance")
    page.keyboard.press("Space")
    assert overlay(page) != before


def test_a_models_and_a_persons_words_are_text(open_page):
    page = open_page()
    upload(page, "<img src=x onerror=alert(1)>.png", SAMPLE.read_bytes())
    markup = "<b>What</b> <img src=x onerror=alert(1)> is here?"
    ask(page, markup)
    assert page.locator(".asked").inner_text() == markup
    assert page.locator(".talk img, .talk b").count() == 0
