"""The page for everybody: axe-core in light and dark, in each state; a phone's width; nothing from elsewhere."""

from __future__ import annotations

import urllib.parse

import pytest

from tests.page_steps import SAMPLE, answer, ask, choose_sample, upload

RED = "What number is on the red card?"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_fault_in_any_state(open_page, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check(state: str) -> None:
        found = axe.run(page)
        assert found.violations_count == 0, f"{state}, {scheme}, {width} px\n{found.generate_report()}"

    # axe runs as a script in the page, which the page's own rules forbid.
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 850}, bypass_csp=True)
    page.locator("#model:not(:empty)").wait_for(state="attached")
    check("start")
    upload(page, "broken.png", SAMPLE.read_bytes()[:4000])
    page.locator(".note").wait_for()
    check("broken file")
    choose_sample(page)
    check("sample")
    ask(page, RED)
    page.locator(".settings summary").click()
    for name in ("Importance", "Regions"):
        page.get_by_label(name, exact=True).check()
    check("answered")
    page.get_by_role("button", name="Copy as code").click()
    check("code")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Compare").click()
    answer(page, 1)
    page.get_by_label("Questions", exact=True).check()
    check("compare")
    page.context.set_offline(True)
    ask(page, RED)
    check("server gone")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_where_the_key_is_asked_for(open_page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(keyed=False, color_scheme=scheme, bypass_csp=True)
    page.get_by_role("dialog").wait_for()
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_phone_scrolls_one_way_and_has_room_for_fingers(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    choose_sample(page)
    ask(page, RED)
    page.get_by_role("button", name="Compare").click()
    answer(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    sizes = page.evaluate("""() => [...document.querySelectorAll("button, .chip, summary, textarea")]
        .filter((one) => one.checkVisibility())
        .map((one) => [one.innerText || one.id, one.getBoundingClientRect().height])""")
    assert len(sizes) > 8 and not [size for size in sizes if size[1] < 34], sizes


def test_the_theme_can_be_chosen_and_stays(open_page):
    page = open_page(color_scheme="light")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Dark").click()
    dark = page.evaluate(ground)
    page.reload()
    assert light != dark == page.evaluate(ground)


def test_nothing_comes_from_elsewhere(open_page, server):
    page = open_page(keyed=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    choose_sample(page)
    ask(page, RED)
    home = urllib.parse.urlsplit(server).netloc
    hosts = {urllib.parse.urlsplit(url).netloc for url in asked if not url.startswith("blob:")}
    assert len(asked) > 10 and hosts == {home}


def test_a_script_that_gets_into_the_page_does_not_run(open_page):
    """What the Content-Security-Policy is for, tried: inline script and style, an image from elsewhere."""
    page = open_page(watched=False)
    broken = page.evaluate("""async () => {
        const broken = [];
        document.addEventListener("securitypolicyviolation", (event) => broken.push(event.effectiveDirective));
        const image = new Image();
        image.src = "http://192.0.2.1/x.png";
        const script = document.createElement("script");
        try { script.text = "window.ran = true"; } catch (error) { broken.push(error.name); }
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.head.append(script, style, image);
        await new Promise((resolve) => setTimeout(resolve, 200));
        return [broken, window.ran === undefined, getComputedStyle(document.body).display];
    }""")
    assert {"TypeError", "img-src", "style-src-elem"} <= set(broken[0]) and broken[1] and broken[2] == "flex"
