"""The joint model's stages as a Task: pretrain.py (all visual tokens) and finetune.py (both samplers)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.writer import save_checkpoint
from services.common.settings import build_settings
from services.sampler.calibration import Seen, least_share, set_map_share
from services.text.prompt import PromptRenderer
from training.config import RunConfig
from training.data.branches import BranchBuilder
from training.data.conversations import ConversationBatches
from training.data.scene_batches import SOURCES, SceneBatches
from training.data.tokenizer import build_tokenizer
from training.dense_labels import labelled_batch
from training.initial_weights import initialise_decoder, load_joint, load_vision, standardise_projector
from training.joint_model import JointModel
from training.layout import Sample
from training.stage_settings import JointStage

SHARE_BATCHES = 8
"""Batches that a held selector is set on when it is exported."""


class JointTask:
    """A joint stage on one worker. `training.experiments.task` adds what the paper does not have."""

    stage_type: type[JointStage] = JointStage
    """The dataclass that `run.stage` has the fields of."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.stage = stage = build_settings(self.stage_type, run.stage, "stage.")
        source = pathlib.Path(run.init_from) if run.init_from else None
        self._whole = whole = source is not None and (source / "config.json").exists()
        # From nothing, the model's words are those of the scenes.
        self.tokenizer = AutoTokenizer.from_pretrained(str(source)) if whole else build_tokenizer()
        base = FocusLlavaConfig.load(source) if whole and source else None
        self.config = model_config(base, stage.model, self.tokenizer)
        stage.check_model(self.config)
        self.module = JointModel(
            self.config,
            weights=stage.loss,
            schedule=stage.prune,
            vision_sampler=stage.vision_sampler,
            pad_id=self.tokenizer.pad_token_id,
            seed=run.seed,
            selector_steps=run.optimizer.selector_steps,
            encoder_steps=run.optimizer.encoder_steps,
            hold=stage.hold,
            **stage.hooks(self.config),
        )
        if whole and source:
            load_joint(self.module, source, fresh_selector=stage.fresh_selector)
        elif source:
            self.module.encoder.vision_tower.load_state_dict(load_vision(source))
            standardise_projector(self.module.encoder, labelled_batch(run.seed, 0, 64)[0])
            initialise_decoder(self.module.language_model)
        renderer = PromptRenderer(
            self.tokenizer,
            image_token_id=self.config.image_token_id,
            context=self.config.text_config.max_position_embeddings,
            instruction=self.config.text_sampler.instruction,
        )
        self.builder = BranchBuilder(renderer)
        self.data: SceneBatches | ConversationBatches
        if stage.data in SOURCES:
            self.data = SceneBatches(
                self.config,
                self.builder,
                seed=run.seed,
                images=run.samples_per_worker,
                questions_per_image=stage.questions_per_image,
                kind_weights=stage.kind_weights,
                curriculum=stage.curriculum,
                source=SOURCES[stage.data],
            )
        else:
            self.data = ConversationBatches(
                self.config, self.builder, pathlib.Path(stage.data), seed=run.seed, images=run.samples_per_worker
            )

    def batch(self, step: int, place: int, places: int) -> tuple[int, list[Sample]]:
        return place, self.data.batch(step, place, places)

    def count(self, batch: tuple[int, list[Sample]], step: int) -> torch.Tensor:
        return self.module.count(batch, step)

    def identity(self) -> str:
        return self.data.identity

    def epoch(self) -> int:
        """0: generated data has no end, and conversations by question are drawn as if they had none."""
        return 0

    def export(self, folder: pathlib.Path) -> None:
        if self.module.hold:
            self._set_share(self.module.hold.share)
        save_checkpoint(
            folder,
            exported_config(self.config, stage=self.stage, selects=self.module.selects, from_checkpoint=self._whole),
            encoder_tensors=self.module.encoder.state_dict(),
            llm_tensors={f"language_model.{k}": v for k, v in self.module.language_model.state_dict().items()},
            tokenizer=self.tokenizer,
        )

    def close(self) -> None:
        """Nothing was begun."""

    def validate(self, step: int) -> dict[str, float]:
        """Nothing: `evaluation.score` asks the held-out splits."""
        return {}

    @torch.no_grad()
    def _set_share(self, share: float) -> None:
        """Sets the selector by itself to what it was held to, on batches that come after the last one."""
        encoder = self.module.encoder
        seen: list[Seen] = []
        for step in range(self.run.steps, self.run.steps + SHARE_BATCHES):
            _, samples = self.batch(step, 0, 1)
            seen += encoder.seen(encoder.project([sample.image for sample in samples]))
        sampler = encoder.vision_guided_sampler
        set_map_share(sampler, seen, max(share, least_share(sampler, seen)))


def model_config(base: FocusLlavaConfig | None, changes: Mapping[str, Any], tokenizer: Any) -> FocusLlavaConfig:
    """The checkpoint's config with the run's changes, field by field; from nothing, with the tokenizer's ids."""
    if base is None:
        ids = {
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            "eos_token_ids": [tokenizer.eos_token_id],
        }
        changes = {**ids, **changes, "text": {"vocab_size": len(tokenizer), **changes.get("text", {})}}
    return build_settings(FocusLlavaConfig, changes, "stage.model.", over=base)


def exported_config(
    config: FocusLlavaConfig, *, stage: JointStage, selects: bool, from_checkpoint: bool
) -> FocusLlavaConfig:
    """The config of what a run exports: a sampler that it trained is on, a selector that nobody has trained is off.

    selects: whether this run trained the selector. What the run did not touch stays as its checkpoint has it.
    """
    vision, text = config.vision_sampler, config.text_sampler
    if selects:
        vision = dataclasses.replace(vision, enabled=True)
    elif stage.fresh_selector or not from_checkpoint:
        vision = dataclasses.replace(vision, enabled=False)
    if stage.prune:
        text = dataclasses.replace(text, enabled=True)
    return dataclasses.replace(config, vision_sampler=vision, text_sampler=text)
