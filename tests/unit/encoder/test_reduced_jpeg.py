"""JPEGs decoded at reduced scale: the same grid, nearly the same pixels, never fewer than the tiles need."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from services.common.media import open_image
from services.encoder.anyres import REDUCED_MARGIN, decoded_hw, tile_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's words on damaged EXIF
TILE = 336
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # pixels stay 0..1


def enough(size_hw: tuple[int, int]) -> tuple[int, int]:
    return decoded_hw(size_hw, TILE, PINPOINTS)


def jpeg(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, quality=90, **options)
    return file.getvalue()


def photograph(height: int, width: int) -> Image.Image:
    """Smooth shapes with sensor noise."""
    rng = np.random.default_rng(height + width)
    shapes = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def plain(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 60))


def page(height: int, width: int) -> Image.Image:
    """A page full of small text: the hardest case that users send."""
    rng = np.random.default_rng(height + width)
    image = Image.new("RGB", (width, height), (250, 248, 240))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(30)
    for y in range(10, height, 42):
        words = ("".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 10))) for _ in range(width // 90))
        draw.text((10, y), " ".join(words), fill=tuple(int(v) for v in rng.integers(0, 120, 3)), font=font)
    return image


def tiles_of(data: bytes, reduced: bool):
    opened = open_image(data, enough_hw=enough if reduced else None)
    tiles = tile_image(opened.image, tile_px=TILE, pinpoints=PINPOINTS, mean=MEAN, std=STD, size_hw=opened.size_hw)
    return opened, tiles


@pytest.mark.parametrize("draw, worst_mean", [(photograph, 0.5), (page, 2.0)])
@pytest.mark.parametrize("size_hw", [(1500, 2000), (2800, 1400), (2700, 2700), (900, 2800)])
def test_same_grid_and_nearly_the_same_pixels(draw, worst_mean, size_hw):
    data = jpeg(draw(*size_hw))
    small, reduced = tiles_of(data, True)
    large, full = tiles_of(data, False)
    assert small.size_hw == large.size_hw == size_hw
    assert (reduced.grid_hw, reduced.image_size_hw) == (full.grid_hw, full.image_size_hw)
    difference = 255 * (reduced.pixels_T3HW - full.pixels_T3HW).abs()
    # docs/performance.md states these bounds, in levels of 255: about what JPEG at quality 90 changes already.
    assert difference.mean() <= worst_mean
    assert 10 * np.log10(255**2 / max(difference.square().mean().item(), 1e-9)) >= 38


def test_it_is_really_decoded_smaller_and_never_below_the_margin():
    opened, _ = tiles_of(jpeg(plain(3000, 4000)), True)
    assert opened.image.size == (2000, 1500) and opened.size_hw == (3000, 4000)
    for side in (336, 672, 1343, 1344, 2687, 2688, 3000):
        opened, tiles = tiles_of(jpeg(plain(side, side)), True)
        needed = min(REDUCED_MARGIN * TILE * max(tiles.grid_hw), side)
        assert opened.image.height >= needed and opened.image.width >= needed


def test_the_margin_is_kept_both_ways_in_a_ribbon():
    opened, _ = tiles_of(jpeg(plain(700, 5000)), True)
    assert opened.image.size == (5000, 700)  # the base tile takes all 700 rows


@pytest.mark.parametrize("orientation, turned", [(3, False), (6, True), (8, True)])
def test_the_size_is_that_of_the_upright_picture(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph(1400, 2801)
    image.paste((255, 0, 0), (0, 0, 700, 1400))
    data = jpeg(image, exif=exif)
    opened, reduced = tiles_of(data, True)
    assert opened.size_hw == ((2801, 1400) if turned else (1400, 2801))
    assert (opened.image.height > opened.image.width) == turned
    _, full = tiles_of(data, False)
    assert reduced.grid_hw == full.grid_hw
    assert (reduced.pixels_T3HW - full.pixels_T3HW).abs().mean() < 0.01


def test_broken_exif_and_grey_and_phone_pictures_are_reduced_too():
    grey = plain(2800, 2800).convert("L")
    assert tiles_of(jpeg(grey), True)[0].image.size == (1400, 1400)
    assert tiles_of(jpeg(grey, exif=b"Exif\0\0MM\0*garbage"), True)[0].image.size == (1400, 1400)
    two = jpeg(plain(2800, 2800), "MPO", save_all=True, append_images=[plain(64, 64)])
    assert tiles_of(two, True)[0].image.size == (1400, 1400)


def test_other_formats_are_decoded_whole():
    file = io.BytesIO()
    plain(1400, 2800).save(file, "PNG")
    opened, _ = tiles_of(file.getvalue(), True)
    assert opened.image.size == (2800, 1400) and opened.size_hw == (1400, 2800)
