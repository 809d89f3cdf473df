"""The anyres grid in numbers alone: which tiles an image is cut into, and which part of their map shows it.

Equal to LLaVA-NeXT's in transformers (tests/contract/test_hf_equivalence.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_resolution(size_hw: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most of the image's pixels, and of those the one that wastes fewest."""

    def fit(target_hw: tuple[int, int]) -> tuple[int, int]:
        scale = min(target_hw[1] / size_hw[1], target_hw[0] / size_hw[0])
        effective = min(int(size_hw[1] * scale) * int(size_hw[0] * scale), size_hw[0] * size_hw[1])
        return effective, -(target_hw[0] * target_hw[1] - effective)

    return max(pinpoints, key=fit)


def resized_hw(size_hw: tuple[int, int], target_hw: tuple[int, int]) -> tuple[int, int]:
    """Size of the image inside the target, its aspect kept."""
    scale_h, scale_w = target_hw[0] / size_hw[0], target_hw[1] / size_hw[1]
    if scale_w < scale_h:
        return min(math.ceil(size_hw[0] * scale_w), target_hw[0]), target_hw[1]
    return target_hw[0], min(math.ceil(size_hw[1] * scale_h), target_hw[1])


def unpadded_hw(size_hw: tuple[int, int], map_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the map's part that is not padding: no row or no column of a very narrow image."""
    height, width = map_hw
    if size_hw[1] / size_hw[0] > width / height:
        inner = int(round(size_hw[0] * (width / size_hw[1]), 7))
        padding = (height - inner) // 2
        return padding, height - padding, 0, width
    inner = int(round(size_hw[1] * (height / size_hw[0]), 7))
    padding = (width - inner) // 2
    return 0, height, padding, width - padding
