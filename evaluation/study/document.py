"""A page as a list of blocks, and its two renderings: one HTML file that needs nothing beside it, and Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Heading:
    """level 1 is the page's title; anchor: what a link may point to."""

    level: int
    text: str
    anchor: str = ""


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    text: str


@dataclass(frozen=True, kw_only=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first column names the row; `strong` are the indices of the rows that stand out. A caption may be empty."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Image:
    """An SVG. alt: what it shows, for who cannot see it; file: its name beside the Markdown."""

    file: str
    svg: str
    alt: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Image

STYLE = """\
:root{color-scheme:light dark;--ink:#1c1c21;--faint:#5b5b66;--paper:#fff;--line:#d4d4dc;--tint:#f3f3f7}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6ea;--faint:#a3a3ae;--paper:#16161a;--line:#3a3a44;--tint:#212128}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;color:var(--ink);background:var(--paper);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2}h2{margin-top:2.5rem;font-size:1.25rem;border-top:1px solid var(--line);
padding-top:1rem}h3{font-size:1.05rem}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);padding-bottom:.4rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child,tbody th{text-align:left;font-weight:400;min-width:9rem}
thead th{font-weight:600;vertical-align:bottom}
tr.strong{background:var(--tint)}tr.strong th,tr.strong td{font-weight:600}
figure{margin:1.5rem 0}figure img{max-width:100%;height:auto;display:block}
figcaption{color:var(--faint);font-size:.875rem;margin-top:.4rem}
a{color:inherit}
"""


def to_html(blocks: Sequence[Block], *, title: str) -> str:
    """One file: style and pictures are in it, and no script is."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def to_markdown(blocks: Sequence[Block]) -> str:
    """The same with pictures as files beside it; what Markdown would read as its own is escaped."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(level=level, text=text, anchor=anchor):
            name = f' id="{html.escape(anchor)}"' if anchor else ""
            return f"<h{level}{name}>{html.escape(text)}</h{level}>"
        case Paragraph(text=text):
            return f"<p>{html.escape(text)}</p>"
        case Bullets(items=items):
            return "<ul>\n" + "".join(f"<li>{html.escape(item)}</li>\n" for item in items) + "</ul>"
        case Image(svg=svg, alt=alt, caption=caption):
            data = base64.b64encode(svg.encode()).decode()
            picture = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}">'
            return f"<figure>\n{picture}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
        case Table(caption=caption, header=header, rows=rows, strong=strong):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            lines = []
            for number, (name, *cells) in enumerate(rows):
                kind = ' class="strong"' if number in strong else ""
                written = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
                lines.append(f'<tr{kind}><th scope="row">{html.escape(name)}</th>{written}</tr>\n')
            # Focusable, so that a keyboard can scroll it.
            told = f"<caption>{html.escape(caption)}</caption>\n" if caption else ""
            return (
                f'<div class="scroll" tabindex="0">\n<table>\n{told}'
                f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>"
            )


def _markdown(block: Block) -> str:
    match block:
        case Heading(level=level, text=text):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text=text):
            return _plain(text)
        case Bullets(items=items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Image(file=file, alt=alt, caption=caption):
            return f"![{_plain(alt)}]({file})\n\n{_plain(caption)}"
        case Table(caption=caption, header=header, rows=rows, strong=strong):
            lines = [list(header), ["---", *["---:"] * (len(header) - 1)]]
            lines += [[f"**{cell}**" if n in strong and cell else cell for cell in map(_plain, row)]
                      for n, row in enumerate(rows)]  # fmt: skip
            told = f"{_plain(caption)}\n\n" if caption else ""
            return told + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """The text as Markdown that reads as the text."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text).replace("\n", " ")
