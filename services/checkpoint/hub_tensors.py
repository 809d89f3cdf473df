"""The tensors of a checkpoint of the Hugging Face hub: which file holds each, by the names that we give them."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from services.checkpoint.hub_config import read_json
from services.common.errors import InvalidInput

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that are read, by safetensors' name."""
# Written by older libraries; recomputed by today's.
_BUFFERS = re.compile(r"(.*\.)?(embeddings\.position_ids|rotary_emb\.inv_freq)$")


@dataclass(frozen=True, kw_only=True)
class HubTensor:
    """One tensor of the hub's checkpoint."""

    hub_name: str
    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


def map_names(src: pathlib.Path, rename: Callable[[str], str]) -> tuple[dict[str, HubTensor], list[str]]:
    """Maps our name of each tensor to where it is; the second are the hub's names that are known but not needed.

    rename: gives our name for a hub's. Raises InvalidInput for a file that cannot be read, or a name there twice.
    """
    sources: dict[str, HubTensor] = {}
    unused = []
    for path in _shards(src):
        try:
            with safe_open(path, framework="pt") as file:
                for hub_name in file.keys():  # noqa: SIM118 (not a dict)
                    view = file.get_slice(hub_name)
                    name = rename(hub_name)
                    if _BUFFERS.match(name):
                        unused.append(hub_name)
                    elif name in sources:
                        raise InvalidInput(f"is there twice, the other as {sources[name].hub_name}", field=hub_name)
                    else:
                        sources[name] = HubTensor(
                            hub_name=hub_name, path=path, shape=tuple(view.get_shape()), dtype=view.get_dtype()
                        )
        except SafetensorError as error:
            raise InvalidInput(f"is not a readable safetensors file: {error}", field=str(path)) from None
    if not sources:
        raise InvalidInput("holds no tensors", field=str(src))
    return sources, unused


def _shards(src: pathlib.Path) -> list[pathlib.Path]:
    index = src / "model.safetensors.index.json"
    names = _indexed(index) if index.is_file() else ["model.safetensors"]
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise InvalidInput(f"names a shard {name!r} outside its folder", field=index.name)
        if not (src / name).is_file():
            if not index.is_file() and (list(src.glob("*.bin")) or list(src.glob("*.pt*"))):
                raise InvalidInput(
                    f"{src} holds pickled weights (.bin), which can run code: convert it to safetensors first",
                    field="source",
                )
            raise InvalidInput(f"{src} lacks this file", field=name)
    return [src / name for name in names]


def _indexed(index: pathlib.Path) -> list[str]:
    """The files that an index names."""
    weight_map, field = read_json(index).get("weight_map"), f"{index.name} weight_map"
    if not isinstance(weight_map, dict):
        raise InvalidInput(f"is {weight_map!r:.80}, expected an object", field=field)
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise InvalidInput(f"has {file!r:.80} for {tensor}, expected the name of a file", field=field)
    return sorted(set(weight_map.values()))


def existing_parent(path: pathlib.Path) -> pathlib.Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)
