"""The settings of the joint model's stages: `stage` of a run's YAML, checked where one field rules another out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import Count, Natural, Range, Share, require
from services.sampler.rivals.base import MapRival
from services.sampler.rivals.layers import LayerRival
from services.sampler.rivals.registry import layer_rival, map_rival
from services.sampler.rivals.tower import Source
from services.sampler.vision_guided import DROP
from training.branch_controls import BranchControl
from training.data.poster_questions import POSTER_KINDS
from training.data.scene_batches import Curriculum
from training.data.vocabulary import KINDS
from training.joint_model import HeldShare, LossWeights
from training.stochastic_prune import PruneSchedule

WITH_EVIDENCE = ("scenes", "posters")
"""Generators that know where an answer is seen."""
KINDS_OF = {"scenes": KINDS, "posters": POSTER_KINDS}


@dataclass(frozen=True, kw_only=True)
class RivalSettings:
    """A rival that stands in a sampler's place. What is None is as the rival itself has it."""

    name: str
    """Its name in services/sampler/rivals/registry.py."""
    budget: Share | None = None
    """Share of the map's tokens, or of the visual tokens that the decoder's layers see."""
    newline_rows: Count | None = None
    """Rows of the map that share a newline."""
    source: Source | None = None
    """Whose attention in the vision tower says what matters."""
    layer: Natural | None = None
    """The first layer that sees fewer tokens."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the rival's own class, its name among them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class JointStage:
    """Settings of a joint stage."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of FocusLlavaConfig, which checks them; on top of init_from's when that is a whole checkpoint."""
    vision_sampler: bool = True
    """Whether the vision-guided sampler is on."""
    prune: PruneSchedule | None = None
    """None trains without text-guided pruning."""
    map_rival: RivalSettings | None = None
    """Stands in the vision-guided sampler's place, which is then off."""
    layer_rival: RivalSettings | None = None
    """Stands in the text-guided sampler's place."""
    branch_control: BranchControl | None = None
    """None leaves the choice to the selector."""
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
    """How much likelier a kind of question is asked than one of weight 1. Of generators, as the field before."""
    curriculum: Curriculum = Curriculum()
    """Of generators too."""

    def __post_init__(self) -> None:
        self._check_places()
        self._check_data()
        self._check_grounding()
        for sampler, trained, by in (
            ("vision_sampler", self.vision_sampler, "vision_sampler: true"),
            ("text_sampler", self.prune is not None, "prune"),
        ):
            fields = self.model.get(sampler)
            if trained and isinstance(fields, dict) and fields.get("enabled") is False:
                wrong = f"is false, and stage.{by} trains it: leave one out"
                raise InvalidInput(wrong, field=f"model.{sampler}.enabled")

    def _check_places(self) -> None:
        """Each sampler's place has one tenant."""
        control = self.branch_control
        if self.map_rival and self.vision_sampler:
            wrong = "stands in the vision-guided sampler's place, set vision_sampler: false"
            raise InvalidInput(wrong, field="map_rival")
        if self.layer_rival and self.prune:
            raise InvalidInput("stands in the text-guided sampler's place, leave prune out", field="layer_rival")
        if control and not self.vision_sampler:
            raise InvalidInput("controls the vision-guided sampler, set vision_sampler: true", field="branch_control")
        if control and control.name == "permuted":
            raise InvalidInput(
                "is 'permuted', which is for evaluation: training has to choose", field="branch_control.name"
            )
        if self.hold and (control or not self.vision_sampler):
            wrong = "holds the selector, set vision_sampler: true and leave branch_control out"
            raise InvalidInput(wrong, field="hold")

    def _check_data(self) -> None:
        if kinds := KINDS_OF.get(self.data):
            for kind in self.kind_weights:
                if kind not in kinds:
                    raise InvalidInput(f"{self.data} asks {', '.join(kinds)}", field=f"kind_weights.{kind}")
        if self.curriculum.panel and self.data != "posters":
            wrong = f"is {self.curriculum.panel!r} with data {self.data!r}, expected data 'posters'"
            raise InvalidInput(wrong, field="curriculum.panel")

    def _check_grounding(self) -> None:
        """A grounding loss has something to look for, and somewhere to look."""
        if not self.loss.grounding:
            return
        why = ""
        if self.data not in WITH_EVIDENCE:
            why = f"data {self.data!r} does not say where its answers are, {' and '.join(WITH_EVIDENCE)} do"
        elif self.vision_sampler or self.prune or self.map_rival or self.layer_rival:
            why = "needs all visual tokens: vision_sampler false, and no prune, map_rival or layer_rival"
        elif not self.loss.taught_layers:
            why = "needs grounding_layers or reading_layers"
        if why:
            raise InvalidInput(f"is {self.loss.grounding}: {why}; 0 turns it off", field="loss.grounding")

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
        if control := self.branch_control:
            if control.name == "random" and len(control.shares) != len(branches):
                wrong = f"has {len(control.shares)} values for {len(branches)} branches"
                raise InvalidInput(wrong, field="stage.branch_control.shares")
            right = 0 <= control.branch < len(branches)
            require(right, "stage.branch_control.branch", control.branch, f"one of {len(branches)} branches, from 0")

    def make_map_rival(self) -> MapRival | None:
        """Raises InvalidInput for an unknown name or an option that the rival does not take."""
        return _made(map_rival, "stage.map_rival", self.map_rival.options) if self.map_rival else None

    def make_layer_rival(self, layers: int) -> LayerRival | None:
        """The rival in a decoder of so many layers. Raises InvalidInput as `make_map_rival`."""
        if self.layer_rival is None:
            return None
        return _made(layer_rival, "stage.layer_rival", {"layers": layers, **self.layer_rival.options})


def _made(make: Any, field: str, options: dict[str, Any]) -> Any:
    try:
        return make(**options)
    except (InvalidInput, TypeError) as error:
        raise InvalidInput(str(error), field=field) from None
