"""The map of each image of a question: where its tokens lie, and what the engine decided about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.types import CompressedVisualTokens, FocusMap, PruneDecision
from services.focus_maps.layout import layout


def focus_maps(
    images: Sequence[CompressedVisualTokens],
    decision: PruneDecision | None,
    config: FocusLlavaConfig,
    *,
    sampled: bool,
) -> list[FocusMap]:
    """A map an image, in order. decision: None where nothing was pruned; sampled: as `layout` has it.

    Raises InvalidInput where the decision is not about these images.
    """
    maps = [layout(image, config, sampled=sampled) for image in images]
    if decision is None:
        return maps
    ends = np.cumsum([len(one.boxes_N4) for one in maps])
    count = int(ends[-1]) if len(ends) else 0
    importance_N, kept = decision.importance.numpy(), decision.kept.numpy()
    if len(importance_N) != count or (len(kept) and int(kept[-1]) >= count):
        raise InvalidInput(f"is about {len(importance_N)} visual tokens, the images have {count}", field="decision")
    kept_N = np.zeros(count, bool)
    kept_N[kept] = True
    split = zip(maps, np.split(kept_N, ends[:-1]), np.split(importance_N, ends[:-1]), strict=True)
    return [dataclasses.replace(one, kept_N=kept, importance_N=importance) for one, kept, importance in split]
