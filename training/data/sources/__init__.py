"""Files of training data, each opened through an index with random access."""

from __future__ import annotations

import glob
import pathlib
from typing import Any, Protocol

import numpy as np

from services.common.errors import InvalidInput

ENDINGS = (".json", ".jsonl", ".parquet", ".tar")


class Source(Protocol):
    """One file of entries."""

    path: pathlib.Path
    lengths: np.ndarray
    """int32 [N]: words of each entry, negative without an image."""
    content: str
    """Hash of what the file holds."""

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Any:
        """The entry as the file has it, the images perhaps as bytes. Raises EntryFault if it cannot be read."""

    def place(self, index: int) -> str:
        """Where in the file it is, for a person."""


def find_files(pattern: str | pathlib.Path) -> list[pathlib.Path]:
    """The data files that a path, a folder or a glob stands for, in order of their names.

    Raises InvalidInput where there is none, or a file of another format.
    """
    path = pathlib.Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())
    elif path.exists():
        found = [path]
    else:
        found = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise InvalidInput(f"{pattern} is no file, no folder with {', '.join(ENDINGS)}, and matches none", field="data")
    for file in found:
        if file.suffix not in ENDINGS:
            raise InvalidInput(f"{file} ends with none of {', '.join(ENDINGS)}", field="data")
    return found


def open_source(path: pathlib.Path) -> Source:
    """The entries of one file; its index is made if there is none."""
    if path.suffix == ".parquet":
        from training.data.sources.parquet import ParquetSource

        return ParquetSource(path)
    if path.suffix == ".tar":
        from training.data.sources.tar import TarSource

        return TarSource(path)
    from training.data.sources.text import TextSource

    return TextSource(path)
