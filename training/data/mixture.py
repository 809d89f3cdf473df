"""A mixture of data: the sources that a YAML file or one path names, and how often each source's entries come."""

from __future__ import annotations

import base64
import hashlib
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import yaml

from services.common.errors import InvalidInput
from services.common.settings import Count, Range, build_settings
from training.data.encoding import ConversationEncoder, Encoded
from training.data.entries import Conversation, ImageRef, read_entry
from training.data.faults import EntryFault
from training.data.sources import Source, find_files, open_source

Stage = Literal["pretrain", "finetune"]


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One source of a mixture."""

    path: str
    """A file, a folder or a glob of .json, .jsonl, .parquet and .tar files."""
    name: str = ""
    images: str = ""
    """The folder that images' paths begin in; empty is the data file's own."""
    stage: Stage | None = None
    """The stage of training that it is for; None is both."""
    weight: Annotated[float, Range(0, above=True)] = 1.0
    """How often each entry comes in an epoch: 2 is twice, 0.5 is a half of the entries, another half each epoch."""
    count: Count | None = None
    """Entries that an epoch takes, before the weight; None is as many as there are."""
    origin: str = ""
    """Where it is got, for people."""
    layout: str = ""
    """What the folder must look like, for people."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What is trained on."""

    sources: tuple[SourceSettings, ...]
    root: str = ""
    """The folder that relative paths begin in; empty is the mixture file's own."""

    def of(self, stage: Stage | None) -> Mixture:
        """The sources of one stage alone. Raises InvalidInput if there is none."""
        kept = tuple(source for source in self.sources if stage is None or source.stage in (None, stage))
        if not kept:
            raise InvalidInput(f"no source is for the stage {stage}", field="data.sources")
        return Mixture(sources=kept, root=self.root)


def load_mixture(path: str | pathlib.Path, *, root: str = "", images: str = "", stage: Stage | None = None) -> Mixture:
    """The mixture of a .yaml file, or of one data file, folder or glob with its root of images.

    root: the folder that a mixture's paths begin in, in place of what it says itself.
    Raises InvalidInput naming the setting.
    """
    file = pathlib.Path(path).expanduser()
    if file.suffix not in (".yaml", ".yml"):
        return Mixture(sources=(SourceSettings(path=str(path), name=file.stem, images=images),))
    try:
        raw = yaml.safe_load(file.read_text("utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"{file} cannot be read: {error}", field="data") from None
    mixture = build_settings(Mixture, raw)
    folder = pathlib.Path(root).expanduser() if root else file.parent / pathlib.Path(mixture.root).expanduser()
    return Mixture(sources=mixture.sources, root=str(folder)).of(stage)


@dataclass(frozen=True, kw_only=True)
class _File:
    source: Source
    settings: int
    """Index of the settings that it belongs to."""
    first: int
    """Index of its first entry in the data."""
    images: pathlib.Path


class ConversationData:
    """The entries of a mixture, numbered through. It holds 4 bytes an entry; all else stays in the files."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        root = pathlib.Path(mixture.root)
        self._files: list[_File] = []
        ranges = []
        first = 0
        for number, settings in enumerate(mixture.sources):
            began = first
            for path in find_files(root / pathlib.Path(settings.path).expanduser()):
                source = open_source(path)
                images = root / pathlib.Path(settings.images).expanduser() if settings.images else path.parent
                self._files.append(_File(source=source, settings=number, first=first, images=images))
                first += len(source)
            ranges.append((began, first))
        self.ranges: tuple[tuple[int, int], ...] = tuple(ranges)
        """First entry and one past the last of each source of the mixture."""
        self.lengths = np.concatenate([np.asarray(file.source.lengths) for file in self._files])
        """int32 [N]: words of each entry, negative without an image."""
        self._firsts = np.array([file.first for file in self._files])

    def __len__(self) -> int:
        return len(self.lengths)

    def name(self, index: int) -> str:
        """File and number of an entry, counted from 0."""
        file = self._file(index)
        return f"{file.source.path}[{index - file.first}]"

    def place(self, index: int) -> str:
        """Where in its file an entry is."""
        file = self._file(index)
        return file.source.place(index - file.first)

    def read(self, index: int) -> tuple[Conversation, list[bytes]]:
        """An entry's turns and its images' files. Raises EntryFault."""
        conversation = read_entry(self.read_raw(index))
        folder = self._file(index).images
        return conversation, [_image_bytes(ref, folder) for ref in conversation.images]

    def read_raw(self, index: int) -> Any:
        """An entry as its file has it. Raises EntryFault if it cannot be read."""
        file = self._file(index)
        return file.source.entry(index - file.first)

    def encode(self, index: int, encoder: ConversationEncoder) -> Encoded:
        """An entry as a training sequence. Raises EntryFault."""
        conversation, images = self.read(index)
        tiles = [encoder.tiles(data) for data in images]
        return encoder.encode(conversation, tiles, self.name(index), index)

    def successors(self, index: int, most: int) -> Iterator[int]:
        """The entries after one, in its own file and with or without images like it, the file's first after its last.

        They stand in for it if it cannot be used.
        """
        file = self._file(index)
        entries = len(file.source)
        for step in range(1, min(most, entries)):
            other = file.first + (index - file.first + step) % entries
            if (self.lengths[other] < 0) == (self.lengths[index] < 0):
                yield other

    def identity(self) -> str:
        """Hash (hexadecimal) of what the files hold, their names, and how often each source comes."""
        hashed = hashlib.sha256()
        for file in self._files:
            settings = self.mixture.sources[file.settings]
            facts = file.source.path.name, file.source.content, len(file.source), settings.weight, settings.count
            hashed.update(f"{file.settings} {facts}\n".encode("utf8", "surrogateescape"))
        return hashed.hexdigest()

    def _file(self, index: int) -> _File:
        return self._files[int(np.searchsorted(self._firsts, index, "right")) - 1]


def _image_bytes(ref: ImageRef, folder: pathlib.Path) -> bytes:
    if isinstance(ref, bytes):
        return ref
    if ref.startswith("data:"):
        try:
            return base64.b64decode(ref.partition(",")[2], validate=True)
        except ValueError:
            raise EntryFault("corrupt_image", f"{ref[:40]}... is not base64") from None
    if ref.startswith(("http://", "https://")):
        raise EntryFault("missing_image", f"{ref} is an address: fetch the image and name its file")
    try:
        return (folder / ref).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise EntryFault("missing_image", f"{folder / ref}: {why}") from None
