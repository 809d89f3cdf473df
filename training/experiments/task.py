"""The joint stage with whatever experiment its configuration names; without one it is `JointTask`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import Count, Natural, Share, require
from training.experiments.branch_controls import BranchControl
from training.experiments.grounding import Grounding
from training.experiments.rivals.joint import InDecoder, InEncoder
from training.experiments.rivals.registry import layer_rival, map_rival
from training.experiments.rivals.tower import Source
from training.joint_stage import JointTask
from training.stage_settings import JointStage

WITH_EVIDENCE = ("scenes", "posters")
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
class ExperimentStage(JointStage):
    """Settings of a joint stage and of its experiment."""

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
        branches = len(config.vision_sampler.branches)
        if control := self.branch_control:
            if control.name == "random" and len(control.shares) != branches:
                wrong = f"has {len(control.shares)} values for {branches} branches"
                raise InvalidInput(wrong, field="stage.branch_control.shares")
            right = 0 <= control.branch < branches
            require(right, "stage.branch_control.branch", control.branch, f"one of {branches} branches, from 0")

    def hooks(self, config: FocusLlavaConfig) -> dict[str, Any]:
        """Raises InvalidInput for an unknown rival, or an option that it does not take."""
        layers = config.text_config.num_hidden_layers
        on_map, inside = self.map_rival, self.layer_rival
        return {
            "map_rival": on_map and InEncoder(rival=_made(map_rival, "map_rival", on_map.options)),
            "layer_rival": inside
            and InDecoder(rival=_made(layer_rival, "layer_rival", {"layers": layers, **inside.options})),
            "branch_control": self.branch_control,
            "grounding": self.grounding,
        }


class ExperimentTask(JointTask):
    """Task of `training/pretrain.py` and `training/finetune.py`."""

    stage_type = ExperimentStage


def _made(make: Callable[..., Any], field: str, options: dict[str, Any]) -> Any:
    try:
        return make(**options)
    except (InvalidInput, TypeError) as error:
        raise InvalidInput(str(error), field=f"stage.{field}") from None
