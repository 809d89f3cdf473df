"""Writes a checkpoint folder, atomically and without holding it in memory. Its format is `store.py`'s."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import (
    CHAT_TEMPLATE,
    ENCODER_PREFIXES,
    LLM_PREFIX,
    LM_HEAD,
    MODEL_INDEX,
    STAGES,
    TOKENIZER_FILES,
    Stage,
    file_sha256,
    fingerprint,
    index_path,
    model_index,
    read_index,
    shard_path,
)
from services.common.errors import InvalidInput

MAX_SHARD_BYTES = 2 * 1024**3


class CheckpointWriter:
    """Writes a checkpoint tensor by tensor, holding at most one shard a stage in memory.

    Nothing appears at `folder` until `finish`: everything is written to a sibling folder that then takes its place. An
    older checkpoint there is moved away first, so that for an instant a reader finds neither; where the new one then
    cannot take its place it is moved back. Leaving the `with` block without `finish` removes the sibling.
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
        (probe := self._temp / "mode").mkdir()  # tempfile's folders are their owner's alone, whatever the umask says
        self._temp.chmod(probe.stat().st_mode & 0o777)
        probe.rmdir()
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
        storage = tensor.untyped_storage()
        held = {other.untyped_storage().data_ptr() for other in pending.values()}
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in held
        pending[name] = tensor.clone() if shared else tensor

    def link(self, stage: Stage, folder: str | pathlib.Path) -> None:
        """Takes a stage of another checkpoint as it is; within a file system its shards are not copied."""
        for shard in sorted(set(read_index(pathlib.Path(folder), stage)["weight_map"].values())):
            path = shard_path(pathlib.Path(folder), shard)
            # A linked file has one mode in both folders, and an older program's is its owner's alone.
            same_mode = path.stat().st_mode & 0o777 == self._temp.stat().st_mode & 0o666
            try:
                (os.link if same_mode else shutil.copyfile)(path, self._temp / shard)
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
        save_tensors(pending, self._part(stage, len(self._shards[stage])))
        pending.clear()

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase | str | pathlib.Path | None,
        *,
        chat_template: str | None = None,
        readme: str | None = None,
        check: Callable[[pathlib.Path], None] | None = None,
    ) -> str:
        """Closes the shards, writes the small files, puts the folder in place and returns its fingerprint.

        tokenizer: an object, or a folder whose tokenizer files are copied; None writes none, for a caller that adds
        them. chat_template replaces the tokenizer's.
        check: called with the finished folder before it takes its place; what it raises leaves the old one there.
        """
        for stage in STAGES:
            if stage in self._linked:
                assert not self._pending[stage] and not self._shards[stage], f"{stage} is linked, and given as well"
            else:
                self._flush(stage)
                self._close_stage(stage)
        index = json.dumps(model_index(self._temp), indent=2, sort_keys=True) + "\n"
        (self._temp / MODEL_INDEX).write_text(index, "utf8")
        self.config.save(self._temp)
        if tokenizer is not None:
            _write_tokenizer(self._temp, tokenizer, chat_template)
        (self._temp / "README.md").write_text(readme or f"# {self.folder.name}\n\nA FocusLLaVA checkpoint.\n", "utf8")
        result = fingerprint(self._temp)
        for path in self._temp.iterdir():
            _sync(path)
        if check:
            check(self._temp)
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
            hashes[shard] = file_sha256(part)
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
        try:
            self._temp.rename(self.folder)
        except OSError:
            if old:
                (old / "old").rename(self.folder)
                old.rmdir()
            raise
        _sync(self.folder.parent)
        if old:
            shutil.rmtree(old)


def save_tensors(tensors: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    """Writes a safetensors file of the mode that the umask says; the library's own is its owner's alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


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


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
