"""Checks a built site: every link and image leads to a file and an anchor of it; nothing comes from elsewhere.

python -m scripts.site.links build/site/html
"""

from __future__ import annotations

import pathlib
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "alternate") and "href" in given:
            self.loaded.append(given["href"])
        elif tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])


def faults(site: pathlib.Path) -> list[str]:
    """One line for each link that leads nowhere and each file that another site is asked for."""
    pages = {path: _Page(path.read_text("utf8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the site's root
            continue
        for url in (*page.links, *page.loaded):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loaded and parts.scheme != "data":
                    found.append(f"{path.relative_to(site)}: loads {url}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{path.relative_to(site)}: {url} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                if not parts.fragment.startswith("__"):  # the theme's own
                    found.append(f"{path.relative_to(site)}: {url} has no such anchor")
    return found


def main() -> None:
    site = pathlib.Path(sys.argv[1]).resolve()
    pages = len(list(site.rglob("*.html")))
    if wrong := faults(site):
        sys.exit("\n".join(wrong))
    print(f"{pages} pages, every link leads somewhere, nothing is loaded from elsewhere: {site}/index.html")


if __name__ == "__main__":
    main()
