"""The joint stage with whatever experiment its configuration names; without one it is `JointTask`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import InvalidInput
from training.config import ConfigError, build
from training.experiments.branch_controls import BranchControl
from training.experiments.grounding import Grounding
from training.experiments.rivals.joint import InDecoder, InEncoder
from training.experiments.rivals.registry import layer_rival, map_rival
from training.joint_stage import JointStage, JointTask

WITH_EVIDENCE = ("scenes", "posters")
"""Generators that know where an answer is seen."""


@dataclass(frozen=True, kw_only=True)
class ExperimentStage(JointStage):
    """Settings of a joint stage and of its experiment."""

    map_rival: dict[str, Any] = field(default_factory=dict)
    """A rival in the vision-guided sampler's place, which is then off: its `name` in training/experiments/rivals, and
    its options (budget, newline_rows)."""
    layer_rival: dict[str, Any] = field(default_factory=dict)
    """A rival in the text-guided sampler's place: `name` and options (budget; layers are the model's own)."""
    branch_control: dict[str, Any] = field(default_factory=dict)
    """Fields of BranchControl; empty leaves the choice to the selector."""
    grounding: dict[str, Any] = field(default_factory=dict)
    """Fields of Grounding; empty has no such loss."""


class ExperimentTask(JointTask):
    """Task of `training/pretrain.py` and `training/finetune.py`."""

    stage_type = ExperimentStage
    stage: ExperimentStage

    def hooks(self) -> dict[str, Any]:
        """Raises ConfigError for an experiment that is wrong in itself, or that excludes what else is set."""
        stage = self.stage
        found: dict[str, Any] = {}
        if stage.map_rival and stage.vision_sampler:
            raise ConfigError("stage.map_rival: stands in the vision-guided sampler's place, set vision_sampler: false")
        if stage.layer_rival and stage.prune:
            raise ConfigError("stage.layer_rival: stands in the text-guided sampler's place, leave prune empty")
        if stage.branch_control and not stage.vision_sampler:
            raise ConfigError("stage.branch_control: controls the vision-guided sampler, set vision_sampler: true")
        if stage.branch_control and stage.hold:
            raise ConfigError("stage.hold: holds the selector, leave branch_control empty")
        if stage.map_rival:
            found["map_rival"] = InEncoder(rival=_rival("stage.map_rival", map_rival, stage.map_rival))
        if stage.layer_rival:
            options = {"layers": self.config.text_config.num_hidden_layers, **stage.layer_rival}
            found["layer_rival"] = InDecoder(rival=_rival("stage.layer_rival", layer_rival, options))
        if stage.branch_control:
            control: BranchControl = build(BranchControl, stage.branch_control, "stage.branch_control.")
            if control.name == "permuted":
                raise ConfigError("stage.branch_control.name: 'permuted' is for evaluation, training has to choose")
            control.check(len(self.config.vision_sampler.branches))
            found["branch_control"] = control
        if stage.grounding:
            found["grounding"] = grounding(stage)
        return found


def grounding(stage: ExperimentStage) -> Grounding:
    """The grounding loss of a stage. Raises ConfigError for one that has nothing to look for."""
    loss: Grounding = build(Grounding, stage.grounding, "stage.grounding.")
    if stage.data not in WITH_EVIDENCE:
        raise ConfigError(
            f"stage.grounding: data {stage.data!r} does not say where its answers are, {' and '.join(WITH_EVIDENCE)} do"
        )
    if stage.vision_sampler or stage.prune or stage.map_rival or stage.layer_rival:
        raise ConfigError(
            "stage.grounding: needs all visual tokens: vision_sampler false; prune, map_rival and layer_rival empty"
        )
    if not loss.taught_layers:
        raise ConfigError("stage.grounding: needs layers or reading_layers")
    return loss


def _rival(field: str, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        return make(**options)
    except (InvalidInput, TypeError) as error:
        raise ConfigError(f"{field}: {error}") from None
