"""Images as transformers' processors batch them: pixel values padded to the most tiles, and the images' own sizes.

Legend: I images, T tiles, H and W of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.grid import best_resolution
from services.common.types import ImageTiles


def batched(images: Sequence[ImageTiles]) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values, float32 [I, T, 3, H, W] with zeros after an image's last tile, and image_sizes, int64 [I, 2]."""
    most = max(len(image.pixels_T3HW) for image in images)
    padded = [
        nn.functional.pad(image.pixels_T3HW, (0, 0, 0, 0, 0, 0, 0, most - len(image.pixels_T3HW))) for image in images
    ]
    return torch.stack(padded), torch.tensor([image.image_size_hw for image in images])


def unbatched(pixel_values: torch.Tensor, image_sizes: torch.Tensor, config: FocusLlavaConfig) -> list[ImageTiles]:
    """The images of a batch; their grids follow from their sizes, (height, width) in pixels.

    pixel_values: [I, T, 3, H, W], or the tiles of all images in a row, [all tiles, 3, H, W].
    Raises InvalidInput for another number of tiles than the sizes ask for.
    """
    images, start = [], 0
    for index, size in enumerate(image_sizes.tolist()):
        height, width = best_resolution((size[0], size[1]), config.image_grid_pinpoints)
        grid_hw = height // config.tile_px, width // config.tile_px
        tiles = 1 + grid_hw[0] * grid_hw[1]
        if pixel_values.ndim == 5:
            pixels_T3HW = pixel_values[index][:tiles]
        else:
            pixels_T3HW, start = pixel_values[start : start + tiles], start + tiles
        if len(pixels_T3HW) != tiles:
            found = f"has {len(pixels_T3HW)} tiles for image {index}, expected {tiles} for its {size[0]} x {size[1]} px"
            raise InvalidInput(found, field="pixel_values")
        images.append(ImageTiles(pixels_T3HW=pixels_T3HW, image_size_hw=(size[0], size[1]), grid_hw=grid_hw))
    return images


def blank(config: FocusLlavaConfig, device: torch.device) -> ImageTiles:
    """The smallest image, all zeros: it takes the encoder through all its parts where a batch has no image."""
    height, width = min(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    side = config.tile_px
    grid_hw = height // side, width // side
    pixels_T3HW = torch.zeros(1 + grid_hw[0] * grid_hw[1], 3, side, side, device=device)
    return ImageTiles(pixels_T3HW=pixels_T3HW, image_size_hw=(height, width), grid_hw=grid_hw)
