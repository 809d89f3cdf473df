"""Images of every mode, depth and orientation as RGB."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from services.common import media
from services.common.errors import InvalidInput
from services.common.media import open_image
from tests.image_files import chunk, file_of, pixel, png_of


def test_cmyk():
    data = file_of(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "TIFF")
    assert pixel(data) == (255, 0, 0)
    red, green, blue = pixel(file_of(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), 10, 10)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_not_clipped(dtype):
    ramp_HW = np.linspace(0, 65535, 256).round().astype(dtype).reshape(1, 256).repeat(4, axis=0)
    image = Image.frombytes("I;16" if dtype[0] == "<" else "I;16B", (256, 4), ramp_HW.tobytes())
    for format in ("PNG", "TIFF"):
        opened = open_image(file_of(image, format))
        levels = np.asarray(opened.image)[0, :, 0].astype(int)
        assert (np.abs(levels - np.arange(256)) <= 1).all() and opened.notes == ()


def test_wide_grey_is_scaled_in_blocks_as_it_would_be_at_once(monkeypatch):
    monkeypatch.setattr(media, "_BLOCK_PIXELS", 1000)  # three rows of 300
    levels_HW = np.arange(65_700, dtype=np.uint32).clip(0, 65_535).astype(np.uint16).reshape(219, 300)
    found_HW = np.asarray(open_image(file_of(Image.fromarray(levels_HW))).image)[..., 0]
    assert (found_HW == np.rint(levels_HW / 257)).all()
    assert (found_HW == (levels_HW.astype(np.uint32) + 128) // 257).all()
    signed_HW = np.random.default_rng(0).uniform(-7, 3, (101, 300)).astype(np.float32)
    low, high = float(signed_HW.min()), float(signed_HW.max())
    stretched_HW = np.rint((signed_HW.astype(np.float64) - low) * (255 / (high - low)))
    assert (np.asarray(open_image(file_of(Image.fromarray(signed_HW), "TIFF")).image)[..., 2] == stretched_HW).all()


def test_wide_grey_takes_few_bytes_a_pixel(monkeypatch):
    monkeypatch.setattr(media, "_BLOCK_PIXELS", 2**14)
    data = file_of(Image.fromarray(np.zeros((2000, 2000), np.uint16)))
    tracemalloc.start()
    try:
        open_image(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2000 * 2000  # numpy's and Python's; as float64 all at once it is 24 and more


@pytest.mark.parametrize("orientation", [1, 6])
def test_rgb_is_not_copied(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.new("RGB", (40, 20), (1, 2, 3)), exif=exif)
    for name in ("copy", "convert"):
        monkeypatch.setattr(Image.Image, name, None)  # a copy of the largest image is 256 MB
    opened = open_image(data)
    assert opened.image.size == ((40, 20) if orientation == 1 else (20, 40))
    assert opened.image.getpixel((0, 0)) == (1, 2, 3)


def test_a_transparent_level_of_16_bit_grey_is_drawn_on_white():
    rows = b"".join(b"\0" + struct.pack(">3H", 40_000, 40_001, 0) for _ in range(2))
    opened = open_image(png_of(3, 2, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 40_000))))
    assert [opened.image.getpixel((x, 1))[0] for x in range(3)] == [255, 156, 0]
    assert opened.notes == ("transparent image: drawn on white",)
    absent = open_image(png_of(3, 2, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 7))))
    assert absent.image.getpixel((0, 0)) == (156, 156, 156) and absent.notes == ()


def test_a_palette_that_is_missing_is_black():
    assert pixel(png_of(2, 1, 8, 3, b"\0\1\1")) == (0, 0, 0)


def test_32_bit_and_float_grey():
    wide = Image.fromarray(np.array([[0, 65535], [257, 0]], dtype=np.int32))
    assert pixel(file_of(wide, "TIFF"), 1, 0) == (255, 255, 255)
    assert pixel(file_of(wide, "TIFF"), 0, 1) == (1, 1, 1)
    unit = Image.fromarray(np.array([[0.0, 1.0], [0.5, 0.0]], dtype=np.float32))
    assert pixel(file_of(unit, "TIFF"), 1, 0) == (255, 255, 255)
    assert pixel(file_of(unit, "TIFF"), 0, 1) == (128, 128, 128)
    signed = open_image(file_of(Image.fromarray(np.array([[-10.0, 10.0]], dtype=np.float32)), "TIFF"))
    assert signed.image.getpixel((0, 0)) == (0, 0, 0) and signed.image.getpixel((1, 0)) == (255, 255, 255)
    assert signed.notes == ("grey values from -10 to 10: stretched to 0..255",)
    broken = Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32))
    with pytest.raises(InvalidInput, match="not finite"):
        open_image(file_of(broken, "TIFF"))


def test_palette_with_transparency_is_drawn_on_white():
    image = Image.new("P", (10, 10), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 3), 1)
    opened = open_image(file_of(image, "PNG", transparency=0))
    assert opened.image.getpixel((0, 0)) == (255, 255, 255) and opened.image.getpixel((3, 3)) == (0, 0, 255)
    assert opened.notes == ("transparent image: drawn on white",)
    plain = open_image(file_of(image, "PNG"))
    assert plain.image.getpixel((0, 0)) == (255, 0, 0) and plain.notes == ()


@pytest.mark.parametrize("mode, clear, half", [("RGBA", (0, 0, 0, 0), (0, 0, 0, 128)), ("LA", (0, 0), (0, 128))])
def test_alpha_is_drawn_on_white(mode, clear, half):
    image = Image.new(mode, (4, 4), clear)
    image.putpixel((1, 1), half)
    opened = open_image(file_of(image))
    assert opened.image.getpixel((0, 0)) == (255, 255, 255)
    assert abs(opened.image.getpixel((1, 1))[0] - 127) <= 1
    assert opened.notes == ("transparent image: drawn on white",)


def test_opaque_alpha_needs_no_note():
    opened = open_image(file_of(Image.new("RGBA", (4, 4), (1, 2, 3, 255))))
    assert opened.image.getpixel((0, 0)) == (1, 2, 3) and opened.notes == ()


def test_bilevel():
    image = Image.new("1", (9, 9), 1)
    image.putpixel((2, 2), 0)
    assert pixel(file_of(image)) == (255, 255, 255) and pixel(file_of(image), 2, 2) == (0, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(format):
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left; orientation 6 (rotate 90 clockwise) puts it on top
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(file_of(image, format, exif=exif))
    assert opened.image.size == (20, 40)
    assert opened.image.getpixel((10, 2))[1] < 40 and opened.image.getpixel((10, 35))[1] > 215


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if mode == "PA":
        return picture.convert("P").convert("PA")
    return picture.convert(mode)


@pytest.mark.parametrize(
    "format, mode, options",
    [
        *(("TIFF", "LAB", {"compression": how}) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
        *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")),
        *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")),
        *(("WEBP", mode, {"lossless": True}) for mode in ("L", "RGB", "RGBA")),
    ],
)
def test_every_mode_becomes_rgb_as_pillow_converts_it(format, mode, options):
    noise = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    data = file_of(in_mode(Image.fromarray(noise.repeat(8, 0).repeat(8, 1)), mode), format, **options)
    opened = open_image(data)
    assert opened.notes == () and opened.image.mode == "RGB"
    assert opened.image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_lab_is_turned_upright_before_it_is_converted():
    picture = Image.linear_gradient("L").resize((40, 20)).convert("RGB")
    picture.paste((255, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(in_mode(picture, "LAB"), "TIFF", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert open_image(data).image.tobytes() == upright.tobytes() and upright.size == (20, 40)
