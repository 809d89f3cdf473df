"""What both samplers chose of the images of a question: `answer.focus` of who asked with `return_map`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from focusllava.v1 import focus_pb2

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright original: x to the right, y down, edges and not pixel centres."""


@dataclass(frozen=True, kw_only=True)
class FocusRegions:
    """The vision-guided sampler's regions, a grid."""

    x: tuple[float, ...]
    """Edges of the columns in pixels, from left to right: one more than columns."""
    y: tuple[float, ...]
    """Edges of the rows in pixels, from top to bottom: one more than rows."""
    kernels: tuple[tuple[int, int], ...]
    """Height and width, in tokens of the feature map, that a token of each branch stands for; (0, 0) drops a region."""
    branch_ids: tuple[int, ...]
    """The branch that each region chose, row by row: indices into `kernels`."""

    @property
    def boxes(self) -> tuple[Box, ...]:
        """A box a region, row by row."""
        rows, columns = zip(self.y, self.y[1:], strict=False), list(zip(self.x, self.x[1:], strict=False))
        return tuple((x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns)

    def branch_shares(self) -> list[float]:
        """The share of the regions that chose each branch."""
        return [self.branch_ids.count(branch) / len(self.branch_ids) for branch in range(len(self.kernels))]


@dataclass(frozen=True, kw_only=True)
class FocusMap:
    """What both samplers chose of one image. Its tokens are in the order in which the language model gets them."""

    image: int
    """Index of the image in the request."""
    width: int
    """Width of the upright original, in pixels."""
    height: int
    """Height of the upright original, in pixels."""
    regions: FocusRegions | None
    """None with the vision-guided sampler off, and with low detail."""
    boxes: tuple[Box | None, ...]
    """One a token, None for a newline. The base tile's cover the image, the feature map's cover it once more."""
    base_tokens: int
    """The number of tokens, all at the beginning, that are the base tile's."""
    kept: tuple[bool, ...]
    """Whether the layers from the prune layer on saw a token."""
    importance: tuple[float, ...]
    """S_j of Eq. 8, one a token, that the choice was made by. Empty where nothing was pruned."""


@dataclass(frozen=True, kw_only=True)
class FocusMaps:
    """What both samplers chose for one question."""

    maps: tuple[FocusMap, ...]
    """One an image, in order."""
    prune_layer: int
    """The zero-based layer before which the prompt was pruned; 0 where it was not."""
    threshold: float | None
    """gamma of Eq. 9 that the prompt was pruned by; None: by keep_ratio, or not at all."""
    keep_ratio: float | None
    """The share of the visual tokens that was kept; None: by threshold, or not at all."""


def focus_maps(message: focus_pb2.FocusMaps) -> FocusMaps:
    """The maps of a message."""
    return FocusMaps(
        maps=tuple(map(_map, message.maps)),
        prune_layer=message.prune_layer,
        threshold=_shortest(message.threshold) if message.HasField("threshold") else None,
        keep_ratio=_shortest(message.keep_ratio) if message.HasField("keep_ratio") else None,
    )


def _map(one: focus_pb2.FocusMap) -> FocusMap:
    return FocusMap(
        image=one.image,
        width=one.width,
        height=one.height,
        regions=_regions(one.regions) if one.HasField("regions") else None,
        boxes=_boxes(one.boxes),
        base_tokens=one.base_tokens,
        kept=tuple(map(bool, one.kept)),
        importance=tuple(one.importance),
    )


def _regions(regions: focus_pb2.FocusRegions) -> FocusRegions:
    return FocusRegions(
        x=tuple(regions.x),
        y=tuple(regions.y),
        kernels=tuple((kernel.height, kernel.width) for kernel in regions.kernels),
        branch_ids=tuple(regions.branch_ids),
    )


def _boxes(numbers: Sequence[float]) -> tuple[Box | None, ...]:
    four = iter(numbers)
    return tuple(box if any(box) else None for box in zip(four, four, four, four, strict=True))


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32."""
    return float(f"{value:.7g}")
