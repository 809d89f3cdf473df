"""An image to the tiles that the vision tower takes: one way for serving, training and evaluation."""

from __future__ import annotations

from functools import partial

from PIL import Image

from services.checkpoint.config import FocusLlavaConfig
from services.common.media import MediaLimits, open_image
from services.common.types import Detail, ImageOptions, ImageTiles
from services.encoder.anyres import decoded_hw, tile_image


def read_tiles(
    data: bytes,
    config: FocusLlavaConfig,
    options: ImageOptions | None = None,
    *,
    limits: MediaLimits | None = None,
    field: str = "image",
) -> tuple[ImageTiles, tuple[str, ...]]:
    """An image file's tiles, and what the user should know of how it was read.

    Thread-safe; CPU-bound. Raises InvalidInput or TooLarge as `open_image`, naming `field`.
    """
    options = options or ImageOptions()
    reduced = config.reduced_jpeg if options.reduced_jpeg is None else options.reduced_jpeg
    enough = partial(decoded_hw, tile_px=config.tile_px, pinpoints=config.image_grid_pinpoints, detail=options.detail)
    opened = open_image(data, limits, field, enough_hw=enough if reduced else None)
    return tiles_of(opened.image, config, detail=options.detail, size_hw=opened.size_hw), opened.notes


def tiles_of(
    image: Image.Image,
    config: FocusLlavaConfig,
    *,
    detail: Detail = "high",
    size_hw: tuple[int, int] | None = None,
) -> ImageTiles:
    """`tile_image` of an RGB image, with the checkpoint's sizes and normalisation."""
    return tile_image(
        image,
        size_hw=size_hw,
        tile_px=config.tile_px,
        pinpoints=config.image_grid_pinpoints,
        mean=config.image_mean,
        std=config.image_std,
        detail=detail,
    )
