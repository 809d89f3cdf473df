"""Single drawings of a focus map, each a PIL image of a given size: the picture with one thing drawn over it.

They need Pillow and numpy alone. Legend: N visual tokens of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from focusllava.focus_maps import Box, FocusMap

Colour = tuple[int, int, int]
Tokens = Literal["map", "base"]
"""The feature map's tokens or the base tile's: both cover the image, so each is drawn by itself."""

# Told apart by people who see red and green alike (Okabe and Ito's palette); from fine to coarse, warm to cold.
BRANCH_COLOURS: tuple[Colour, ...] = (
    (213, 94, 0), (240, 228, 66), (0, 114, 178), (0, 158, 115), (204, 121, 167), (86, 180, 233), (120, 120, 120),
)  # fmt: skip
KEPT_COLOUR: Colour = (255, 214, 10)
NOT_SHOWN: Colour = (64, 64, 64)
TINT = 0.5
"""Weight of a branch's colour over the picture."""
HEAT = 0.75
"""Weight of an importance's colour over the picture in grey."""
DIMMED = 0.3
"""Brightness of what was dropped."""
_HEAT_STOPS = np.array([(8, 8, 40), (84, 18, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


def fitted(picture: Image.Image, box_wh: tuple[int, int]) -> Image.Image:
    """The picture at the largest size inside the box, its aspect kept; small ones grow."""
    scale = min(box_wh[0] / picture.width, box_wh[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def branch_colour(branch: int) -> Colour:
    return BRANCH_COLOURS[branch % len(BRANCH_COLOURS)]


def heat_colours(heat: np.ndarray) -> np.ndarray:
    """Values 0..1 to float RGB 0..255 [..., 3], dark blue over red to light yellow."""
    stops = np.linspace(0, 1, len(_HEAT_STOPS))
    return np.stack([np.interp(heat, stops, _HEAT_STOPS[:, channel]) for channel in range(3)], axis=-1)


def token_boxes(where: FocusMap, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens of one set that have a box, ascending, and their boxes [n, 4]."""
    first, last = (where.base_tokens, len(where.boxes)) if tokens == "map" else (0, where.base_tokens)
    found = [(index, box) for index, box in enumerate(where.boxes[first:last], start=first) if box is not None]
    return np.array([index for index, _ in found], int), np.array([box for _, box in found]).reshape(-1, 4)


def kept_of(where: FocusMap, tokens: Tokens) -> str:
    """The number of one set's tokens that were kept, "of" all of them that have a box."""
    index, _ = token_boxes(where, tokens)
    return f"{sum(where.kept[i] for i in index)} of {len(index)}"


def scale_map(picture: Image.Image, where: FocusMap, box_wh: tuple[int, int] = (480, 480)) -> Image.Image:
    """Each region in its branch's colour, cut into the tokens that it became. Without regions: the tokens' outlines."""
    picture = fitted(picture, box_wh)
    pixels = np.asarray(picture, np.float64).copy()
    regions = _edges(where.regions.boxes if where.regions else (), where, picture.size)
    for branch, (x0, y0, x1, y1) in zip(where.regions.branch_ids if where.regions else (), regions, strict=True):
        part = pixels[y0:y1, x0:x1]
        part[:] = part * (1 - TINT) + np.array(branch_colour(branch)) * TINT
    _outline(pixels, _edges(token_boxes(where, "map")[1], where, picture.size), (255, 255, 255), 0.55)
    _outline(pixels, regions, (0, 0, 0), 0.6)
    return _image(pixels)


def kept_map(picture: Image.Image, where: FocusMap, tokens: Tokens = "map",
             box_wh: tuple[int, int] = (480, 480)) -> Image.Image:  # fmt: skip
    """The picture where the text-guided sampler kept tokens; the rest dark and grey."""
    picture = fitted(picture, box_wh)
    bright = np.asarray(picture, np.float64)
    pixels = np.repeat(np.asarray(picture.convert("L"), np.float64)[..., None], 3, axis=2) * DIMMED
    index, boxes_n4 = token_boxes(where, tokens)
    boxes = _edges(boxes_n4[np.array(where.kept, bool)[index]], where, picture.size)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = bright[y0:y1, x0:x1]
    _outline(pixels, boxes, KEPT_COLOUR, 0.9)
    return _image(pixels)


def importance_map(
    picture: Image.Image,
    where: FocusMap,
    tokens: Tokens = "map",
    box_wh: tuple[int, int] = (480, 480),
    *,
    importance: Sequence[float] | None = None,
    most: float | None = None,
) -> Image.Image:
    """Each token's importance S_j as a colour, by the square root of its share of `most`.

    importance: one a token, in place of the map's own. most: the importance that is brightest; None takes the largest
    of the tokens drawn.
    """
    picture = fitted(picture, box_wh)
    index, boxes_n4 = token_boxes(where, tokens)
    values = np.array(where.importance if importance is None else importance, np.float64)[index]
    most = most if most is not None else float(values.max(initial=0.0))
    colours = heat_colours(np.sqrt(np.clip(values / (most or 1.0), 0, 1)))
    grey = np.repeat(np.asarray(picture.convert("L"), np.float64)[..., None], 3, axis=2)
    pixels = grey * (1 - HEAT) + np.array(NOT_SHOWN) * HEAT
    for colour, (x0, y0, x1, y1) in zip(colours, _edges(boxes_n4, where, picture.size), strict=True):
        pixels[y0:y1, x0:x1] = grey[y0:y1, x0:x1] * (1 - HEAT) + colour * HEAT
    return _image(pixels)


def _edges(boxes: Sequence[Box] | np.ndarray, where: FocusMap, size_wh: tuple[int, int]) -> list[list[int]]:
    """Boxes in the drawing's pixels, last row and column excluded; neighbours share an edge, so nothing is drawn
    twice."""
    scale = np.array([*size_wh, *size_wh]) / np.array([where.width, where.height, where.width, where.height])
    return (np.array(boxes, np.float64).reshape(-1, 4) * scale).round().astype(int).tolist()


def _outline(pixels: np.ndarray, boxes: Sequence[Sequence[int]], colour: Colour, weight: float) -> None:
    """One pixel inside each box; boxes too small for it stay as they are."""
    ink = np.array(colour, np.float64)
    for x0, y0, x1, y1 in boxes:
        if x1 - x0 > 2 and y1 - y0 > 2:
            inside = pixels[y0:y1, x0:x1]
            for edge in (inside[0], inside[-1], inside[1:-1, 0], inside[1:-1, -1]):
                edge[:] = edge * (1 - weight) + ink * weight


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
