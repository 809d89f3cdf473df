"""Samples of a WebDataset tar file: the members that share a name up to its first dot, one of them NAME.json.

NAME.json holds the entry, the other members are its images in the order of their names (NAME.jpg, or NAME.0.jpg and
NAME.1.jpg).
"""

from __future__ import annotations

import array
import hashlib
import json
import pathlib
import tarfile
from typing import Any

import numpy as np

from services.common.errors import InvalidInput
from training.data.entries import signed_words
from training.data.faults import EntryFault
from training.data.sources.index import Index, open_index

ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class TarSource:
    """A tar file, not compressed."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        index = open_index(path, build_index, "tar")
        self.content, self.lengths = index.content, index.columns["lengths"]
        self._samples, self._images = index.columns["samples"], index.columns["images"]

    def __len__(self) -> int:
        return len(self.lengths)

    def entry(self, index: int) -> Any:
        """The sample's entry, its images' bytes in it. Raises EntryFault if it has none or it is not JSON."""
        start, size, first, count = map(int, self._samples[index])
        if size < 0:
            raise EntryFault("malformed", "the sample has no .json member")
        with self.path.open("rb") as file:
            text = _read(file, start, size)
            images = [_read(file, *map(int, place)) for place in self._images[first : first + count]]
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise EntryFault("malformed", f"is not JSON: {error}") from None
        if isinstance(raw, dict):
            raw.pop("images", None)
            raw["image"] = images
        return raw

    def place(self, index: int) -> str:
        return f"byte {int(self._samples[index][0])}"


def _read(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def build_index(path: pathlib.Path) -> Index:
    """Samples (int64 [N, 4]: offset and size of the entry, size -1 without one, first image, images), images (int64
    [M, 2]: offset and size) and signed words (int32 [N]). Raises InvalidInput if it is no plain tar file."""
    samples, images, lengths = array.array("q"), array.array("q"), array.array("i")
    hashed = hashlib.blake2b(digest_size=20)
    shown: list[tuple[str, int, int]] = []
    name, entry, data = "", (0, -1), b""

    def finish() -> None:
        if entry[1] < 0 and not shown:
            return
        samples.extend((*entry, len(images) // 2, len(shown)))
        for _, *place in sorted(shown):
            images.extend(place)
        try:
            raw = json.loads(data)
        except ValueError:
            raw = {}
        lengths.append(signed_words({**raw, "image": len(shown)} if isinstance(raw, dict) else raw))

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all that it has seen
                if not member.isfile():
                    continue
                hashed.update(f"{member.name} {member.size} {member.mtime}\n".encode("utf8", "surrogateescape"))
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if f"{folder}/{stem}" != name:
                    finish()
                    name, entry, shown, data = f"{folder}/{stem}", (0, -1), [], b""
                if ending.lower() == "json":
                    entry = (member.offset_data, member.size)
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    hashed.update(data)
                elif ending.lower().rpartition(".")[2] in ENDINGS:
                    shown.append((ending, member.offset_data, member.size))
            finish()
    except tarfile.TarError as error:
        raise InvalidInput(f"{path} is not a plain tar file: {error}", field="data") from None
    if not lengths:
        raise InvalidInput(f"{path} holds no samples", field="data")
    columns: dict[str, np.ndarray] = {
        "samples": np.array(samples, np.int64).reshape(-1, 4),
        "images": np.array(images, np.int64).reshape(-1, 2),
        "lengths": np.array(lengths, np.int32),
    }
    return Index(columns=columns, content=hashed.hexdigest())
