"""Rivals by name, so that a table can say `rival="visionzip", budget=0.25`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from services.common.errors import InvalidInput
from training.experiments.rivals.base import MapRival
from training.experiments.rivals.downsample import Downsample
from training.experiments.rivals.fastv import FastV
from training.experiments.rivals.layers import LayerRival
from training.experiments.rivals.prumerge import PruMergePlus
from training.experiments.rivals.pyramid_drop import PyramidDrop
from training.experiments.rivals.random_keep import RandomKeep
from training.experiments.rivals.top_similarity import TopSimilarity
from training.experiments.rivals.visionzip import VisionZip

MAP_RIVALS: dict[str, Callable[..., MapRival]] = {
    "top_similarity": TopSimilarity,
    "random": RandomKeep,
    "uniform_mean": partial(Downsample, reduce="mean"),
    "uniform_max": partial(Downsample, reduce="max"),
    "visionzip": VisionZip,
    "prumerge_plus": PruMergePlus,
}
"""Options: `budget` (share of the map's tokens, 0.25), `newline_rows` (1), and each rival's own."""
LAYER_RIVALS: dict[str, Callable[..., LayerRival]] = {
    "fastv": FastV.at_budget,
    "pyramid_drop": PyramidDrop.at_budget,
}
"""Options: `budget` (converted share of the visual tokens) and `layers` (of the LLM), and each rival's own."""


def map_rival(name: str, **options: Any) -> MapRival:
    """Raises InvalidInput for an unknown name or an option's value."""
    return _find(MAP_RIVALS, name)(**options)


def layer_rival(name: str, **options: Any) -> LayerRival:
    """Raises InvalidInput for an unknown name or an option's value."""
    return _find(LAYER_RIVALS, name)(**options)


def _find(rivals: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    if name not in rivals:
        raise InvalidInput(f"is {name!r}, expected one of {', '.join(rivals)}", field="rival")
    return rivals[name]
