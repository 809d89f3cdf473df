"""Docstrings and comments read alone: none of the repository opens as a half sentence that continues a name."""

from __future__ import annotations

import ast
import io
import itertools
import pathlib
import re
import subprocess
import tokenize
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GENERATED = ("_pb2.py", "_pb2_grpc.py")

CONTINUES = frozenset("Of And But Or Nor That Than Because Whose".split())
"""Words that open no good docstring or comment."""
CONTINUES_A_NAME = frozenset("As Those Which So Is Are Was Were Not Else".split())
"""Words that open no good docstring, yet may open a comment: "As ray ends workers first, ..."."""
FRONTS = frozenset("For By From To In On At With Without After Before Until".split())
"""Prepositions that open a docstring only where a comma or a colon sets the phrase apart: "With samplers off, ..."."""
FUNCTION_WORDS = frozenset("a an the it its this these they there who what when which where whether if no all".split())
"""Words that are not names, so a text that opens with one has a capital."""


def fault(text: str, *, docstring: bool) -> str:
    """What is wrong with how a docstring or a comment opens; empty if nothing is."""
    words = re.match(r"[A-Za-z]+(?![\w`(.:\[])", text)
    if words is None:
        return ""
    word, sentence = words[0], re.split(r"[.;](?:\s|$)", text, maxsplit=1)[0]
    known = CONTINUES | CONTINUES_A_NAME | FRONTS | {each.capitalize() for each in FUNCTION_WORDS}
    if word.islower() and word.capitalize() in known:
        return f"opens with {word!r} in lower case"
    if word in CONTINUES or (docstring and word in CONTINUES_A_NAME):
        return f"opens with {word!r}"
    apart = re.match(r"At (least|most)\b", text) or re.search(r"[,:]", sentence)
    return f"opens with {word!r} and no comma after the phrase" if docstring and word in FRONTS and not apart else ""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, those below a field or a constant included."""
    bodies = [ast.parse(source).body]
    while bodies:
        for each in bodies.pop():
            match each:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield each.lineno, text.strip()
                case ast.stmt(body=list(inner)):
                    bodies.append(inner)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment that has its lines to itself, joined where it has several."""
    lines: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            lines[token.start[0]] = token.string.lstrip("#! ")
    for first in lines:
        if first - 1 not in lines:
            block = itertools.takewhile(lines.__contains__, itertools.count(first))
            yield first, " ".join(lines[line] for line in block)


def faults(source: str) -> list[tuple[int, str, str]]:
    """Line, what is wrong, and text of each docstring and comment that does not read alone."""
    texts = [(line, text, True) for line, text in docstrings(source)]
    if any(fault(line, docstring=False) for line in re.findall(r"^ *#[#! ]*(.*)", source, re.MULTILINE)):
        texts += [(line, text, False) for line, text in comments(source)]  # slow: only where a comment may be at fault
    return sorted((line, why, text) for line, text, own in texts if (why := fault(text, docstring=own)))


@pytest.mark.parametrize(
    "text",
    [
        "Of a batch's maps, at most and nearly; 0 to 1.",
        "And so is another state.",
        "whether the map is empty.",
        "As Llama 2's: words with a leading space.",
        "From submission to the first token.",
        "Those left in the last layer.",
    ],
)
def test_half_sentences_are_found(text: str) -> None:
    assert fault(text, docstring=True)


@pytest.mark.parametrize(
    "text",
    [
        "Share of a batch's maps that is kept; 0 to 1.",
        "Whether the map is empty.",
        "Where each visual token lies in the image.",
        "What takes longest comes first.",
        "With the samplers off, an imported checkpoint computes what Hugging Face's does.",
        "At most this many tiles go through the vision tower at once.",
        "int64 [K], ascending indices.",
        "vLLM's field of this name.",
        "a: the first argument.",
    ],
)
def test_whole_ones_pass(text: str) -> None:
    assert not fault(text, docstring=True)


def test_every_docstring_and_comment_reads_alone() -> None:
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.endswith(GENERATED)]
    assert len(names) > 300
    files = [ROOT / name for name in names if (ROOT / name).exists()]  # git lists one that is deleted but not committed
    found = [
        f"{path.relative_to(ROOT)}:{line}: {why}: {text[:60]}"
        for path in sorted(files)
        for line, why, text in faults(path.read_text())
    ]
    assert not found, "do not read alone (CONTRIBUTING.md, Style):\n" + "\n".join(found)
