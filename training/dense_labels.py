"""Stands in for CLIP's pre-training: the vision tower learns what lies on each patch of procedural tiles.

This stage is not part of the paper, which starts from CLIP.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import load_stage
from services.checkpoint.writer import save_checkpoint, save_tensors
from services.common.settings import build_settings
from services.encoder.anyres import normalise
from services.encoder.vision_tower import build_vision_tower, patch_features
from training.config import RunConfig
from training.data.tiles import IGNORE, LABEL_CLASSES, tile_batch
from training.task import Task
from training.whole_weights import whole

MEAN = STD = (0.5, 0.5, 0.5)
TOWER = "vision_tower."


@dataclass(frozen=True, kw_only=True)
class DenseStage:
    """Settings of the vision stage."""

    vision: dict[str, Any] = field(default_factory=dict)
    """Arguments of CLIPVisionConfig."""
    vision_stem: str = "conv"


class DenseHeads(nn.Module):
    """One linear classifier a label, on patch features [T, P, C]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in LABEL_CLASSES.items()})

    def forward(
        self, features_TPC: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean cross-entropy over the labels, and each label's accuracy where it says something (not on background)."""
        features = self.norm(features_TPC)
        losses, metrics = [], {}
        for name, head in self.heads.items():
            target = labels[name].flatten()
            asked = target != IGNORE
            logits, target = head(features).flatten(0, 1)[asked].float(), target[asked]
            # Without a label the loss is zero, not absent: every worker must have a gradient for every parameter.
            losses.append(nn.functional.cross_entropy(logits, target, reduction="sum") / max(1, len(target)))
            telling = target > 0 if name in ("kind", "colour") else torch.ones_like(target, dtype=torch.bool)
            if telling.any():
                metrics[name] = float((logits.argmax(-1) == target)[telling].float().mean())
        return torch.stack(losses).sum(), metrics


def labelled_batch(seed: int, step: int, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Normalised pixels float32 [T, 3, 96, 96] and labels int64 [T, P]."""
    batch = tile_batch(seed, step, size)
    pixels = normalise(batch.pop("pixels"), MEAN, STD)
    return pixels, {name: torch.from_numpy(values) for name, values in batch.items()}


class DenseModel(nn.Module):
    def __init__(self, vision: dict[str, Any], stem: str):
        super().__init__()
        config = CLIPVisionConfig(**vision)
        self.vision_tower = build_vision_tower(config, stem)
        self.vision_tower.post_layernorm.requires_grad_(False)
        self.dense_heads = DenseHeads(config.hidden_size)

    def forward(
        self, batch: tuple[torch.Tensor, dict[str, torch.Tensor]], step: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, labels = batch
        weight = self.dense_heads.norm.weight
        return self.dense_heads(patch_features(self.vision_tower, pixels.to(weight.device, weight.dtype), -1), labels)


@torch.no_grad()
def scale_features(tower: CLIPVisionModel, factor: float) -> None:
    """Multiplies the tower's features by `factor` and changes nothing else.

    The layers normalise what they read, so scaling all that is written to the residual stream scales the stream.
    Trained from nothing it grows far beyond a word embedding's size, and a language model learns badly from that.
    """
    writers: list[Any] = [tower.pre_layrnorm]
    layers: Any = tower.encoder.layers
    for layer in layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in writers:
        module.weight.mul_(factor)
        module.bias.mul_(factor)


def tower_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vision tower's state dict, from tensors named as an encoder's or a vision stage's."""
    return {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}


def replace_tower(source: pathlib.Path, folder: pathlib.Path, tower: dict[str, torch.Tensor]) -> None:
    """Writes the checkpoint `source` to `folder` with another vision tower."""
    config = FocusLlavaConfig.load(source)
    dtype = getattr(torch, config.dtype)
    encoder = load_stage(source, "encoder") | {f"{TOWER}{name}": tensor.to(dtype) for name, tensor in tower.items()}
    save_checkpoint(
        folder,
        config,
        encoder_tensors={name: tensor.clone() for name, tensor in encoder.items()},
        llm_tensors={name: tensor.clone() for name, tensor in load_stage(source, "llm").items()},
        tokenizer=AutoTokenizer.from_pretrained(str(source)),
    )


class DenseTask(Task):
    """Task of `training/vision_pretrain.py`.

    With `init_from`, a checkpoint's own tower learns more, and that checkpoint is exported with it.
    """

    def __init__(self, run: RunConfig):
        self.run = run
        stage = build_settings(DenseStage, run.stage, "stage.")
        self.source = pathlib.Path(run.init_from) if run.init_from else None
        if self.source:
            config = FocusLlavaConfig.load(self.source)
            stage = DenseStage(vision=config.vision, vision_stem=config.vision_stem)
        self.module = DenseModel(stage.vision, stage.vision_stem)
        if self.source:
            self.module.vision_tower.load_state_dict(tower_of(load_stage(self.source, "encoder")))

    def batch(self, step: int, place: int, places: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return labelled_batch(self.run.seed, step * places + place, self.run.samples_per_worker)

    def count(self, batch: tuple[torch.Tensor, dict[str, torch.Tensor]], step: int) -> None:
        """Nothing: a micro-batch's loss is a mean of its own."""

    def identity(self) -> str:
        """Nothing: its tiles are drawn from the seed."""
        return ""

    def epoch(self) -> int:
        """0: there is always another tile."""
        return 0

    def export(self, folder: pathlib.Path) -> None:
        with whole(self.module.parameters()) as first:
            if first:
                self._write(folder)

    def _write(self, folder: pathlib.Path) -> None:
        self.module.float()
        with torch.no_grad():
            pixels, _ = self.batch(0, 0, 1)
            spread = patch_features(self.module.vision_tower, pixels, -1).std().item()
        scale_features(self.module.vision_tower, 1 / spread)
        if self.source:
            replace_tower(self.source, folder, self.module.vision_tower.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.float().contiguous() for k, v in self.module.state_dict().items()}
        save_tensors(tensors, folder / "vision.safetensors")
