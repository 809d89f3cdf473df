"""The shell commands that the documentation shows, each with its place."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "checkpoints/focusllava-tiny/README.md")
    if path.name not in ("CHANGELOG.md",)
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S.*\n(?:(?: {4}.*)?\n)*)")
_PROGRAM = re.compile(
    r"(\.venv/bin/|make |focusllava |python |pip |ray |serve |kubectl |docker |bash |guidellm |vllm )"
)


@dataclass(frozen=True)
class Command:
    """A command as a page has it: one line, or several that belong together."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands() -> list[Command]:
    """Every command of every page, in order: those of bash blocks, and those of indented blocks that begin with one."""
    found = []
    for page in PAGES:
        text = page.read_text("utf8")
        name = str(page.relative_to(ROOT))
        blocks = [match[2] for match in _FENCE.finditer(text) if match[1] in ("bash", "sh", "shell")]
        plain = _FENCE.sub("\n\n", text)
        blocks += [
            re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)
            for match in _INDENTED.finditer(plain)
            if _PROGRAM.match(match[0].strip())
        ]
        found += [Command(name, command) for block in blocks for command in _split(block)]
    return found


def python_blocks(page: str) -> list[str]:
    """The Python of a page, a text a block."""
    return [match[2] for match in _FENCE.finditer((ROOT / page).read_text("utf8")) if match[1] == "python"]


def workplace(folder: pathlib.Path) -> pathlib.Path:
    """A folder in which commands find what the source tree has, and write nothing into it."""
    for name in ("checkpoints", "evaluation", "training", "cluster", "services", "focusllava", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    return folder


def here(command: str) -> str:
    """The command with this interpreter, and the program `focusllava` of this source tree."""
    python = shlex.quote(sys.executable)
    program = r"(^|^[A-Z_]+=\S+ |[|;] |\$\()(?:\.venv/bin/)?focusllava "
    command = re.sub(program, rf"\1{python} -m focusllava.cli ", command)
    return re.sub(r"^(?:\.venv/bin/)?python ", f"{python} ", command)


def _split(block: str) -> Iterator[str]:
    """Commands of a block, a line each, or several where one goes on: after a backslash, in an open quote or brace."""
    if "<<'EOF'" in block:  # a script in a command
        yield block.strip()
        return
    held = ""
    for line in block.splitlines():
        kept, opened = _scanned(f"{held}\n{line}" if held else line)
        if not kept.strip():
            held = ""
        elif kept.endswith("\\"):
            held = kept[:-1].rstrip() + " "
        elif opened:
            held = kept
        else:
            held = ""
            yield re.sub(r"[ \t]+", " ", kept.replace(" \n", " ")).strip()
    assert not held, f"a command that does not end: {held}"


def _scanned(text: str) -> tuple[str, bool]:
    """The text without its comments, and whether a quote or a brace is open at its end."""
    kept, quote, depth, comment = "", "", 0, False
    for before, character in zip(" " + text, text, strict=False):
        comment = character != "\n" and (comment or (not quote and character == "#" and before.isspace()))
        if comment:
            continue
        kept += character
        if before == "\\":
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += {"{": 1, "}": -1}.get(character, 0)
    return kept.rstrip(" \t"), bool(quote) or depth > 0
