"""The documentation site, as far as it is ours: pages and their links, the generated reference, the check of it all."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from scripts.site.links import faults
from scripts.site.pages import PROJECT, ROOT, Pages
from scripts.site.protos import grpc_page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("site") / "out"
    subprocess.run([sys.executable, "-m", "scripts.site", str(out)], cwd=ROOT, check=True)
    return out


def test_every_page_of_the_navigation_is_there_and_no_other_is_forgotten(site: pathlib.Path) -> None:
    settings = tomllib.loads((site / "zensical.toml").read_text("utf8"))["project"]
    named = set(re.findall(r'"([\w./-]+\.md)"', (ROOT / "scripts" / "site" / "zensical.toml").read_text("utf8")))
    assert not {name for name in named if not (site / "docs" / name).is_file()}
    written = {str(path.relative_to(site / "docs")) for path in (site / "docs").rglob("*.md")}
    hidden = {name for name in written - named if not name.startswith("source/")}
    assert hidden == {"assets/README.md"}, "how the pictures were made is for those who work on it"
    assert settings["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] == [str(ROOT)]


def test_what_docstrings_are_asked_of_is_there(site: pathlib.Path) -> None:
    asked = [name for page in (site / "docs" / "reference").glob("*.md")
             for name in re.findall(r"^::: (\S+)", page.read_text("utf8"), re.MULTILINE)]  # fmt: skip
    assert len(asked) > 40
    for name in asked:
        module, _, member = name.rpartition(".")
        assert getattr(importlib.import_module(module), member).__doc__, name


def test_commands_and_the_grpc_api_are_described(site: pathlib.Path) -> None:
    commands = (site / "docs" / "reference" / "commands.md").read_text("utf8")
    for heading in ("focusllava ask", "focusllava data check", "focusllava serve"):
        assert f"## {heading}\n" in commands
    assert "--map OUT.png" in commands
    page = grpc_page()
    assert "| 8 | `return_map` | bool | Asks for what both samplers chose of each image" in page
    assert "map of uint32 to float" in page and "stream of [ChatResponse](#chatresponse)" in page
    anchors = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    assert {target.lower() for target in anchors} >= set(re.findall(r"\]\(#(\w+)\)", page))
    assert not re.findall(r"^\| \d+ \| `[a-z_]+` .*\|  \|$", page, re.MULTILINE), "fields without a comment"


def test_links_out_of_docs_lead_to_copies(tmp_path: pathlib.Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    for name in (*PROJECT, "docs/sub/b.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# A page\n", "utf8")
    (root / "code").mkdir()
    (root / "code" / "a.py").write_text("x = '](no.md)'\n", "utf8")
    page = root / "docs" / "a.md"
    links = "[b](sub/b.md#x) [c](../README.md) [d](../code/a.py) [e](../code) [f](https://a.b/c.md) `[g](h.md)`"
    page.write_text(f"{links}\n\n```\n[i](j.md)\n```\n", "utf8")
    with pytest.raises(ValueError, match=r"docs/a\.md: links to docs/h\.md"):
        Pages(tmp_path / "refused", root).write()
    page.write_text(page.read_text("utf8").replace("`[g](h.md)`", ""), "utf8")
    Pages(out, root).write()
    written = (out / "a.md").read_text("utf8")
    assert "[b](sub/b.md#x)" in written and "[c](project/README.md)" in written and "[i](j.md)" in written
    assert "[d](source/code/a.py.md)" in written and "[e](source/code/index.md)" in written
    assert "x = '](no.md)'" in (out / "source" / "code" / "a.py.md").read_text("utf8")
    assert "[a.py](a.py.md)" in (out / "source" / "code" / "index.md").read_text("utf8")


def test_a_link_that_leads_nowhere_is_found(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1>', "utf8")
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><a href="https://a.b">4</a>'
        '<img src="d.png"><script src="https://a.b/c.js"></script><a href="#top">5</a><p id="top">', "utf8"
    )  # fmt: skip
    assert faults(tmp_path) == [
        "a.html: b.html#gone has no such anchor",
        "a.html: c.html is not there",
        "a.html: d.png is not there",
        "a.html: loads https://a.b/c.js",
    ]
