"""A stage on questions with whatever experiment its configuration names; without one it is `QuestionTask`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import Count, Natural, Share, require
from services.encoder.model import EncodedImage
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.pruning import Cut
from training.config import OptimizerConfig
from training.data.branches import Sample
from training.experiments.branch_controls import BranchControl
from training.experiments.grounding import Grounding
from training.experiments.rivals.base import MapRival
from training.experiments.rivals.joint import RivalCut, encode_with_rival
from training.experiments.rivals.registry import layer_rival, map_rival
from training.experiments.rivals.tower import Source
from training.global_batch import Totals
from training.question_module import Batch, QuestionModule
from training.question_settings import POSTERS, QuestionStage
from training.question_stage import QuestionTask

WITH_EVIDENCE = ("scenes", *POSTERS)
"""Generators that know where an answer is seen."""


@dataclass(frozen=True, kw_only=True)
class RivalSettings:
    """A rival that stands in a sampler's place. What is None is as the rival itself has it."""

    name: str
    """Its name in training/experiments/rivals/registry.py."""
    budget: Share | None = None
    """Share of the map's tokens, or of the visual tokens that the decoder's layers see."""
    newline_rows: Count | None = None
    """Rows of the map that share a newline."""
    source: Source | None = None
    """The tokens whose attention in the vision tower says what matters."""
    layer: Natural | None = None
    """The first layer that sees fewer tokens."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the rival's own class, its name among them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ExperimentStage(QuestionStage):
    """Settings of a stage and of its experiment."""

    map_rival: RivalSettings | None = None
    """A rival in the vision-guided sampler's place, which is then off."""
    layer_rival: RivalSettings | None = None
    """A rival in the text-guided sampler's place."""
    branch_control: BranchControl | None = None
    """Who chooses the branches; None leaves the choice to the selector."""
    grounding: Grounding | None = None
    """A grounding loss; it needs all visual tokens, and data that says where the answers are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        control = self.branch_control
        if self.map_rival and self.vision_sampler:
            wrong = "stands in the vision-guided sampler's place, set vision_sampler: false"
            raise InvalidInput(wrong, field="map_rival")
        if self.layer_rival and self.prune:
            raise InvalidInput("stands in the text-guided sampler's place, leave prune out", field="layer_rival")
        if control and not self.vision_sampler:
            raise InvalidInput("controls the vision-guided sampler, set vision_sampler: true", field="branch_control")
        if control and control.name == "permuted":
            wrong = "is 'permuted', which is for evaluation: training has to choose"
            raise InvalidInput(wrong, field="branch_control.name")
        if control and self.hold:
            raise InvalidInput("holds the selector, leave branch_control out", field="hold")
        if self.grounding and self.data not in WITH_EVIDENCE:
            wrong = f"data {self.data!r} does not say where its answers are, {' and '.join(WITH_EVIDENCE)} do"
            raise InvalidInput(wrong, field="grounding")
        if self.grounding and (self.vision_sampler or self.prune or self.map_rival or self.layer_rival):
            wrong = "needs all visual tokens: vision_sampler false, and no prune, map_rival or layer_rival"
            raise InvalidInput(wrong, field="grounding")

    def check_model(self, config: FocusLlavaConfig) -> None:
        super().check_model(config)
        branches, layers = len(config.vision_sampler.branches), config.text_config.num_hidden_layers
        if self.grounding:
            taught = self.grounding.taught_layers
            require(0 <= taught[0] <= taught[-1] < layers, "stage.grounding.layers", taught, f"each in 0..{layers - 1}")
        if control := self.branch_control:
            if control.name == "random" and len(control.shares) != branches:
                wrong = f"has {len(control.shares)} values for {branches} branches"
                raise InvalidInput(wrong, field="stage.branch_control.shares")
            right = 0 <= control.branch < branches
            require(right, "stage.branch_control.branch", control.branch, f"one of {branches} branches, from 0")

    def rival_on_map(self) -> MapRival | None:
        """Raises InvalidInput for an unknown rival, or an option that it does not take."""
        return _made(map_rival, "map_rival", self.map_rival.options) if self.map_rival else None

    def rival_inside(self, config: FocusLlavaConfig) -> RivalCut | None:
        """Raises InvalidInput as `rival_on_map`."""
        if not self.layer_rival:
            return None
        options = {"layers": config.text_config.num_hidden_layers, **self.layer_rival.options}
        return RivalCut(rival=_made(layer_rival, "layer_rival", options))


class ExperimentModule(QuestionModule):
    """The stage's module with rivals, controls and the grounding loss in their places."""

    stage: ExperimentStage

    def __init__(self, model: FocusLlavaForConditionalGeneration, stage: ExperimentStage, optimizer: OptimizerConfig,
                 seed: int):  # fmt: skip
        super().__init__(model, stage, optimizer, seed)
        self.map_rival, self.layer_rival = stage.rival_on_map(), stage.rival_inside(model.config.checkpoint)
        self.branch_control, self.grounding = stage.branch_control, stage.grounding

    @property
    def selects(self) -> bool:
        control = self.stage.branch_control
        return super().selects and (control is None or control.selects)

    def forward(self, batch: Batch, step: int, totals: Totals | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        if self.grounding is None:
            return super().forward(batch, step, totals)
        layers, config = self.model.language_model.model.layers, self.model.config.checkpoint
        with self.grounding.watching(layers, batch[1], config) as losses:
            loss, metrics = super().forward(batch, step, totals)
        grounding = torch.stack(losses).mean()
        return loss + self.grounding.weight * grounding, {**metrics, "grounding": grounding.item()}

    def encode(
        self, samples: Sequence[Sample], rng: random.Random, *, share: float | None = None
    ) -> list[EncodedImage]:
        images, encoder, control = [sample.image for sample in samples], self.model.encoder, self.branch_control
        if self.map_rival:
            return encode_with_rival(encoder, images, self.map_rival)
        if control is None or not self.stage.vision_sampler:
            return super().encode(samples, rng, share=share)
        window, encoded = self.model.config.checkpoint.vision_sampler.window, []
        for sample, features in zip(samples, encoder.project(images), strict=True):
            height, width, _ = features.map_HWD.shape
            choose = control.choice(rng, (height, width), window, sample.glyph_boxes)
            encoded.append(encoder.tokens(features, True, choose))
        return encoded

    def draw(self, rng: random.Random, samples: Sequence[Sample], place: int = 0) -> Cut | None:
        return self.layer_rival or super().draw(rng, samples, place)


class ExperimentTask(QuestionTask):
    """Task of `training/pretrain.py` and `training/finetune.py` on images with questions."""

    stage_type, module_type = ExperimentStage, ExperimentModule
    module: ExperimentModule


def _made(make: Callable[..., Any], field: str, options: dict[str, Any]) -> Any:
    try:
        return make(**options)
    except (InvalidInput, TypeError) as error:
        raise InvalidInput(str(error), field=f"stage.{field}") from None
