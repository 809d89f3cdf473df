"""What every stage's settings of the samplers have to hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import require
from services.modeling.pruning import PruneSchedule


def check_trained_are_on(model: Mapping[str, Any], *, vision_sampler: bool, prune: PruneSchedule | None) -> None:
    """Raises InvalidInput where a stage's `model` turns a sampler off that the stage trains."""
    for sampler, trained, by in (
        ("vision_sampler", vision_sampler, "vision_sampler: true"),
        ("text_sampler", prune is not None, "prune"),
    ):
        fields = model.get(sampler)
        if trained and isinstance(fields, dict) and fields.get("enabled") is False:
            wrong = f"is false, and stage.{by} trains it: leave one out"
            raise InvalidInput(wrong, field=f"model.{sampler}.enabled")


def check_cut_fits(prune: PruneSchedule | None, config: FocusLlavaConfig) -> None:
    """Raises InvalidInput where the model has not the layers that a stage prunes at."""
    if prune:
        layers = config.text_config.num_hidden_layers
        expected = f"an ascending pair in 1..{layers - 1}"
        require(prune.layers[1] < layers, "stage.prune.layers", prune.layers, expected)
