"""Where the entries of a data file are: made once, kept beside other indices, mapped into memory by whoever reads.

An index is a folder of one .npy file a column. Its name holds the file's path, size and time of change, so a changed
file gets another one; what the file holds is known by the hash of its content.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

FORMAT = 1
CACHE_VARIABLE = "FOCUSLLAVA_DATA_CACHE"


@dataclass(frozen=True, kw_only=True)
class Index:
    """Columns of an index, and the hash (hexadecimal) of what the file holds."""

    columns: dict[str, np.ndarray]
    content: str


def cache_folder() -> pathlib.Path:
    """Folder of the indices: FOCUSLLAVA_DATA_CACHE, or one in the user's cache."""
    return pathlib.Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/focusllava/data").expanduser()


def open_index(path: pathlib.Path, build: Callable[[pathlib.Path], Index], kind: str) -> Index:
    """The index of a file, made by `build` the first time. Of several processes one builds it, the others wait."""
    path = path.resolve()
    stat = path.stat()
    key = f"{FORMAT}/{kind}/{path}/{stat.st_size}/{stat.st_mtime_ns}"
    folder = cache_folder() / f"{path.stem[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    with contextlib.suppress(OSError, ValueError):
        return _load(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError):  # somebody else has built it meanwhile
            return _load(folder)
        _save(folder, build(path))
        return _load(folder)


def _load(folder: pathlib.Path) -> Index:
    facts = json.loads((folder / "index.json").read_text("utf8"))
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in facts["columns"]}
    return Index(columns=columns, content=facts["content"])


def _save(folder: pathlib.Path, index: Index) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    for name, column in index.columns.items():
        np.save(unfinished / f"{name}.npy", column)
    facts = {"columns": list(index.columns), "content": index.content}
    (unfinished / "index.json").write_text(json.dumps(facts), "utf8")
    unfinished.rename(folder)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
