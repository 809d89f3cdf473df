"""The settings of a stage on images with questions: `stage` of a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import Amount, Count, Natural, Range, Share, require
from services.modeling.pruning import PruneSchedule
from services.sampler.vision_guided import DROP
from training.data.poster_questions import POSTER_KINDS
from training.data.scene_batches import Curriculum
from training.data.vocabulary import KINDS
from training.sampler_settings import check_cut_fits, check_trained_are_on

POSTERS = ("posters", "textured_posters")
KINDS_OF = {"scenes": KINDS} | dict.fromkeys(POSTERS, POSTER_KINDS)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    balance: Amount = 0.1
    """alpha of Eq. 3."""
    balance_warmup: Natural = 0
    """Steps in which alpha rises from 0 to `balance`: regions that need their detail are told from the others first."""

    def balance_at(self, step: int) -> float:
        """The weight of the balance loss in a step, counted from 0."""
        return self.balance * min(1.0, (step + 1) / max(1, self.balance_warmup))


@dataclass(frozen=True, kw_only=True)
class HeldShare:
    """The share of the feature map that the selector leaves, held by moving all its logits alike, batch by batch.

    The balance loss, which asks for shares until then, then has no weight: what is left to learn is which regions need
    the detail. Without it a selector drifts once the questions are learned, each seed its own way.
    """

    share: Share
    """The share of a batch's maps to leave, 0 to 1; what is left is as near to it as can be, and never above."""
    after: Natural = 0
    """Steps before the share is held."""
    falls_from: Natural | None = None
    """The step from which the share held falls evenly, from the whole map, to reach it after `after` steps; None
    jumps to it. At its start a selector cannot tell regions apart, so none could be chosen: give it ten steps."""

    def __post_init__(self) -> None:
        if self.falls_from is not None and not self.falls_from < self.after:
            raise InvalidInput(f"is {self.falls_from}, expected a step before after, {self.after}", field="falls_from")

    def at(self, step: int) -> float | None:
        """The share of a step, None where it is the selector's own."""
        if step >= self.after:
            return self.share
        if self.falls_from is None or step < self.falls_from:
            return None
        return 1 - (1 - self.share) * (step - self.falls_from) / (self.after - self.falls_from)


@dataclass(frozen=True, kw_only=True)
class QuestionStage:
    """Settings of a stage."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of FocusLlavaConfig, which checks them; on top of init_from's when that is a whole checkpoint."""
    vision_sampler: bool = True
    """Whether the vision-guided sampler is on."""
    prune: PruneSchedule | None = None
    """None trains without text-guided pruning."""
    hold: HeldShare | None = None
    """None leaves the share to the balance loss. What is exported is set to the share that is held."""
    fresh_selector: bool = False
    """Forgets what init_from's selector has learned."""
    loss: LossWeights = LossWeights()
    data: Literal["scenes", "posters", "textured_posters", "easy_vqa"] = "scenes"
    """"scenes", "posters" or "textured_posters" for a procedural generator, "easy_vqa" for that set's training split.
    Files of conversations have a stage of their own (`training.conversation_settings`)."""
    questions_per_image: Count = 6
    kind_weights: dict[str, Annotated[float, Range(0, above=True)]] = field(default_factory=dict)
    """How much likelier a kind of question is asked than one of weight 1. Generated data only."""
    curriculum: Curriculum = Curriculum()
    """Smaller images first; generated data only."""

    def __post_init__(self) -> None:
        if self.hold and not self.vision_sampler:
            raise InvalidInput("holds the selector, set vision_sampler: true", field="hold")
        self._check_data()
        check_trained_are_on(self.model, vision_sampler=self.vision_sampler, prune=self.prune)

    def _check_data(self) -> None:
        if kinds := KINDS_OF.get(self.data):
            for kind in self.kind_weights:
                if kind not in kinds:
                    raise InvalidInput(f"{self.data} asks {', '.join(kinds)}", field=f"kind_weights.{kind}")
        if self.curriculum.panel and self.data not in POSTERS:
            wrong = f"is {self.curriculum.panel!r} with data {self.data!r}, expected data 'posters'"
            raise InvalidInput(wrong, field="curriculum.panel")

    def check_model(self, config: FocusLlavaConfig) -> None:
        """Raises InvalidInput for what a model of this configuration cannot do."""
        check_cut_fits(self.prune, config)
        if self.hold:
            branches = config.vision_sampler.branches
            least = min(1 / (height * width) if (height, width) != DROP else 0.0 for height, width in branches)
            expected = f"[{least:g}, 1], from 1 over the coarsest branch's tokens"
            require(self.hold.share >= least, "stage.hold.share", self.hold.share, expected)
