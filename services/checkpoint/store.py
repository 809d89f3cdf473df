"""One checkpoint folder: safetensors shards split by stage, loaded a stage at a time. `writer.py` writes it.

config.json  chat_template.jinja  tokenizer files  README.md
encoder.safetensors.index.json  encoder-00001-of-0000n.safetensors ...
llm.safetensors.index.json      llm-00001-of-0000n.safetensors ...
model.safetensors.index.json    both stages' shards, for transformers; older checkpoints have none
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput

Stage = Literal["encoder", "llm"]
STAGES: tuple[Stage, ...] = ("encoder", "llm")
ENCODER_PREFIXES = ("vision_tower.", "multi_modal_projector.", "image_newline", "vision_guided_sampler.")
LLM_PREFIX = "language_model."
LM_HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"
MODEL_INDEX = "model.safetensors.index.json"
"""What transformers reads in place of the stages' indices."""
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", CHAT_TEMPLATE,
)  # fmt: skip


def index_path(folder: str | pathlib.Path, stage: Stage) -> pathlib.Path:
    return pathlib.Path(folder) / f"{stage}.safetensors.index.json"


def load_stage(
    folder: str | pathlib.Path, stage: Stage, *, expected: Mapping[str, Sequence[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of one stage, memory-mapped from that stage's shards; no other shard is opened.

    expected: name -> shape (as of a state dict on the meta device), to be matched exactly. A tied LM head is stored
    once and returned under both its names, sharing memory. Raises InvalidInput naming the shard or tensor that is
    missing, unknown, unreadable or wrong-shaped.
    """
    folder = pathlib.Path(folder)
    weight_map = read_index(folder, stage)["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = shard_path(folder, shard)
        names = {name for name, where in weight_map.items() if where == shard}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = set(file.keys())
                if stored != names:
                    odd = sorted(stored ^ names)[0]
                    problem = "is not in the index" if odd in stored else "is missing"
                    raise InvalidInput(f"{problem} ({folder.name}/{shard})", field=odd)
                for name in sorted(names):
                    tensors[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise InvalidInput(f"is not a readable safetensors file: {error}", field=str(path)) from None
    if stage == "llm" and LM_HEAD not in tensors and EMBEDDINGS in tensors:
        if FocusLlavaConfig.load(folder).text_config.tie_word_embeddings:
            tensors[LM_HEAD] = tensors[EMBEDDINGS]
    if expected is not None:
        check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected)
    return tensors


def stage_elements(folder: str | pathlib.Path, stage: Stage) -> int:
    """How many numbers a stage's weights hold, from the headers of its shards. Raises as `load_stage`."""
    folder, total = pathlib.Path(folder), 0
    for shard in sorted(set(read_index(folder, stage)["weight_map"].values())):
        path = shard_path(folder, shard)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise InvalidInput(f"is not a readable safetensors file: {error}", field=str(path)) from None
    return total


def check_shapes(actual: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raises InvalidInput naming the tensors that are missing, unknown or of another shape (8 of each at most)."""
    problems = {
        "missing": sorted(set(expected) - set(actual)),
        "unknown": sorted(set(actual) - set(expected)),
        "wrong shape": [
            f"{name} {list(actual[name])} instead of {list(expected[name])}"
            for name in sorted(set(actual) & set(expected))
            if tuple(actual[name]) != tuple(expected[name])
        ],
    }
    lines = [
        f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise InvalidInput("; ".join(lines), field="tensors")


def fingerprint(folder: str | pathlib.Path) -> str:
    """SHA-256 (64 hex digits) of the config, the tokenizer with its chat template, and every shard's hash.

    Reads small files only: the shards' hashes are the ones in the indices, which `verify` checks.
    """
    folder = pathlib.Path(folder)
    digest = hashlib.sha256()

    def update(name: str, data: bytes) -> None:
        digest.update(f"{name}\n{len(data)}\n".encode())
        digest.update(data)

    update("config.json", _canonical(FocusLlavaConfig.load(folder).to_dict()))
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            update(name, (folder / name).read_bytes())
    for stage in STAGES:
        update(index_path(folder, stage).name, _canonical(read_index(folder, stage)))
    return digest.hexdigest()


def verify(folder: str | pathlib.Path) -> str:
    """Hashes every shard again and returns the fingerprint; raises InvalidInput naming the first corrupt shard."""
    folder = pathlib.Path(folder)
    for stage in STAGES:
        for shard, expected in sorted(read_index(folder, stage)["metadata"]["shard_sha256"].items()):
            if file_sha256(shard_path(folder, shard)) != expected:
                raise InvalidInput(f"is corrupt: its SHA-256 is not the one in {stage}'s index", field=shard)
    return fingerprint(folder)


def read_index(folder: pathlib.Path, stage: Stage) -> dict[str, Any]:
    """Raises InvalidInput for an index that is missing, malformed or leads elsewhere."""
    path = index_path(folder, stage)
    try:
        index = json.loads(path.read_text("utf8"))
        shards, hashes = set(index["weight_map"].values()), set(index["metadata"]["shard_sha256"].keys())
    except FileNotFoundError:
        raise InvalidInput(f"{folder} has no {path.name}", field="checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is not a checkpoint index: {error!r}", field="checkpoint") from None
    if odd := [shard for shard in shards if not isinstance(shard, str)]:
        raise InvalidInput(f"names a shard {odd[0]!r}, expected the name of a file", field=str(path))
    if shards != hashes:
        raise InvalidInput(f"has hashes for other shards than it names: {sorted(shards ^ hashes)}", field=str(path))
    for shard in shards:
        # The index may come from anywhere: it must not lead out of the folder or into the other stage.
        if pathlib.PurePath(shard).name != shard or not shard.startswith(f"{stage}-"):
            raise InvalidInput(f"names a shard {shard!r} that is not one of stage {stage}", field=str(path))
    return index


def model_index(folder: pathlib.Path) -> dict[str, Any]:
    """The content of MODEL_INDEX: both stages in one map. Raises as `read_index`."""
    indices = [read_index(folder, stage) for stage in STAGES]
    return {
        "metadata": {"total_size": sum(index["metadata"]["total_size"] for index in indices)},
        "weight_map": {name: shard for index in indices for name, shard in index["weight_map"].items()},
    }


def shard_path(folder: pathlib.Path, shard: str) -> pathlib.Path:
    """Raises InvalidInput where there is no such shard."""
    path = folder / shard
    if not path.is_file():
        raise InvalidInput(f"{folder} lacks this shard", field=shard)
    return path


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
