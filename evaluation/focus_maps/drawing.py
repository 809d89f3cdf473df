"""Single focus maps, each a PIL image of a given size: the picture with one thing drawn over it.

Legend: N visual tokens of one image, h, w of the drawing in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from evaluation.focus_maps.focus import EncodedPicture
from evaluation.focus_maps.geometry import TokenLayout

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


def scale_map(shown: EncodedPicture, box_wh: tuple[int, int] = (480, 480)) -> Image.Image:
    """Each region in its branch's colour, cut into the tokens that it became."""
    picture, where = fitted(shown.picture, box_wh), shown.layout
    pixels = np.asarray(picture, np.float64).copy()
    regions = _edges(where.region_boxes_M4, where, picture.size)
    for branch, (x0, y0, x1, y1) in zip(where.branch_ids_M.tolist(), regions, strict=True):
        part = pixels[y0:y1, x0:x1]
        part[:] = part * (1 - TINT) + np.array(branch_colour(branch)) * TINT
    _outline(pixels, _edges(where.boxes_N4[where.is_map_N], where, picture.size), (255, 255, 255), 0.55)
    _outline(pixels, regions, (0, 0, 0), 0.6)
    return _image(pixels)


def kept_map(shown: EncodedPicture, kept_N: torch.Tensor, tokens: Tokens = "map",
             box_wh: tuple[int, int] = (480, 480)) -> Image.Image:  # fmt: skip
    """The picture where the text-guided sampler kept tokens; the rest dark and grey. kept_N: bool, of this image."""
    picture, where = fitted(shown.picture, box_wh), shown.layout
    bright = np.asarray(picture, np.float64)
    pixels = np.repeat(np.asarray(picture.convert("L"), np.float64)[..., None], 3, axis=2) * DIMMED
    boxes = _edges(where.boxes_N4[_mask(where, tokens) & kept_N], where, picture.size)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = bright[y0:y1, x0:x1]
    _outline(pixels, boxes, KEPT_COLOUR, 0.9)
    return _image(pixels)


def importance_map(
    shown: EncodedPicture,
    importance_N: torch.Tensor,
    tokens: Tokens = "map",
    box_wh: tuple[int, int] = (480, 480),
    *,
    most: float | None = None,
) -> Image.Image:
    """Each token's importance S_j as a colour, by the square root of its share of `most`.

    importance_N: of this image's tokens. most: the importance that is brightest; None takes the largest of the tokens
    drawn.
    """
    picture, where = fitted(shown.picture, box_wh), shown.layout
    mask_N = _mask(where, tokens)
    importance = importance_N[mask_N].double().numpy()
    most = most if most is not None else float(importance.max(initial=0.0))
    colours = heat_colours(np.sqrt(np.clip(importance / (most or 1.0), 0, 1)))
    grey = np.repeat(np.asarray(picture.convert("L"), np.float64)[..., None], 3, axis=2)
    pixels = grey * (1 - HEAT) + np.array(NOT_SHOWN) * HEAT
    for colour, (x0, y0, x1, y1) in zip(colours, _edges(where.boxes_N4[mask_N], where, picture.size), strict=True):
        pixels[y0:y1, x0:x1] = grey[y0:y1, x0:x1] * (1 - HEAT) + colour * HEAT
    return _image(pixels)


def _mask(where: TokenLayout, tokens: Tokens) -> torch.Tensor:
    return where.is_map_N if tokens == "map" else where.is_base_N


def _edges(boxes_N4: torch.Tensor, where: TokenLayout, size_wh: tuple[int, int]) -> list[list[int]]:
    """Boxes in the drawing's pixels, last row and column excluded; neighbours share an edge, so nothing is drawn
    twice."""
    (height, width), scale = where.image_size_hw, torch.tensor([*size_wh, *size_wh], dtype=torch.float64)
    return (boxes_N4 * scale / torch.tensor([width, height, width, height])).round().long().tolist()


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
