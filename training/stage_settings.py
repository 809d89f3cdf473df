"""The settings of the joint model's stages: `stage` of a run's YAML, checked where one field rules another out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import Count, Range, require
from services.sampler.vision_guided import DROP
from training.data.poster_questions import POSTER_KINDS
from training.data.scene_batches import Curriculum
from training.data.vocabulary import KINDS
from training.joint_model import HeldShare, LossWeights
from training.stochastic_prune import PruneSchedule, check_trained_are_on

KINDS_OF = {"scenes": KINDS, "posters": POSTER_KINDS}


@dataclass(frozen=True, kw_only=True)
class JointStage:
    """Settings of a joint stage."""

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
    data: str = "scenes"
    """"scenes" or "posters" for a procedural generator, "easy_vqa" for that set's training split, or a JSON file of
    conversations in LLaVA's format."""
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
        if self.curriculum.panel and self.data != "posters":
            wrong = f"is {self.curriculum.panel!r} with data {self.data!r}, expected data 'posters'"
            raise InvalidInput(wrong, field="curriculum.panel")

    def check_model(self, config: FocusLlavaConfig) -> None:
        """Raises InvalidInput for what a model of this configuration cannot do."""
        layers, branches = config.text_config.num_hidden_layers, config.vision_sampler.branches
        if self.prune:
            right, expected = self.prune.layers[1] < layers, f"an ascending pair in 1..{layers - 1}"
            require(right, "stage.prune.layers", self.prune.layers, expected)
        if self.hold:
            least = min(1 / (height * width) if (height, width) != DROP else 0.0 for height, width in branches)
            expected = f"[{least:g}, 1], from 1 over the coarsest branch's tokens"
            require(self.hold.share >= least, "stage.hold.share", self.hold.share, expected)

    def hooks(self, config: FocusLlavaConfig) -> dict[str, Any]:
        """What stands at the hooks (`training.hooks`) of a model of this configuration, by their names: nothing."""
        return {}
