"""Stages on images with questions as a Task: pretrain.py (all visual tokens) and finetune.py (both samplers)."""

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
from services.encoder.model import EncoderModel
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.sampler.calibration import Seen, least_share, set_map_share
from services.text.prompt import PromptRenderer
from training.config import RunConfig
from training.data.branches import BranchBuilder
from training.data.scene_batches import SOURCES, SceneBatches
from training.data.tokenizer import build_tokenizer
from training.dense_labels import labelled_batch
from training.initial_weights import initialise_decoder, load_model, load_vision, standardise_projector
from training.question_module import Batch, QuestionModule
from training.question_settings import QuestionStage
from training.task import Task
from training.whole_weights import whole

SHARE_BATCHES = 8
"""Batches that a held selector is set on when it is exported."""


class QuestionTask(Task):
    """A stage on one worker. `training.experiments.task` adds what the paper does not have."""

    stage_type: type[QuestionStage] = QuestionStage
    """The dataclass that `run.stage` has the fields of."""
    module_type: type[QuestionModule] = QuestionModule

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
        self.module = self.module_type(self._model(source), stage, run.optimizer, run.seed)
        renderer = PromptRenderer(
            self.tokenizer,
            image_token_id=self.config.image_token_id,
            context=self.config.text_config.max_position_embeddings,
            instruction=self.config.text_sampler.instruction,
        )
        self.builder = BranchBuilder(renderer)
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

    def _model(self, source: pathlib.Path | None) -> FocusLlavaForConditionalGeneration:
        """The weights that the run starts from, in float32: DeepSpeed casts them."""
        if self._whole and source:
            model = load_model(source, self.config, torch.float32)
            if self.stage.fresh_selector:
                model.encoder.vision_guided_sampler.selector.linear.reset_parameters()
            return model
        model = FocusLlavaForConditionalGeneration(FocusLlavaModelConfig.of(self.config)).float()
        model.encoder = EncoderModel(self.config)  # its layers' own first weights: transformers' are smaller
        model.freeze_unused()
        if source:
            model.encoder.vision_tower.load_state_dict(load_vision(source))
            standardise_projector(model.encoder, labelled_batch(self.run.seed, 0, 64)[0])
            initialise_decoder(model.language_model)
        return model.train()

    def batch(self, step: int, place: int, places: int) -> Batch:
        return place, self.data.batch(step, place, places)

    def count(self, batch: Batch, step: int) -> torch.Tensor:
        return self.module.count(batch, step)

    def identity(self) -> str:
        return self.data.identity

    def epoch(self) -> int:
        """0: generated data has no end."""
        return 0

    def export(self, folder: pathlib.Path) -> None:
        with whole(self.module.parameters()) as first:
            if first:
                self._write(folder)

    def _write(self, folder: pathlib.Path) -> None:
        if self.stage.hold:
            self._set_share(self.stage.hold.share)
        model = self.module.model
        save_checkpoint(
            folder,
            exported_config(self.config, stage=self.stage, selects=self.module.selects, from_checkpoint=self._whole),
            encoder_tensors=model.encoder.state_dict(),
            llm_tensors={f"language_model.{k}": v for k, v in model.language_model.state_dict().items()},
            tokenizer=self.tokenizer,
        )

    @torch.no_grad()
    def _set_share(self, share: float) -> None:
        """Sets the selector by itself to what it was held to, on batches that come after the last one."""
        encoder = self.module.model.encoder
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
    config: FocusLlavaConfig, *, stage: QuestionStage, selects: bool, from_checkpoint: bool
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
