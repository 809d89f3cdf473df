"""One checkpoint folder: safetensors shards split by stage, written atomically and loaded a stage at a time.

config.json  chat_template.jinja  tokenizer files  README.md
encoder.safetensors.index.json  encoder-00001-of-0000n.safetensors ...
llm.safetensors.index.json      llm-00001-of-0000n.safetensors ...
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput

Stage = Literal["encoder", "llm"]
STAGES: tuple[Stage, ...] = ("encoder", "llm")
ENCODER_PREFIXES = ("vision_tower.", "multi_modal_projector.", "image_newline", "vision_guided_sampler.")
LLM_PREFIX = "language_model."
LM_HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", CHAT_TEMPLATE,
)  # fmt: skip
MAX_SHARD_BYTES = 2 * 1024**3


def index_path(folder: str | pathlib.Path, stage: Stage) -> pathlib.Path:
    return pathlib.Path(folder) / f"{stage}.safetensors.index.json"


class CheckpointWriter:
    """Writes a checkpoint tensor by tensor, holding at most one shard a stage in memory.

    Nothing appears at `folder` until `finish`: everything is written to a sibling folder that then takes its place (an
    older checkpoint there is replaced). Leaving the `with` block without `finish` removes the sibling.
    """

    def __init__(self, folder: str | pathlib.Path, config: FocusLlavaConfig, *, max_shard_bytes: int = MAX_SHARD_BYTES):
        if max_shard_bytes < 1:
            raise InvalidInput(f"is {max_shard_bytes}, expected at least 1", field="max_shard_bytes")
        self.folder = pathlib.Path(os.path.abspath(folder))
        self.config = config
        self.max_shard_bytes = max_shard_bytes
        self.tied = bool(config.text_config.tie_word_embeddings)
        if self.folder.exists() and not index_path(self.folder, "llm").is_file():
            if not self.folder.is_dir() or any(self.folder.iterdir()):
                raise InvalidInput("exists and is not a FocusLLaVA checkpoint: remove it first", field=str(folder))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temp = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        self._temp.chmod(0o755)
        self._pending: dict[Stage, dict[str, torch.Tensor]] = {stage: {} for stage in STAGES}
        self._shards: dict[Stage, list[list[str]]] = {stage: [] for stage in STAGES}
        self._seen: set[str] = set()
        self._linked: set[Stage] = set()
        self.bytes_written = 0

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._temp, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes one tensor of any float dtype; its stage follows from its name. A tied LM head is not stored."""
        if name.startswith(LLM_PREFIX):
            stage: Stage = "llm"
        elif name.startswith(ENCODER_PREFIXES):
            stage = "encoder"
        else:
            raise InvalidInput("belongs to neither stage", field=name)
        if name in self._seen:
            raise InvalidInput("is given twice", field=name)
        self._seen.add(name)
        if name == LM_HEAD and self.tied:
            return
        pending = self._pending[stage]
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > self.max_shard_bytes:
            self._flush(stage)
        # Storage that is shared (a view, a tied weight) cannot go into one safetensors file: it gets its own.
        tensor = tensor.detach().cpu().contiguous()
        pending[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor

    def link(self, stage: Stage, folder: str | pathlib.Path) -> None:
        """Takes a stage of another checkpoint as it is; within a file system its shards are not copied."""
        for shard in sorted(set(_read_index(pathlib.Path(folder), stage)["weight_map"].values())):
            path = _shard_path(pathlib.Path(folder), shard)
            try:
                os.link(path, self._temp / shard)
            except OSError:
                shutil.copyfile(path, self._temp / shard)
        shutil.copyfile(index_path(folder, stage), index_path(self._temp, stage))
        self._linked.add(stage)

    def _part(self, stage: Stage, number: int) -> pathlib.Path:
        return self._temp / f"{stage}-{number:05d}.part"

    def _flush(self, stage: Stage) -> None:
        pending = self._pending[stage]
        if not pending:
            return
        self._shards[stage].append(list(pending))
        self.bytes_written += sum(t.nbytes for t in pending.values())
        save_file(pending, self._part(stage, len(self._shards[stage])), metadata={"format": "pt"})
        pending.clear()

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase | str | pathlib.Path,
        *,
        chat_template: str | None = None,
        readme: str | None = None,
    ) -> str:
        """Closes the shards, writes the small files, puts the folder in place and returns its fingerprint.

        tokenizer: an object, or a folder whose tokenizer files are copied. chat_template replaces the tokenizer's.
        """
        for stage in STAGES:
            if stage in self._linked:
                assert not self._pending[stage] and not self._shards[stage], f"{stage} is linked, and given as well"
            else:
                self._flush(stage)
                self._close_stage(stage)
        self.config.save(self._temp)
        _write_tokenizer(self._temp, tokenizer, chat_template)
        (self._temp / "README.md").write_text(readme or f"# {self.folder.name}\n\nA FocusLLaVA checkpoint.\n", "utf8")
        result = fingerprint(self._temp)
        for path in self._temp.iterdir():
            _sync(path)
        self._replace()
        return result

    def _close_stage(self, stage: Stage) -> None:
        weight_map: dict[str, str] = {}
        hashes: dict[str, str] = {}
        total = len(self._shards[stage])
        size = 0
        for number, names in enumerate(self._shards[stage], start=1):
            part = self._part(stage, number)
            shard = f"{stage}-{number:05d}-of-{total:05d}.safetensors"
            hashes[shard] = _sha256(part)
            size += part.stat().st_size
            part.rename(self._temp / shard)
            weight_map.update(dict.fromkeys(names, shard))
        index = {"metadata": {"total_size": size, "shard_sha256": hashes}, "weight_map": weight_map}
        index_path(self._temp, stage).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf8")

    def _replace(self) -> None:
        old = None
        if self.folder.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.old.", dir=self.folder.parent))
            self.folder.rename(old / "old")
        self._temp.rename(self.folder)
        _sync(self.folder.parent)
        if old:
            shutil.rmtree(old)


def save_checkpoint(
    folder: str | pathlib.Path,
    config: FocusLlavaConfig,
    encoder_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    llm_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase | str | pathlib.Path,
    *,
    chat_template: str | None = None,
    readme: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Writes a whole checkpoint atomically and returns its fingerprint.

    Names as in `EncoderModel.state_dict()`, and `language_model.` + names of the causal LM's state dict.
    """
    with CheckpointWriter(folder, config, max_shard_bytes=max_shard_bytes) as writer:
        for tensors in (encoder_tensors, llm_tensors):
            for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
                writer.add(name, tensor)
        return writer.finish(tokenizer, chat_template=chat_template, readme=readme)


def load_stage(
    folder: str | pathlib.Path, stage: Stage, *, expected: Mapping[str, Sequence[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of one stage, memory-mapped from that stage's shards; no other shard is opened.

    expected: name -> shape (as of a state dict on the meta device), to be matched exactly. A tied LM head is stored
    once and returned under both its names, sharing memory. Raises InvalidInput naming the shard or tensor that is
    missing, unknown, unreadable or wrong-shaped.
    """
    folder = pathlib.Path(folder)
    weight_map = _read_index(folder, stage)["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = _shard_path(folder, shard)
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
        update(index_path(folder, stage).name, _canonical(_read_index(folder, stage)))
    return digest.hexdigest()


def verify(folder: str | pathlib.Path) -> str:
    """Hashes every shard again and returns the fingerprint; raises InvalidInput naming the first corrupt shard."""
    folder = pathlib.Path(folder)
    for stage in STAGES:
        for shard, expected in sorted(_read_index(folder, stage)["metadata"]["shard_sha256"].items()):
            if _sha256(_shard_path(folder, shard)) != expected:
                raise InvalidInput(f"is corrupt: its SHA-256 is not the one in {stage}'s index", field=shard)
    return fingerprint(folder)


def _read_index(folder: pathlib.Path, stage: Stage) -> dict[str, Any]:
    path = index_path(folder, stage)
    try:
        index = json.loads(path.read_text("utf8"))
        shards, hashes = set(index["weight_map"].values()), set(index["metadata"]["shard_sha256"])
    except FileNotFoundError:
        raise InvalidInput(f"{folder} has no {path.name}", field="checkpoint") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is not a checkpoint index: {error!r}", field="checkpoint") from None
    if shards != hashes:
        raise InvalidInput(f"has hashes for other shards than it names: {sorted(shards ^ hashes)}", field=str(path))
    for shard in shards:
        # The index may come from anywhere: it must not lead out of the folder or into the other stage.
        if pathlib.PurePath(shard).name != shard or not shard.startswith(f"{stage}-"):
            raise InvalidInput(f"names a shard {shard!r} that is not one of stage {stage}", field=str(path))
    return index


def _shard_path(folder: pathlib.Path, shard: str) -> pathlib.Path:
    path = folder / shard
    if not path.is_file():
        raise InvalidInput(f"{folder} lacks this shard", field=shard)
    return path


def _write_tokenizer(
    folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase | str | pathlib.Path, chat_template: str | None
) -> None:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.save_pretrained(folder)
    else:
        found = [name for name in TOKENIZER_FILES if (pathlib.Path(tokenizer) / name).is_file()]
        if "tokenizer.json" not in found and "tokenizer.model" not in found and "vocab.json" not in found:
            raise InvalidInput(f"{tokenizer} has no tokenizer.json", field="tokenizer")
        for name in found:
            shutil.copyfile(pathlib.Path(tokenizer) / name, folder / name)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, "utf8")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
