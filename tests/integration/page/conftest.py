"""One server of the shipped model, which asks for a key, and one browser, for every test of the page."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from cluster.local import LocalCluster
from services.gateway.callers import ApiKey
from services.gateway.keys import hash_of, new_key

ROOT = pathlib.Path(__file__).resolve().parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip
ALONE = {stage: {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}} for stage in ("encoder", "llm")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        for item in items:
            if item.path.parent == pathlib.Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason="chromium (Debian: chromium) is not there"))


@pytest.fixture(scope="package")
def key() -> str:
    return new_key()


@pytest.fixture(scope="package")
def server(tmp_path_factory, key: str):
    """The address of the page."""
    entry = ApiKey(name="tester", sha256=hash_of(key))
    keys = tmp_path_factory.mktemp("page") / "keys.yaml"
    keys.write_text(f"keys: [{{name: {entry.name}, sha256: {entry.sha256}}}]\n")
    checkpoint = ROOT / "checkpoints/focusllava-tiny"
    with LocalCluster(checkpoint=checkpoint, grpc_port=0, timeout_s=400, api_keys=keys, options=ALONE) as cluster:
        cluster.start(progress=lambda line: None)
        yield cluster.openai_url.removesuffix("v1")


@pytest.fixture(scope="package")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright (pip install '.[dev]') is not there")
    with playwright.sync_playwright() as started:
        with started.chromium.launch(executable_path=CHROMIUM, args=list(QUIET)) as launched:
            yield launched


@pytest.fixture
def open_page(browser, server: str, key: str):
    """Opens the page in a tab of its own, and says at the end what went wrong in it: nothing may.

    keyed: the tab has the key already. watched: what goes wrong counts. Other arguments are a browser context's.
    """
    contexts, complaints = [], []

    def opened(*, keyed: bool = True, watched: bool = True, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(60_000)
        if keyed:
            context.add_init_script(f"sessionStorage.setItem('focusllava-key', {key!r})")
        page = context.new_page()
        if watched:
            watch(page, complaints)
        page.goto(server)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


def watch(page, complaints: list[str]) -> None:
    """Collects exceptions and errors of the console, broken rules of the CSP among them.

    A refused request is left out: the browser writes that down by itself.
    """
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text)
            if message.type == "error" and not message.text.startswith("Failed to load resource")
            else None
        ),
    )
