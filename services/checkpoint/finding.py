"""Where a checkpoint is: named, in the environment, or the shipped one. Imports nothing heavy."""

from __future__ import annotations

import os
import pathlib

from services.common.errors import InvalidInput

SOURCE_TREE = pathlib.Path(__file__).resolve().parents[2]
CHECKPOINT_VARIABLE = "FOCUSLLAVA_CHECKPOINT"
DEFAULT_CHECKPOINT = SOURCE_TREE / "checkpoints" / "focusllava-tiny"


def find_checkpoint(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The folder given, or the environment's FOCUSLLAVA_CHECKPOINT, or the shipped one; absolute.

    A relative path counts from the working directory, then from the source tree. Raises InvalidInput when no
    checkpoint is there.
    """
    named = folder or os.environ.get(CHECKPOINT_VARIABLE)
    if not named and not DEFAULT_CHECKPOINT.is_dir():
        raise InvalidInput(
            "none is named, and the shipped one is only in the source tree: name a folder, or set "
            f"{CHECKPOINT_VARIABLE} (looked for {DEFAULT_CHECKPOINT})",
            field="checkpoint",
        )
    path = pathlib.Path(named or DEFAULT_CHECKPOINT).expanduser()
    for place in (path.absolute(), SOURCE_TREE / path):
        if (place / "config.json").is_file():
            return place
    raise InvalidInput(f"no config.json in {path}: name a checkpoint folder", field="checkpoint")
