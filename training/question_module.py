"""The model as the trainer calls it on images with questions: a branch a question, both samplers as Sec. 3.4 has them.

Legend: K branches of a region, Q questions of all images, L decoder layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from services.encoder.model import EncodedImage
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import Cut, PruneDraw
from services.sampler.calibration import finer_for_share
from training.config import OptimizerConfig
from training.data.branches import Sample
from training.global_batch import Totals
from training.micro_batch import counted, logged, part_of_loss
from training.question_settings import QuestionStage

Batch = tuple[int, Sequence[Sample]]
"""A micro-batch's place in its global batch, and its images with their questions."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the model would answer, by teacher forcing, and the visual tokens that it took."""

    encoded: list[EncodedImage]
    exact_Q: torch.Tensor
    """bool: every token of the answer, its end included, is the likeliest: what greedy decoding would say."""
    tokens_QL: torch.Tensor
    """int64: visual tokens that each decoder layer sees; their mean is Sec. 4.4's converted count."""


class QuestionModule(nn.Module):
    """A micro-batch to its part of the global batch's loss. What is drawn depends on seed, step and place alone: one
    layer a step, the threshold of a question as one large micro-batch would draw it."""

    def __init__(self, model: FocusLlavaForConditionalGeneration, stage: QuestionStage, optimizer: OptimizerConfig,
                 seed: int):  # fmt: skip
        super().__init__()
        self.model, self.stage, self.optimizer, self.seed = model, stage, optimizer, seed
        self.schedule = stage.prune
        if not self.selects:
            model.encoder.vision_guided_sampler.requires_grad_(False)

    @property
    def selects(self) -> bool:
        """Whether the selector learns."""
        return self.stage.vision_sampler

    def forward(self, batch: Batch, step: int, totals: Totals | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """Totals as of `count`; None where this micro-batch is the whole global batch."""
        place, samples = batch
        rests = 0 < self.optimizer.encoder_steps <= step
        with torch.set_grad_enabled(torch.is_grad_enabled() and not rests):
            encoded = self.encode(samples, self._branch_draws(step, place), share=self._held(step))
        loss, found = part_of_loss(
            self.model,
            self.sequences(samples),
            totals,
            draw=self.draw(random.Random(f"{self.seed}/{step}/0"), samples, place),
            vision_sampler=self.stage.vision_sampler,
            balance_weight=self.balance_weight(step),
            encoded=encoded,
        )
        if rests:
            # ZeRO waits for every parameter's gradient.
            loss = loss + 0.0 * sum(p.sum() for p in self.model.encoder.parameters() if p.requires_grad)
        return loss, {**logged(found, totals), "exact": found["exact"]}

    def count(self, batch: Batch, step: int) -> torch.Tensor:
        """float64 [1 + K]: answer tokens, and regions by branch where the balance loss has a weight."""
        place, samples = batch
        weighs = bool(self.balance_weight(step))
        with torch.no_grad():
            encoded = self.encode(samples, self._branch_draws(step, place)) if weighs else None
        return counted(self.model, self.sequences(samples), regions=weighs, encoded=encoded)

    def balance_weight(self, step: int) -> float:
        """The weight of the balance loss in a step; none where the selector rests, is held or is not asked."""
        rests = any(0 < steps <= step for steps in (self.optimizer.encoder_steps, self.optimizer.selector_steps))
        return 0.0 if rests or self._held(step) is not None or not self.selects else self.stage.loss.balance_at(step)

    def encode(
        self, samples: Sequence[Sample], rng: random.Random, *, share: float | None = None
    ) -> list[EncodedImage]:
        """Visual tokens of each image as this run makes them.

        rng: for an experiment that draws; share: what the sampler leaves of these images' maps together, None is its
        own choice.
        """
        images, encoder = [sample.image for sample in samples], self.model.encoder
        if share is None:
            return self.model.encode(images, self.stage.vision_sampler)
        maps = encoder.project(images)
        finer = finer_for_share(encoder.vision_guided_sampler, encoder.seen(maps), share)
        return [encoder.tokens(feature_map, True, finer=finer) for feature_map in maps]

    def draw(self, rng: random.Random, samples: Sequence[Sample], place: int = 0) -> Cut | None:
        """How visual tokens leave inside the language model; `schedule` None keeps them."""
        if self.schedule is None:
            return None
        layer = self.schedule.draw_layer(rng)
        # As many an image, whatever it has: how a global batch is cut changes no draw.
        most = max(self.stage.questions_per_image, *(len(sample.branches) for sample in samples))
        for _ in range(place * len(samples) * most):
            self.schedule.draw_threshold(rng)  # those of the questions before, in other micro-batches
        drawn = [[self.schedule.draw_threshold(rng) for _ in range(most)] for _ in samples]
        own = (of_image[: len(sample.branches)] for sample, of_image in zip(samples, drawn, strict=True))
        return PruneDraw(layer=layer, thresholds=tuple(threshold for of_image in own for threshold in of_image))

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], rng: random.Random) -> Answers:
        """Scores each question's own answer; a schedule, where there is one, prunes as it does in training."""
        encoded = self.encode(samples, rng)
        done = self.model.run(
            self.sequences(samples),
            vision_sampler=self.stage.vision_sampler,
            cut=self.draw(rng, samples),
            encoded=encoded,
        )
        _, exact_Q = self.model.answers(done)
        return Answers(encoded=encoded, exact_Q=exact_Q, tokens_QL=torch.tensor(done.seen, device="cpu").T)

    def sequences(self, samples: Sequence[Sample]) -> list[TrainedSequence]:
        return [sample.sequence(self.model.config.image_token_id) for sample in samples]

    def _branch_draws(self, step: int, place: int) -> random.Random:
        return random.Random(f"{self.seed}/{step}/{place}/branches")

    def _held(self, step: int) -> float | None:
        return self.stage.hold.at(step) if self.stage.hold else None
