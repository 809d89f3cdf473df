"""The page's Markdown, piece by piece, and the HTML file that is made of it."""

from __future__ import annotations

import base64
import html
import pathlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt

STYLE = (pathlib.Path(__file__).parent / "page.css").read_text("utf8")


@dataclass(frozen=True, kw_only=True)
class Image:
    """An SVG. alt: what it shows, for who cannot see it; file: its name beside the Markdown."""

    file: str
    svg: str
    alt: str
    caption: str


def plain(text: str) -> str:
    """The text as Markdown that reads as the text."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text).replace("\n", " ")


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {plain(text)}"


def bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {plain(item)}" for item in items)


def picture(image: Image) -> str:
    return f"![{plain(image.alt)}]({image.file})\n\n{plain(image.caption)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], strong: Collection[int] = ()) -> str:
    """The first column names the row; `strong` are the indices of the rows that stand out."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)]]
    lines += [[f"**{cell}**" if n in strong and cell else cell for cell in map(plain, row)]
              for n, row in enumerate(rows)]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_html(markdown: str, svgs: Mapping[str, str], *, title: str) -> str:
    """One file that needs nothing beside it: style and pictures are in it, and no script is.

    svgs: the pictures by the name that the Markdown has for them.
    """
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    tokens = parser.parse(markdown)
    for number, token in enumerate(tokens):
        if token.type == "td_open" and tokens[number - 1].type == "tr_open":
            # A row's name, its text and the end of its cell.
            token.tag = tokens[number + 2].tag = "th"
            token.attrs = {"scope": "row"}
        if token.type == "th_open":
            token.attrs["scope"] = "col"
        for child in token.children or ():
            if child.type == "image":
                svg = svgs[str(child.attrs["src"])]
                child.attrs["src"] = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    body = parser.renderer.render(tokens, parser.options, {})
    # Focusable, so that a keyboard can scroll it.
    body = body.replace("<table>", '<div class="scroll" tabindex="0">\n<table>').replace("</table>", "</table>\n</div>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        "</body>\n</html>\n"
    )
