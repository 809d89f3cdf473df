"""The playground's files over HTTP: where they are, what they may do, and that they are all there and small."""

from __future__ import annotations

import contextlib
import gzip
import html.parser
import pathlib
import re
import tomllib

import pytest

from services.gateway import playground
from services.gateway.keys import Keys
from tests.fakes.http_door import open_door
from tests.fakes.stages import METRICS

ROOT = pathlib.Path(__file__).resolve().parents[3]
TYPES = {"": "text/html", "app.js": "text/javascript", "theme.css": "text/css", "icon.svg": "image/svg+xml",
         "samples/cards.png": "image/png"}  # fmt: skip
MOST_BYTES = 200_000
"""Largest that all files may be together, packed."""


@contextlib.asynccontextmanager
async def open_page(**options):
    async with open_door(page=playground.assets(), **options) as door:
        yield door.raw


async def test_every_file_has_its_type_and_rules():
    async with open_page() as client:
        for name, media_type in TYPES.items():
            url = f"/page/{name}" if name else "/"
            answer = await client.get(url)
            file = playground.FOLDER / (name or "index.html")
            assert answer.status_code == 200 and answer.content == file.read_bytes()
            assert answer.headers["content-type"].partition(";")[0] == media_type
            rules = answer.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(rules)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            head = await client.head(url)
            assert head.content == b"" and head.headers["etag"] == answer.headers["etag"]


async def test_a_browser_that_has_a_file_is_told_so_and_one_that_unpacks_gets_it_packed():
    async with open_page() as client:
        plain = await client.get("/page/app.js", headers={"accept-encoding": "identity"})
        packed = await client.get("/page/app.js", headers={"accept-encoding": "gzip, br"})
        known = await client.get("/page/app.js", headers={"if-none-match": f'"x", {plain.headers["etag"]}'})
        other = await client.get("/page/app.js", headers={"if-none-match": '"x"'})
    assert packed.headers["content-encoding"] == "gzip" and packed.content == plain.content  # unpacked by the client
    assert "content-encoding" not in plain.headers and plain.headers["vary"] == "accept-encoding"
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert (known.status_code, known.content, other.status_code) == (304, b"", 200)
    assert known.headers["etag"] == plain.headers["etag"]


async def test_other_paths_and_methods_are_refused_as_before():
    async with open_page() as client:
        for path in ("/page", "/page/", "/page/none.js", "/page/../http.py", "/page/%2e%2e/http.py", "/index.html"):
            assert (await client.get(path)).status_code == 404, path
        refused = await client.post("/", content=b"{}")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        assert (await client.get("/", headers={"host": "evil.example.org"})).status_code == 421


async def test_it_asks_for_no_key_and_can_be_left_out():
    keys = Keys(METRICS, text="keys: []")
    async with open_page(keys=keys) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
    async with open_door() as door:
        assert {(await door.raw.get(path)).status_code for path in ("/", "/page/app.js")} == {404}


class Page(html.parser.HTMLParser):
    """Collects what the markup refers to, and what a page under these rules may not have."""

    def __init__(self) -> None:
        super().__init__()
        self.urls, self.forbidden, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.urls += [found[name] for name in ("src", "href") if found.get(name, "").startswith(("page/", "http"))]
        self.ids += [found["id"]] if "id" in found else []
        inline = tag == "style" or (tag == "script" and "src" not in found)
        self.forbidden += [tag] if inline or any(name == "style" or name.startswith("on") for name in found) else []


def test_the_files_fit_together():
    page = Page()
    page.feed((playground.FOLDER / "index.html").read_text("utf8"))
    assets = playground.assets()
    assert not page.forbidden and len(set(page.ids)) == len(page.ids)
    for url in page.urls:
        assert f"/{url}" in assets, url
    scripts = {path.name: path.read_text("utf8") for path in playground.FOLDER.glob("*.js")}
    for name, text in scripts.items():
        for imported in re.findall(r'from "\./(.+?)"', text):
            assert imported in scripts, (name, imported)
        for wanted in re.findall(r'byId\("(.+?)"\)', text):
            assert wanted in page.ids, (name, wanted)
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    for file in re.findall(r'file: "(.+?)"', scripts["samples.js"]):
        assert f"/page/samples/{file}" in assets
    assert (playground.FOLDER / "samples/cards.png").read_bytes() == (ROOT / "docs/assets/sample.png").read_bytes()


def test_all_files_together_are_small():
    assert sum(len(asset.gzipped or asset.body) for asset in playground.assets().values()) < MOST_BYTES
    for asset in playground.assets().values():
        assert asset.gzipped is None or gzip.decompress(asset.gzipped) == asset.body


def test_the_wheel_has_every_file():
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["services"]
    packed = {path for pattern in patterns for path in (ROOT / "services").glob(pattern)}
    assert not [path for path in playground.FOLDER.rglob("*") if path.is_file() and path not in packed]


@pytest.mark.parametrize("name", sorted(path.name for path in playground.FOLDER.glob("*.js")))
def test_a_module_is_short_enough_to_read(name):
    assert len((playground.FOLDER / name).read_text("utf8").splitlines()) < 300
