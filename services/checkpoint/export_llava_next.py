"""Turns a checkpoint of ours into a LLaVA-NeXT folder of the Hugging Face hub's format, without its samplers.

The other way is `import_llava_next.py`; a tensor that went one way comes back bit for bit.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, LlavaNextConfig

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.hub_config import PREPROCESSING
from services.checkpoint.import_llava_next import SAMPLER
from services.checkpoint.store import (
    MODEL_INDEX,
    STAGES,
    TOKENIZER_FILES,
    model_index,
    read_index,
    shard_path,
    stage_elements,
)
from services.checkpoint.writer import MAX_SHARD_BYTES, save_tensors
from services.common.errors import InvalidInput
from services.common.settings import require


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote."""

    tensors: int
    left_out: tuple[str, ...]
    """Tensors of the checkpoint that LLaVA-NeXT has no place for."""
    bytes: int
    """Bytes of the weights written."""
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors, {self.bytes / 1e6:,.1f} MB written in {self.seconds:.1f} s"]
        if self.left_out:
            lines.append(f"left out, with both samplers: {', '.join(self.left_out)}")
        return "\n".join(lines)


def export_llava_next(
    src: str | pathlib.Path,
    dst: str | pathlib.Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Writes the unpruned parts as `LlavaNextForConditionalGeneration.from_pretrained` reads them.

    `dst` appears once it is whole; one shard is held in memory. progress: called with numbers done and numbers in all.

    Raises InvalidInput: `dst` exists and is not empty, a vision tower that CLIP has not, or a broken checkpoint.
    """
    started = time.monotonic()
    src, dst = pathlib.Path(src), pathlib.Path(os.path.abspath(dst))
    config = FocusLlavaConfig.load(src)
    require(config.vision_stem == "patch", "vision_stem", config.vision_stem, "'patch', which alone LLaVA-NeXT has")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InvalidInput("exists and is not an empty folder", field=str(dst))
    left_out = sorted(name for name in model_index(src)["weight_map"] if name.startswith(SAMPLER))
    total = sum(stage_elements(src, stage) for stage in STAGES)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as temporary:
        folder = pathlib.Path(temporary) / "export"
        folder.mkdir()
        weight_map, size = _write_shards(folder, _tensors(src, progress, total), max_shard_bytes)
        _write_json(folder / MODEL_INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_configs(folder, config)
        for name in TOKENIZER_FILES:
            if (src / name).is_file():
                shutil.copyfile(src / name, folder / name)
        (folder / "README.md").write_text(_readme(src), "utf8")
        if dst.exists():
            dst.rmdir()
        folder.rename(dst)
    return ExportReport(
        tensors=len(weight_map), left_out=tuple(left_out), bytes=size, seconds=time.monotonic() - started
    )


def hub_name(name: str) -> str:
    """Our name to the one that llava-hf's repositories have."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def _tensors(
    src: pathlib.Path, progress: Callable[[int, int], None] | None, total: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by the hub's names, one in memory at a time."""
    done = 0
    for stage in STAGES:
        for name, shard in sorted(read_index(src, stage)["weight_map"].items()):
            # Opened anew for each tensor: a mapping that is kept open keeps every page it has shown.
            with safe_open(shard_path(src, shard), framework="pt", device="cpu") as file:
                tensor = file.get_tensor(name)
            done += tensor.numel()
            if not name.startswith(SAMPLER):
                yield hub_name(name), tensor
            if progress:
                progress(done, total)


def _write_shards(
    folder: pathlib.Path, tensors: Iterator[tuple[str, torch.Tensor]], most: int
) -> tuple[dict[str, str], int]:
    """Writes the shards; returns which tensor is where, and the bytes of all."""
    pending: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    size = 0

    def flush() -> None:
        shards.append(list(pending))
        save_tensors(pending, folder / f"{len(shards)}.part")
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(each.nbytes for each in pending.values()) + tensor.nbytes > most:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
    flush()
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    return weight_map, size


def _write_configs(folder: pathlib.Path, config: FocusLlavaConfig) -> None:
    """The hub's configuration files: of the model, of generation, of the images, of the processor."""
    pinpoints = [list(size) for size in config.image_grid_pinpoints]
    tied = bool(config.text_config.tie_word_embeddings)
    hub: Any = LlavaNextConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        multimodal_projector_bias=config.projector_bias,
        tie_word_embeddings=tied,
        architectures=["LlavaNextForConditionalGeneration"],
        dtype=config.dtype,
    )
    hub.save_pretrained(folder)
    ends: Any = list(config.eos_token_ids) or None
    text = config.text_config
    GenerationConfig(eos_token_id=ends, bos_token_id=text.bos_token_id, pad_token_id=text.pad_token_id).save_pretrained(
        folder
    )
    tile = config.tile_px
    _write_json(
        folder / "preprocessor_config.json",
        {
            **PREPROCESSING,
            "aspect_ratio_setting": "anyres",
            "crop_size": {"height": tile, "width": tile},
            "do_pad": True,
            "image_grid_pinpoints": pinpoints,
            "image_mean": list(config.image_mean),
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": list(config.image_std),
            "size": {"shortest_edge": tile},
        },
    )
    _write_json(
        folder / "processor_config.json",
        {
            "num_additional_image_tokens": 1,
            "patch_size": config.vision["patch_size"],
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
    )


def _readme(src: pathlib.Path) -> str:
    return (
        f"# {src.resolve().name}, exported\n\nA LLaVA-NeXT checkpoint made by `focusllava export` from the FocusLLaVA "
        f"checkpoint `{src.resolve().name}`, without its samplers; its licence is the original's.\n"
    )


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf8")
