"""The joint model's stages as a Task: pretrain.py (all visual tokens) and finetune.py (both samplers)."""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from services.checkpoint.config import FocusLlavaConfig, VisionSamplerConfig
from services.checkpoint.writer import save_checkpoint
from services.llm.prompt import PromptRenderer
from services.sampler.calibration import Seen, least_share, set_map_share
from services.sampler.vision_guided import DROP
from training.config import ConfigError, Count, RunConfig, build
from training.data.branches import BranchBuilder
from training.data.conversations import ConversationBatches
from training.data.poster_questions import POSTER_KINDS
from training.data.posters import CONTENTS, PANELS
from training.data.scene_batches import SOURCES, Curriculum, SceneBatches
from training.data.tokenizer import build_tokenizer
from training.data.vocabulary import KINDS
from training.dense_labels import labelled_batch
from training.initial_weights import initialise_decoder, load_joint, load_vision, standardise_projector
from training.joint_model import HeldShare, JointModel, LossWeights
from training.layout import Sample
from training.stochastic_prune import PruneSchedule

KINDS_OF = {"scenes": KINDS, "posters": POSTER_KINDS}
SHARE_BATCHES = 8
"""Batches that a held selector is set on when it is exported."""


@dataclass(frozen=True, kw_only=True)
class JointStage:
    """Settings of a joint stage."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of FocusLlavaConfig; on top of init_from's when that is a whole checkpoint."""
    vision_sampler: bool = True
    """Whether the vision-guided sampler is on."""
    prune: dict[str, Any] = field(default_factory=dict)
    """Fields of PruneSchedule; empty trains without text-guided pruning."""
    hold: dict[str, Any] = field(default_factory=dict)
    """Fields of HeldShare; empty leaves the share to the balance loss. What is exported is set to that share."""
    fresh_selector: bool = False
    """Forgets what init_from's selector has learned."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Fields of LossWeights."""
    data: str = "scenes"
    """"scenes" or "posters" for a procedural generator, "easy_vqa" for that set's training split, or a JSON file of
    conversations in LLaVA's format."""
    questions_per_image: Count = 6
    kind_weights: dict[str, float] = field(default_factory=dict)
    """How much likelier a kind of question is asked than one of weight 1. Of generators, as the field before."""
    curriculum: dict[str, Any] = field(default_factory=dict)
    """Fields of Curriculum, of generators too."""


class JointTask:
    """A joint stage on one worker. `training.experiments.task` adds what the paper does not have."""

    stage_type: type[JointStage] = JointStage
    """The dataclass that `run.stage` has the fields of."""

    def __init__(self, run: RunConfig):
        self.run = run
        stage: JointStage = build(self.stage_type, run.stage, "stage.")
        self.stage = stage
        source = pathlib.Path(run.init_from) if run.init_from else None
        self._whole = whole = source is not None and (source / "config.json").exists()
        base = FocusLlavaConfig.load(source).to_dict() if whole and source else {}
        # From nothing, the model's words are those of the scenes.
        self.tokenizer = AutoTokenizer.from_pretrained(str(source)) if whole else build_tokenizer()
        self.config = model_config(base, stage.model, self.tokenizer)
        check_kinds(stage)
        check_switches(stage)
        schedule = prune_schedule(stage.prune, self.config.text_config.num_hidden_layers)
        self.module = JointModel(
            self.config,
            weights=build(LossWeights, stage.loss, "stage.loss."),
            schedule=schedule,
            vision_sampler=stage.vision_sampler,
            pad_id=self.tokenizer.pad_token_id,
            seed=run.seed,
            selector_steps=run.optimizer.selector_steps,
            encoder_steps=run.optimizer.encoder_steps,
            hold=held_share(stage, self.config.vision_sampler),
            **self.hooks(),
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
                curriculum=curriculum(stage),
                source=SOURCES[stage.data],
            )
        else:
            self.data = ConversationBatches(
                self.config, self.builder, pathlib.Path(stage.data), seed=run.seed, images=run.samples_per_worker
            )

    def hooks(self) -> dict[str, Any]:
        """What stands at the joint model's hooks (`training.hooks`), by its argument's name: nothing."""
        return {}

    def batch(self, step: int, rank: int, world_size: int) -> tuple[int, list[Sample]]:
        return rank, self.data.batch(step, rank, world_size)

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


def check_kinds(stage: JointStage) -> None:
    """Raises ConfigError for a weight of a kind that the generator does not ask, or one that is not positive."""
    kinds = KINDS_OF.get(stage.data)
    for kind, weight in stage.kind_weights.items():
        if kinds and kind not in kinds:
            raise ConfigError(f"stage.kind_weights.{kind}: {stage.data} asks {', '.join(kinds)}")
        if weight <= 0:
            raise ConfigError(f"stage.kind_weights.{kind}: {weight} is not positive")


def held_share(stage: JointStage, sampler: VisionSamplerConfig) -> HeldShare | None:
    """None when there is nothing in `stage.hold`. Raises ConfigError for a share that is none, or nobody to hold."""
    if not stage.hold:
        return None
    held: HeldShare = build(HeldShare, stage.hold, "stage.hold.")
    least = min(1 / (height * width) if (height, width) != DROP else 0.0 for height, width in sampler.branches)
    if not least <= held.share <= 1:
        raise ConfigError(
            f"stage.hold.share: {held.share} is not in [{least:g}, 1], 1 over the coarsest branch's tokens"
        )
    if held.after < 0:
        raise ConfigError(f"stage.hold.after: {held.after} is not a number of steps")
    if held.falls_from is not None and not 0 <= held.falls_from < held.after:
        raise ConfigError(f"stage.hold.falls_from: {held.falls_from} is not a step before after, {held.after}")
    if not stage.vision_sampler:
        raise ConfigError("stage.hold: holds the selector, set vision_sampler: true")
    return held


def curriculum(stage: JointStage) -> Curriculum:
    """Raises ConfigError for a panel that no small image has."""
    found: Curriculum = build(Curriculum, stage.curriculum, "stage.curriculum.")
    if found.panel:
        if found.panel not in PANELS or stage.data != "posters":
            raise ConfigError(
                f"stage.curriculum.panel: {found.panel!r} with data {stage.data!r}, expected {', '.join(PANELS)} with "
                "data 'posters'"
            )
        least = min(tiles for tiles, contents in CONTENTS.items() if contents.panels)
        if found.max_tiles < least:
            raise ConfigError(f"stage.curriculum.max_tiles: is {found.max_tiles}, a panel needs {least} tiles or more")
    return found


def prune_schedule(fields: dict[str, Any], layers: int) -> PruneSchedule | None:
    """None when there is nothing in `fields`. Raises ConfigError for what a decoder of so many layers cannot do."""
    if not fields:
        return None
    schedule: PruneSchedule = build(PruneSchedule, fields, "stage.prune.")
    (first, last), (low, high) = schedule.layers, schedule.thresholds
    if not 1 <= first <= last < layers:
        raise ConfigError(f"stage.prune.layers: {schedule.layers} is not an ascending pair in 1..{layers - 1}")
    if not 0 < low <= high <= 1:
        raise ConfigError(f"stage.prune.thresholds: {schedule.thresholds} is not an ascending pair in (0, 1]")
    return schedule


def model_config(base: dict[str, Any], changes: dict[str, Any], tokenizer: Any) -> FocusLlavaConfig:
    """The checkpoint's config with the run's changes; sampler sections are merged field by field."""
    merged = {"model_type": "focusllava", "format_version": 1, **base}
    for name, value in changes.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    merged.setdefault("image_token_id", tokenizer.convert_tokens_to_ids("<image>"))
    merged.setdefault("eos_token_ids", [tokenizer.eos_token_id])
    merged.get("text", {}).setdefault("vocab_size", len(tokenizer))
    return FocusLlavaConfig.from_dict(merged)


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


def check_switches(stage: JointStage) -> None:
    """Raises ConfigError for a sampler that is to be trained and switched off at once."""
    for sampler, trained, by in (
        ("vision_sampler", stage.vision_sampler, "vision_sampler: true"),
        ("text_sampler", bool(stage.prune), "prune"),
    ):
        fields = stage.model.get(sampler)
        if trained and isinstance(fields, dict) and fields.get("enabled") is False:
            raise ConfigError(f"stage.model.{sampler}.enabled: is false, and stage.{by} trains it: leave one out")
