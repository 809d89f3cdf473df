"""Anyres tiling: an image to base tile and grid tiles, and the grid tiles' features back to one unpadded map.

Equal, pixel for pixel and token for token, to LLaVA-NeXT in transformers (tests/contract/test_hf_equivalence.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from services.common.grid import best_resolution, resized_hw, unpadded_hw
from services.common.types import Detail, ImageTiles

REDUCED_MARGIN = 2
"""A JPEG is decoded at reduced scale only if that leaves so many times the pixels of the grid, either way."""


def decoded_hw(
    size_hw: tuple[int, int], tile_px: int, pinpoints: Sequence[tuple[int, int]], detail: Detail = "high"
) -> tuple[int, int]:
    """Height and width at which decoding a picture of this size is enough for its tiles (`REDUCED_MARGIN`).

    The second resizing, from there to the grid, then hides what the first did differently: docs/performance.md has the
    differences that were measured.
    """
    if detail == "low":
        return REDUCED_MARGIN * tile_px, REDUCED_MARGIN * tile_px
    inner_h, inner_w = resized_hw(size_hw, best_resolution(size_hw, pinpoints))
    return REDUCED_MARGIN * max(inner_h, tile_px), REDUCED_MARGIN * max(inner_w, tile_px)


def tile_image(image: Image.Image, *, tile_px: int, pinpoints: Sequence[tuple[int, int]], mean: Sequence[float],
               std: Sequence[float], size_hw: tuple[int, int] | None = None,
               detail: Detail = "high") -> ImageTiles:  # fmt: skip
    """Cuts an RGB image into normalised tiles, base tile first.

    size_hw: the picture's own size, when `image` was decoded at a smaller one; it alone decides the grid.
    detail: "low" makes the base tile alone.
    """
    size_hw = size_hw or (image.height, image.width)
    base = np.asarray(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC))[None]
    if detail == "low":
        return ImageTiles(pixels_T3HW=normalise(base, mean, std), image_size_hw=size_hw, grid_hw=(0, 0))
    target_h, target_w = best_resolution(size_hw, pinpoints)
    inner_h, inner_w = resized_hw(size_hw, (target_h, target_w))
    canvas = Image.new("RGB", (target_w, target_h))
    inner = image.resize((inner_w, inner_h), Image.Resampling.BICUBIC)
    canvas.paste(inner, ((target_w - inner_w) // 2, (target_h - inner_h) // 2))
    rows, cols = target_h // tile_px, target_w // tile_px
    grid = np.asarray(canvas).reshape(rows, tile_px, cols, tile_px, 3).swapaxes(1, 2).reshape(-1, tile_px, tile_px, 3)
    pixels = np.concatenate((base, grid))
    return ImageTiles(pixels_T3HW=normalise(pixels, mean, std), image_size_hw=size_hw, grid_hw=(rows, cols))


def normalise(pixels_THW3: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [T, H, W, 3] to float32 [T, 3, H, W], scaled to 0..1, less the mean, over the standard deviation."""
    scale_3 = np.float32(1) / (np.float32(255) * np.asarray(std, np.float32))
    shift_3 = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    out_T3HW = np.empty((len(pixels_THW3), 3, *pixels_THW3.shape[1:3]), np.float32)
    # Channel by channel into place: no array between, a fifth of the time.
    for channel in range(3):
        np.multiply(pixels_THW3[..., channel], scale_3[channel], out=out_T3HW[:, channel])
        out_T3HW[:, channel] -= shift_3[channel]
    return torch.from_numpy(out_T3HW)


def any_map_left(image: ImageTiles, patches_per_side: int) -> bool:
    """Whether any of the map is not padding: as in Hugging Face, an image much narrower than its grid keeps none."""
    rows, cols = (along * patches_per_side for along in image.grid_hw)
    top, bottom, left, right = unpadded_hw(image.image_size_hw, (rows, cols))
    return top < bottom and left < right


def join_tiles(features_TPD: torch.Tensor, grid_hw: tuple[int, int], size_hw: tuple[int, int]) -> torch.Tensor:
    """Grid tiles' features (no base tile) to the unpadded feature map [H, W, D]; without a tile to [0, 0, D]."""
    if grid_hw == (0, 0):
        return features_TPD.view(0, 0, features_TPD.shape[2])
    side, depth = math.isqrt(features_TPD.shape[1]), features_TPD.shape[2]
    rows, cols = grid_hw
    joined = features_TPD.view(rows, cols, side, side, depth).transpose(1, 2).reshape(rows * side, cols * side, depth)
    top, bottom, left, right = unpadded_hw(size_hw, (rows * side, cols * side))
    return joined[top:bottom, left:right]
