"""Turns a LLaVA-NeXT checkpoint of the Hugging Face hub into ours, tensor by tensor.

Made for llava-hf/llama3-llava-next-8b-hf, llava-v1.6-mistral-7b-hf, llava-v1.6-vicuna-7b-hf and their like.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from services.checkpoint.config import FocusLlavaConfig, VisionSamplerConfig
from services.checkpoint.hub_config import chat_template, convert_config, read_hub_config
from services.checkpoint.hub_tensors import DTYPES, HubTensor, existing_parent, map_names
from services.checkpoint.store import LLM_PREFIX, LM_HEAD, check_shapes
from services.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from services.common.errors import InvalidInput
from services.sampler.vision_guided import VisionGuidedSampler

SAMPLER = "vision_guided_sampler."


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import read and wrote."""

    tensors_used: int
    tensors_unused: tuple[str, ...]
    """Tensors of the source, by its own names, that are not in the new checkpoint."""
    bytes: int
    """Bytes of the weights written."""
    seconds: float
    fingerprint: str
    notes: tuple[str, ...]
    """What the user should know or do next."""

    def __str__(self) -> str:
        lines = [
            f"{self.tensors_used} tensors, {self.bytes / 1e6:,.1f} MB written in {self.seconds:.1f} s",
            f"fingerprint {self.fingerprint}",
        ]
        if self.tensors_unused:
            lines.append(f"not used: {', '.join(self.tensors_unused)}")
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))


def import_llava_next(
    src: str | pathlib.Path,
    dst: str | pathlib.Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    vision_sampler: VisionSamplerConfig | None = None,
    text_layer: int | None = None,
    text_threshold: float = 0.85,
    progress: Callable[[int, int], None] | None = None,
    dry_run: Callable[[pathlib.Path], str] | None = None,
) -> ImportReport:
    """Writes the checkpoint at `dst`; holds one output shard and one input tensor in memory.

    Every name and shape is checked against the model that the config describes before anything is written.

    vision_sampler: default, the paper's with `enabled=False`, since a fresh selector is random.
    text_layer: layer before which tokens are pruned; default a quarter of the layers (8 of 32).
    progress: called with bytes done and bytes in all after each tensor.
    dry_run: tries the finished folder before it appears at `dst`, and says what it ran; what it raises ends the import.
    Raises InvalidInput naming what this program cannot read or would not reproduce exactly.
    """
    started = time.monotonic()
    src = pathlib.Path(src)
    hub = read_hub_config(src)
    sources, unused = map_names(src, our_name)
    odd = sorted({s.dtype for s in sources.values()} - set(DTYPES))
    if odd:
        raise InvalidInput(f"has tensors of {', '.join(odd)}: quantized checkpoints are not supported", field=str(src))
    widest = max(sources.values(), key=lambda source: math.prod(source.shape))
    config = convert_config(src, hub, vision_sampler, text_layer, text_threshold, DTYPES[widest.dtype])
    if LM_HEAD in sources:
        # A head that was stored is used as stored, whatever the config says of tying.
        config = dataclasses.replace(config, text={**config.text, "tie_word_embeddings": False})
    expected = expected_shapes(config)
    if config.text_config.tie_word_embeddings:
        del expected[LM_HEAD]
    fresh = _fresh_sampler(config)
    check_shapes({n: s.shape for n, s in sources.items()}, {n: s for n, s in expected.items() if n not in fresh})
    total = sum(math.prod(s.shape) * getattr(torch, DTYPES[s.dtype]).itemsize for s in sources.values())
    free = shutil.disk_usage(existing_parent(pathlib.Path(dst))).free
    if free < total:
        raise InvalidInput(f"has {free / 1e9:.1f} GB free, {total / 1e9:.1f} GB are needed", field=str(dst))
    done = 0
    with CheckpointWriter(dst, config, max_shard_bytes=max_shard_bytes) as writer:
        # Encoder first, so that only one stage's shard is being filled at a time.
        for name, source in sorted(sources.items(), key=lambda item: item[0].startswith(LLM_PREFIX)):
            # Opened anew for each tensor: a mapping that is kept open keeps every page it has shown.
            with safe_open(source.path, framework="pt", device="cpu") as file:
                tensor = file.get_tensor(source.hub_name)
            writer.add(name, tensor)
            done += tensor.nbytes
            del tensor
            if progress:
                progress(done, total)
        for name, tensor in fresh.items():
            writer.add(name, tensor)
        tried: list[str] = []
        result = writer.finish(
            src,
            chat_template=chat_template(src),
            readme=_readme(src),
            check=(lambda folder: tried.append(dry_run(folder))) if dry_run else None,
        )
    return ImportReport(
        tensors_used=len(sources),
        tensors_unused=tuple(sorted(unused)),
        bytes=writer.bytes_written,
        seconds=time.monotonic() - started,
        fingerprint=result,
        notes=(*_notes(config, sources), *tried),
    )


def expected_shapes(config: FocusLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with a plain CLIP tower."""
    width, vision = config.text_config.hidden_size, config.vision_config
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "vision_tower.": CLIPVisionModel(vision),
            "multi_modal_projector.linear_1.": nn.Linear(vision.hidden_size, width, bias=config.projector_bias),
            "multi_modal_projector.linear_2.": nn.Linear(width, width, bias=config.projector_bias),
            SAMPLER: _sampler(config),
            LLM_PREFIX: AutoModelForCausalLM.from_config(config.text_config),
        }
    shapes = {
        prefix + name: tuple(tensor.shape)
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    return {**shapes, "image_newline": (width,)}


def _sampler(config: FocusLlavaConfig) -> VisionGuidedSampler:
    options = config.vision_sampler.module_options()
    return VisionGuidedSampler(config.text_config.hidden_size, config.patches_per_side**2, **options)


def _fresh_sampler(config: FocusLlavaConfig) -> dict[str, torch.Tensor]:
    state = _sampler(config).to(getattr(torch, config.dtype)).state_dict()
    return {SAMPLER + name: tensor for name, tensor in state.items()}


def our_name(hub_name: str) -> str:
    """Hub name, old (`language_model.model.layers...`) or new (`model.language_model.layers...`), to ours."""
    if hub_name == "lm_head.weight":
        return LM_HEAD
    if hub_name.startswith("model.language_model."):
        return hub_name.replace("model.language_model.", "language_model.model.", 1)
    return hub_name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)


def _notes(config: FocusLlavaConfig, sources: dict[str, HubTensor]) -> tuple[str, ...]:
    layers = config.vision_config.num_hidden_layers
    depth = (
        config.vision_feature_layer if config.vision_feature_layer >= 0 else layers + 1 + config.vision_feature_layer
    )
    notes = []
    if not config.vision_sampler.enabled:
        notes.append(
            "the vision-guided sampler is new (random) and off: training/finetune.py trains it, and turns it on in "
            "what it exports"
        )
    notes.append(
        f"the text-guided sampler is on, before layer {config.text_sampler.layer} of "
        f"{config.text_config.num_hidden_layers} with threshold {config.text_sampler.threshold}: it needs no training"
    )
    notes.append(
        f"of the vision tower, post_layernorm and {layers - depth} of {layers} layers are stored but never run "
        f"(vision_feature_layer {config.vision_feature_layer})"
    )
    other = sum(DTYPES[s.dtype] != config.dtype for s in sources.values())
    if other:
        notes.append(f"{other} tensors are not stored in {config.dtype}, to which they are converted when loaded")
    return tuple(notes)


def _readme(src: pathlib.Path) -> str:
    return (
        f"# {src.resolve().name}, imported\n\nA FocusLLaVA checkpoint made by `focusllava import` from the LLaVA-NeXT "
        f"checkpoint `{src.resolve().name}`; its licence is the original's. The vision-guided sampler is untrained.\n"
    )
