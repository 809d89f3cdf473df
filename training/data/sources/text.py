"""Entries of a JSON list or of a JSON Lines file, each read from its place in the file.

The list is parsed once, in pieces, as Latin-1: there a character is a byte, and no byte of a UTF-8 letter looks like
JSON's marks.
"""

from __future__ import annotations

import array
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from services.common.errors import InvalidInput
from training.data.entries import signed_words
from training.data.faults import EntryFault
from training.data.sources.index import Index, open_index

CHUNK = 2**22
LONGEST = 2**28
"""The longest entry, in bytes; a file with a longer one is no list of conversations."""
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\u00ef\u00bb\u00bf"


class TextSource:
    """A JSON or JSON Lines file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        index = open_index(path, build_index, "text")
        self.content, self._places, self.lengths = index.content, index.columns["places"], index.columns["lengths"]
        self._counted = (0, 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def entry(self, index: int) -> Any:
        """The entry as it stands in the file. Raises EntryFault if it is not JSON."""
        start, size = map(int, self._places[index])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        try:
            return json.loads(data)
        except ValueError as error:
            raise EntryFault("malformed", f"is not JSON: {error}") from None

    def place(self, index: int) -> str:
        """The line of the file that the entry begins in; reads up to there, from the entry that was asked for last."""
        start = int(self._places[index][0])
        at, line = self._counted if self._counted[0] <= start else (0, 1)
        with self.path.open("rb") as file:
            file.seek(at)
            while at < start and (data := file.read(min(start - at, CHUNK))):
                line += data.count(b"\n")
                at += len(data)
        self._counted = at, line
        return f"line {line}"


def build_index(path: pathlib.Path) -> Index:
    """Offset and size in bytes of each entry (int64 [N, 2]), and its signed words (int32 [N]).

    Raises InvalidInput naming the line where the file is no JSON.
    """
    places, lengths = array.array("q"), array.array("i")
    hashed = hashlib.blake2b(digest_size=20)
    entries = _list_entries(path, hashed) if _begins_with(path, "[") else _line_entries(path, hashed)
    for start, size, words in entries:
        places.extend((start, size))
        lengths.append(words)
    if not lengths:
        raise InvalidInput(f"{path} holds no entries", field="data")
    columns: dict[str, np.ndarray] = {
        "places": np.array(places, np.int64).reshape(-1, 2),
        "lengths": np.array(lengths, np.int32),
    }
    return Index(columns=columns, content=hashed.hexdigest())


def _begins_with(path: pathlib.Path, mark: str) -> bool:
    with path.open("rb") as file:
        return file.read(2**16).decode("latin-1").removeprefix(_BOM).lstrip(" \t\r\n").startswith(mark)


def _line_entries(path: pathlib.Path, hashed: Any) -> Iterator[tuple[int, int, int]]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            hashed.update(line)
            if line.strip():
                try:
                    words = signed_words(json.loads(line))
                except (ValueError, RecursionError):  # a fault of the entry, which reading it tells
                    words = -1
                yield start, len(line), words
            start += len(line)


def _list_entries(path: pathlib.Path, hashed: Any) -> Iterator[tuple[int, int, int]]:
    text = _Text(path, hashed)
    for byte in _BOM:
        if text.here() == byte:
            text.at += 1
    text.here()
    text.at += 1  # the bracket
    if text.here() == "]":
        return
    while True:
        text.here()
        start, size, value = text.value()
        yield start, size, signed_words(value)
        mark = text.here()
        text.at += 1
        if mark == "]":
            break
        if mark != ",":
            raise text.error("a comma or the closing bracket is missing")
    if text.here():
        raise text.error("something follows the list")


class _Text:
    """A file that is read in pieces: `text` is a part of it, `at` the place in it."""

    def __init__(self, path: pathlib.Path, hashed: Any):
        self.path, self.hashed = path, hashed
        self.file = path.open("rb")
        self.text, self.at = "", 0
        self.begins, self.line, self.ended = 0, 1, False
        self._scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

    def here(self) -> str:
        """The next mark that is no white space; empty at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> tuple[int, int, Any]:
        """Offset, size and value of the next entry. What a piece ends in is parsed anew with the next piece."""
        while True:
            try:
                value, end = self._scan(self.text, self.at)
            except (StopIteration, ValueError, RecursionError) as error:
                if len(self.text) - self.at > LONGEST or not self.more():
                    raise self.error(str(error) or "an entry is missing") from None
                continue
            if end < len(self.text) or not self.more():
                start, self.at = self.at, end
                return self.begins + start, end - start, value

    def more(self) -> bool:
        """Reads on; false at the end of the file. What has been parsed is let go."""
        if self.ended:
            return False
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.hashed.update(data)
        if not data:
            self.ended = True
            self.file.close()
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.begins += self.at
        self.text, self.at = self.text[self.at :] + data.decode("latin-1"), 0
        return True

    def error(self, message: str) -> InvalidInput:
        line = self.line + self.text.count("\n", 0, self.at)
        return InvalidInput(f"{self.path} is not JSON in the entry at line {line}: {message}", field="data")
