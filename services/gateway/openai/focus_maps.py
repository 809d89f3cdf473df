"""Focus maps as JSON: numbers where they are few, base64 of little-endian float32 where a visual token has one."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from focusllava.v1 import focus_pb2
from services.common.wire import shortest


def maps_object(maps: focus_pb2.FocusMaps) -> dict[str, Any]:
    """The fields `pruning` and `maps` of an answer's `focus`; docs/serving.md describes them."""
    pruning = None
    if maps.prune_layer:
        pruning = {
            "layer": maps.prune_layer,
            "threshold": shortest(maps.threshold) if maps.HasField("threshold") else None,
            "keep_ratio": shortest(maps.keep_ratio) if maps.HasField("keep_ratio") else None,
        }
    return {"pruning": pruning, "maps": [_map(one) for one in maps.maps]}


def _map(one: focus_pb2.FocusMap) -> dict[str, Any]:
    return {
        "image": one.image,
        "width": one.width,
        "height": one.height,
        "regions": _regions(one.regions) if one.HasField("regions") else None,
        "base_tokens": one.base_tokens,
        "boxes": _floats(one.boxes),
        "kept": one.kept.translate(_DIGITS).decode(),
        "importance": _floats(one.importance) if one.importance else None,
    }


def _regions(regions: focus_pb2.FocusRegions) -> dict[str, Any]:
    return {
        "x": [shortest(edge) for edge in regions.x],
        "y": [shortest(edge) for edge in regions.y],
        "kernels": [[kernel.height, kernel.width] for kernel in regions.kernels],
        "branches": list(regions.branch_ids),
    }


def _floats(values: Sequence[float]) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


_DIGITS = bytes.maketrans(b"\0\1", b"01")
