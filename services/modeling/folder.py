"""The checkpoint's folder for transformers: names of its tensors, folders of before there was one index, and saving."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from services.checkpoint.config import MODEL_TYPE, FocusLlavaConfig
from services.checkpoint.store import ENCODER_PREFIXES, MODEL_INDEX, STAGES, TOKENIZER_FILES, index_path, model_index
from services.checkpoint.writer import CheckpointWriter
from services.common.errors import InvalidInput

Tensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
"""Tensors by name, all at once or one after the other."""
ENCODER = "encoder."
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# The encoder's tensors have no prefix in a checkpoint.
_names = "|".join(re.escape(prefix.rstrip(".")) for prefix in ENCODER_PREFIXES)
register_checkpoint_conversion_mapping(
    MODEL_TYPE, [WeightRenaming(rf"^({_names})", rf"{re.escape(ENCODER)}\1".replace("\\.", "."))], overwrite=True
)


def served_names(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors with the names that a checkpoint has them under, one at a time."""
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        yield name.removeprefix(ENCODER), tensor


def is_older(folder: str | os.PathLike[str]) -> bool:
    """Whether it is a checkpoint without the index that transformers reads."""
    return index_path(os.fspath(folder), "llm").is_file() and not (pathlib.Path(folder) / MODEL_INDEX).is_file()


@contextlib.contextmanager
def with_index(folder: str | os.PathLike[str]) -> Iterator[str]:
    """A folder that stands for an older checkpoint while it is read: its small files, and an index of its shards.

    Raises InvalidInput where an index of the checkpoint is missing or malformed.
    """
    source = pathlib.Path(folder).absolute()
    index = model_index(source)
    index["weight_map"] = {name: str(source / shard) for name, shard in index["weight_map"].items()}
    with tempfile.TemporaryDirectory(prefix="focusllava-") as temporary:
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, pathlib.Path(temporary) / name)
        (pathlib.Path(temporary) / MODEL_INDEX).write_text(json.dumps(index), "utf8")
        yield temporary


def save(folder: str | os.PathLike[str], config: FocusLlavaConfig, tensors: Iterable[tuple[str, torch.Tensor]], *,
         source: str | None, max_shard_size: int | str) -> None:  # fmt: skip
    """Writes a checkpoint into a folder, over an older one's files; other files stay.

    source: a folder whose tokenizer files are copied; None, or one without any, leaves what is there.
    """
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    origin = pathlib.Path(source) if source and os.path.isdir(source) else target
    tokenizer = origin if any((origin / name).is_file() for name in TOKENIZER_FILES) else None
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=target) as temporary:
        written = pathlib.Path(temporary) / "checkpoint"
        with CheckpointWriter(written, config, max_shard_bytes=_bytes(max_shard_size)) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.finish(tokenizer)
        if (target / "README.md").is_file():
            (written / "README.md").unlink()
        for stage in STAGES:
            for old in (*target.glob(f"{stage}-*-of-*.safetensors"), index_path(target, stage)):
                old.unlink(missing_ok=True)
        # Weights first: until the indices are there, the folder is no checkpoint.
        for file in sorted(written.iterdir(), key=lambda file: file.suffix != ".safetensors"):
            os.replace(file, target / file.name)


def _bytes(size: int | str) -> int:
    """A shard's size as transformers writes it: 5GB, 200MiB, or a number of bytes."""
    found = re.fullmatch(r"(\d+) *([KMG]I?B)?", str(size).upper())
    if found is None:
        raise InvalidInput(f"is {size!r}, expected a size such as 5GB", field="max_shard_size")
    return int(found[1]) * _UNITS[found[2] or ""]
