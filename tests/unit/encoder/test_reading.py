"""Image files to tiles: every orientation, JPEGs whole or reduced as checkpoint and request say, both details."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer

from services.checkpoint.config import FocusLlavaConfig
from services.common.types import ImageOptions
from services.encoder.anyres import REDUCED_MARGIN
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from services.encoder.reading import read_tiles
from services.text.prompt import PromptRenderer
from tests.tiny_checkpoints import make_random_checkpoint
from training.data.encoding import ConversationEncoder

TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> what makes the stored picture of the upright one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "checkpoint"
    make_random_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def config(folder) -> FocusLlavaConfig:
    return FocusLlavaConfig.load(folder)


def scene(width: int, height: int) -> Image.Image:
    """No two of its eight orientations look alike."""
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((pixels + rng.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8))


def stored(upright: Image.Image, orientation: int, format: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNED[orientation]
    file = io.BytesIO()
    (upright if turn is None else upright.transpose(turn)).save(file, format, exif=exif, **options)
    return file.getvalue()


def pixels_of(file: bytes) -> bytes:
    """The picture that Pillow shows of a file, upright, as PNG."""
    out = io.BytesIO()
    ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB").save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("orientation", TURNED)
def test_a_large_jpeg_is_the_same_tiles_as_its_pixels_in_png(config, orientation):
    file = stored(scene(720, 480), orientation, quality=90)
    tiles, notes = read_tiles(file, config)
    same, _ = read_tiles(pixels_of(file), config)
    assert torch.equal(tiles.pixels_T3HW, same.pixels_T3HW) and notes == ()
    assert (tiles.image_size_hw, tiles.grid_hw) == (same.image_size_hw, same.grid_hw) == ((480, 720), same.grid_hw)
    reduced, _ = read_tiles(file, config, ImageOptions(reduced_jpeg=True))
    assert (reduced.image_size_hw, reduced.grid_hw) == (tiles.image_size_hw, tiles.grid_hw)
    difference = (reduced.pixels_T3HW - tiles.pixels_T3HW).abs()
    # Normalised: a level of 255 is 0.015. Turned the wrong way, the mean would be above 0.5.
    assert 0 < difference.mean() < 0.03


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    "format, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})], ids=lambda value: str(value)[:4]
)
def test_every_format_is_turned_upright_and_read_whole(config, format, options, orientation):
    upright = scene(90, 60)
    whole, _ = read_tiles(stored(upright, 1, "PNG"), config)
    for asked in (None, ImageOptions(reduced_jpeg=True)):
        tiles, _ = read_tiles(stored(upright, orientation, format, **options), config, asked)
        assert torch.equal(tiles.pixels_T3HW, whole.pixels_T3HW)


def test_the_checkpoint_decides_and_a_request_may_say_otherwise(config):
    file = stored(scene(720, 480), 6, quality=90)
    saving = dataclasses.replace(config, reduced_jpeg=True)
    whole, reduced = (read_tiles(file, which)[0].pixels_T3HW for which in (config, saving))
    assert not torch.equal(whole, reduced)
    for which in (config, saving):
        assert torch.equal(read_tiles(file, which, ImageOptions(reduced_jpeg=True))[0].pixels_T3HW, reduced)
        assert torch.equal(read_tiles(file, which, ImageOptions(reduced_jpeg=False))[0].pixels_T3HW, whole)


@pytest.mark.parametrize("reduced", [True, False])
def test_training_reads_a_jpeg_as_serving_does(folder, config, reduced):
    config = dataclasses.replace(config, reduced_jpeg=reduced)
    file = stored(scene(720, 480), 6, quality=90)
    renderer = PromptRenderer(AutoTokenizer.from_pretrained(folder), image_token_id=config.image_token_id, context=4096)
    served = EncoderPipeline(EncoderModel(config), "f" * 64).prepare(file)
    trained = ConversationEncoder(config, renderer).tiles(file)
    assert torch.equal(trained.pixels_T3HW, served.tiles.pixels_T3HW)


def test_low_detail_is_the_base_tile_of_high_detail(config):
    for orientation in (1, 6):
        file = stored(scene(720, 480), orientation, quality=90)
        high, _ = read_tiles(file, config)
        low, _ = read_tiles(file, config, ImageOptions(detail="low"))
        assert low.grid_hw == (0, 0) and low.image_size_hw == high.image_size_hw and len(high.pixels_T3HW) > 1
        assert torch.equal(low.pixels_T3HW, high.pixels_T3HW[:1])


def test_low_detail_is_decoded_at_a_lower_scale(config, monkeypatch):
    decoded = []
    resize = Image.Image.resize

    def spy(image, size, *arguments, **options):
        decoded.append(image.size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    file = stored(scene(420, 420), 6)
    decoded.clear()
    read_tiles(file, config, ImageOptions(detail="low", reduced_jpeg=True))
    read_tiles(file, config, ImageOptions(detail="high", reduced_jpeg=True))
    assert config.tile_px * REDUCED_MARGIN <= decoded[0][0] < decoded[1][0] < 420
