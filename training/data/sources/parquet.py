"""Rows of a Parquet file, images inside. A row costs the reading of its row group: files of small ones are fast."""

from __future__ import annotations

import hashlib
import pathlib
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from services.common.errors import InvalidInput
from training.data.entries import signed_words
from training.data.sources.index import Index, open_index

TURNS = ("conversations", "messages")
IMAGES = ("image", "images")
KEPT_BYTES = 2**28
"""Row groups of all files that a process keeps in memory, those read last; the last one however large it is."""
_groups: OrderedDict[tuple[pathlib.Path, int], pyarrow.Table] = OrderedDict()


class ParquetSource:
    """A Parquet file with the columns `conversations` or `messages`, and `image` or `images`."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        index = open_index(path, build_index, "parquet")
        self.content, self._places, self.lengths = index.content, index.columns["places"], index.columns["lengths"]

    def __len__(self) -> int:
        return len(self.lengths)

    def entry(self, index: int) -> Any:
        """The row as a mapping."""
        group, row = map(int, self._places[index])
        return _group(self.path, group).slice(row, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        group, row = map(int, self._places[index])
        return f"row group {group}, row {row}"


def _group(path: pathlib.Path, group: int) -> pyarrow.Table:
    """A row group's columns that are read, from memory where it is still there."""
    if (key := (path, group)) not in _groups:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in (*TURNS, *IMAGES) if name in file.schema_arrow.names]
            _groups[key] = file.read_row_group(group, columns=names, use_threads=False)
        while len(_groups) > 1 and sum(table.nbytes for table in _groups.values()) > KEPT_BYTES:
            _groups.popitem(last=False)
    _groups.move_to_end(key)
    return _groups[key]


def build_index(path: pathlib.Path) -> Index:
    """Row group and row of each entry (int32 [N, 2]), and its signed words (int32 [N]).

    Raises InvalidInput: not a Parquet file, or none of the columns that are read.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InvalidInput(f"{path} is not a readable Parquet file: {error}", field="data") from None
    columns = file.schema_arrow.names
    if not any(name in columns for name in TURNS):
        raise InvalidInput(f"{path} has the columns {', '.join(columns)}, expected `conversations`", field="data")
    places, lengths = [], []
    for group in range(file.num_row_groups):
        turns = file.read_row_group(group, columns=[name for name in TURNS if name in columns]).to_pylist()
        shown = _rows_with_images(file, group, len(turns))
        for row, (raw, has_image) in enumerate(zip(turns, shown, strict=True)):
            places.append((group, row))
            lengths.append(signed_words({**raw, "image": "there" if has_image else None}))
    if not lengths:
        raise InvalidInput(f"{path} holds no entries", field="data")
    hashed = hashlib.blake2b(digest_size=20)
    hashed.update(str(path.stat().st_size).encode())
    with path.open("rb") as data:  # the footer, which holds sizes, places and statistics of all columns
        data.seek(-8, 2)
        footer = int.from_bytes(data.read(4), "little")
        data.seek(-8 - footer, 2)
        hashed.update(data.read(footer))
    return Index(
        columns={"places": np.array(places, np.int32), "lengths": np.array(lengths, np.int32)},
        content=hashed.hexdigest(),
    )


def _rows_with_images(file: pyarrow.parquet.ParquetFile, group: int, rows: int) -> list[bool]:
    """Whether each row of a group has an image; the images are read only where the statistics do not say."""
    names = [name for name in IMAGES if name in file.schema_arrow.names]
    if not names:
        return [False] * rows
    meta = file.metadata.row_group(group)
    leaves = [meta.column(n) for n in range(meta.num_columns)]
    leaves = [leaf for leaf in leaves if leaf.path_in_schema in (names[0], f"{names[0]}.bytes")]
    if leaves and all(leaf.statistics is not None and leaf.statistics.null_count == 0 for leaf in leaves):
        return [True] * rows
    shown: list[bool] = []
    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=names[:1], use_threads=False):
        for found in batch.column(0).to_pylist():
            inside = (found.get("bytes") or found.get("path")) if isinstance(found, dict) else found
            shown.append(bool(inside))
    return shown
