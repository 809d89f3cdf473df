"""Focus maps -> protobuf."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from focusllava.v1 import focus_pb2
from services.common.types import FocusMap, FocusRegions, PruneDecision


def focus_maps_to_proto(maps: Sequence[FocusMap], decision: PruneDecision | None) -> focus_pb2.FocusMaps:
    """The maps of a question's images, in order; decision: what they were made with, None where nothing was pruned."""
    return focus_pb2.FocusMaps(
        maps=[_map_to_proto(index, one) for index, one in enumerate(maps)],
        prune_layer=decision.layer if decision else 0,
        threshold=decision.threshold if decision else None,
        keep_ratio=decision.keep_ratio if decision else None,
    )


def _map_to_proto(index: int, one: FocusMap) -> focus_pb2.FocusMap:
    height, width = one.image_size_hw
    return focus_pb2.FocusMap(
        image=index,
        width=width,
        height=height,
        regions=_regions_to_proto(one.regions) if one.regions else None,
        boxes=one.boxes_N4.ravel().tolist(),
        base_tokens=one.base_tokens,
        kept=one.kept_N.astype(np.uint8).tobytes(),
        importance=[] if one.importance_N is None else one.importance_N.tolist(),
    )


def _regions_to_proto(regions: FocusRegions) -> focus_pb2.FocusRegions:
    return focus_pb2.FocusRegions(
        x=regions.x.tolist(),
        y=regions.y.tolist(),
        kernels=[focus_pb2.FocusKernel(height=height, width=width) for height, width in regions.kernels],
        branch_ids=regions.branch_ids_M.tobytes(),
    )
