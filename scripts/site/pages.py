"""The pages of the site: those of docs/ as they are, their links to the rest of the repository made links to copies."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/focusllava-tiny/README.md")
"""Pages outside of docs/ that are pages of the site, under project/."""
MOST_BYTES = 300_000
"""The largest file that a page may link to outside of docs/."""
_LINK = re.compile(r"(?P<open>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$|^(?: {4,}|\t).*?$", re.DOTALL | re.MULTILINE)
_LANGUAGES = {
    ".py": "python",
    ".ipynb": "python",
    ".proto": "proto",
    ".yml": "yaml",
    ".yaml": "yaml",
    ".json": "json",
    ".sh": "bash",
}


class Pages:
    """Writes pages into a folder."""

    def __init__(self, out: pathlib.Path, root: pathlib.Path = ROOT):
        self.out, self.root = out, root
        self._places: dict[pathlib.Path, pathlib.Path] = {}
        """Files of the repository, and their pages or copies, both relative."""
        self._waiting: list[pathlib.Path] = []

    def write(self) -> None:
        """Writes every page of docs/ and of PROJECT, and a page for each file that they link to.

        Raises ValueError where a link leads to no file of the repository.
        """
        docs = self.root / "docs"
        for path in sorted(docs.rglob("*")):
            if path.is_file() and path.suffix != ".html":
                self._places[path.relative_to(self.root)] = path.relative_to(docs)
        for name in PROJECT:
            self._places[pathlib.Path(name)] = pathlib.Path("project") / name
        for source, place in list(self._places.items()):
            (self.out / place).parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".md":
                text = (self.root / source).read_text("utf8")
                (self.out / place).write_text(self._linked(text, source, place), "utf8")
            else:
                shutil.copy(self.root / source, self.out / place)
        while self._waiting:
            self._write_source(self._waiting.pop())

    def _linked(self, text: str, source: pathlib.Path, place: pathlib.Path) -> str:
        def moved(match: re.Match[str]) -> str:
            target = match["target"]
            if re.match(r"[a-z]+:", target):
                return match[0]
            found = self._place(pathlib.Path(os.path.normpath(source.parent / target)), source)
            return f"{match['open']}{os.path.relpath(found, place.parent)}{match['anchor'] or ''})"

        # What stands in code is no link.
        parts, at = [], 0
        for fence in _FENCE.finditer(text):
            parts += [_LINK.sub(moved, text[at : fence.start()]), fence[0]]
            at = fence.end()
        return "".join([*parts, _LINK.sub(moved, text[at:])])

    def _place(self, target: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
        if target not in self._places:
            if str(target).startswith("..") or not (self.root / target).exists():
                raise ValueError(f"{source}: links to {target}, which is not there")
            name = target / "index.md" if (self.root / target).is_dir() else pathlib.Path(f"{target}.md")
            self._places[target] = pathlib.Path("source") / name
            self._waiting.append(target)
        return self._places[target]

    def _write_source(self, target: pathlib.Path) -> None:
        """A page that shows a file, or lists the files of a folder."""
        path, place = self.root / target, self._places[target]
        lines = [f"# {target}", ""]
        if path.is_dir():
            for file in _tracked(path):
                found = self._place(file.relative_to(self.root), target)
                lines.append(f"- [{file.name}]({os.path.relpath(found, place.parent)})")
        else:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"{target} has {path.stat().st_size} bytes, too many for a page")
            text = path.read_text("utf8")
            text = _notebook(text) if path.suffix == ".ipynb" else text.rstrip("\n")
            lines += [f"````{_LANGUAGES.get(path.suffix, 'text')}", text, "````"]
        (self.out / place).parent.mkdir(parents=True, exist_ok=True)
        (self.out / place).write_text("\n".join(lines) + "\n", "utf8")


def _tracked(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in (".pyc", ".pyi") and not path.name.startswith("."):
            yield path


def _notebook(text: str) -> str:
    """The code of a notebook, its words as comments."""
    cells = json.loads(text)["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        part if cell["cell_type"] == "code" else "\n".join(f"# {line}".rstrip() for line in part.splitlines())
        for cell, part in zip(cells, parts, strict=True)
    )
