"""Images from strangers: real files of every kind, and files that lie."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from services.common.errors import InvalidInput, TooLarge
from services.common.media import FORMATS, MediaLimits, check_image, content_hash, open_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's words on damaged TIFF tags


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height grey pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    return open_image(data).image.getpixel((x, y))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_as_rgb(format):
    data = file_of(Image.new("RGB", (40, 30), (200, 30, 60)), format)
    check_image(data)
    opened = open_image(data)
    assert opened.image.mode == "RGB" and opened.image.size == (40, 30) and opened.notes == ()
    assert np.abs(np.array(opened.image.getpixel((5, 5))) - (200, 30, 60)).max() <= 4  # JPEG and WebP are lossy


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "0 bytes"),
        (b"hello, I am a text", "not a readable image"),
        (b"%PDF-1.7\n" + bytes(100), "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
        (file_of(Image.new("RGB", (8, 8)), "PPM"), "not a readable image"),
        (file_of(Image.new("RGB", (8, 8)), "ICO"), "not a readable image"),
    ],
)
def test_not_an_image_is_refused_by_both(data, says):
    for read in (check_image, open_image):
        with pytest.raises(InvalidInput, match=says) as caught:
            read(data, field="turns[0].parts[1].image")
        assert str(caught.value).startswith("turns[0].parts[1].image: ")
        assert "BytesIO" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_file_is_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), format)
    with pytest.raises(InvalidInput, match="truncated or damaged|not a readable image"):
        open_image(data[: len(data) // 2])


def test_30000_by_30000_header_is_refused_without_decoding():
    data = png_header(30_000, 30_000)
    started = time.perf_counter()
    for read in (check_image, open_image):
        with pytest.raises(TooLarge, match="30000 x 30000|more pixels"):
            read(data)
    assert time.perf_counter() - started < 0.5  # decoding 900 MB would take seconds


@pytest.mark.parametrize(
    "size, limits, error, says",
    [
        ((8000, 8001), None, TooLarge, "limit is 64000000 pixels"),
        ((16_385, 400), None, TooLarge, "longest side allowed is 16384"),
        ((1, 101), None, InvalidInput, "narrower than the limit of 100 to 1"),
        ((101, 1), None, InvalidInput, "101 x 1"),
        ((0, 5), None, InvalidInput, ""),
        ((11, 10), MediaLimits(max_pixels=100), TooLarge, "11 x 10"),
    ],
)
def test_size_limits_come_from_the_header(size, limits, error, says):
    with pytest.raises(error, match=says):
        check_image(png_header(*size), limits)


def test_sizes_at_the_limits_are_accepted():
    check_image(png_header(8000, 8000))
    check_image(png_header(16_384, 164))
    assert open_image(file_of(Image.new("L", (100, 1)))).image.size == (100, 1)
    assert open_image(file_of(Image.new("L", (1, 1)))).image.size == (1, 1)


def test_byte_limit():
    data = file_of(Image.new("RGB", (8, 8)))
    check_image(data, MediaLimits(max_bytes=len(data)))
    with pytest.raises(TooLarge, match=f"has {len(data)} bytes"):
        check_image(data, MediaLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_uses_the_first_frame_and_says_so(format):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:])
    opened = open_image(data)
    assert opened.notes == ("animated image: first of 3 frames used",)
    red, green, blue = opened.image.getpixel((10, 10))
    assert red > 240 and green < 10 and blue < 10


def test_multi_page_tiff_says_so():
    pages = [Image.new("L", (20, 20), level) for level in (10, 20)]
    opened = open_image(file_of(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert opened.notes == ("file of several pages: first of 2 pages used",)
    assert opened.image.getpixel((0, 0)) == (10, 10, 10)


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


def test_broken_exif_is_ignored():
    data = file_of(Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\0\0MM\0*garbage")
    assert open_image(data).image.size == (40, 20)


def test_random_bytes_behind_every_magic_raise_only_our_errors():
    rng = np.random.default_rng(7)
    for format in FORMATS:
        good = file_of(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), format)
        for _ in range(40):
            bad = bytearray(good)
            for place in rng.integers(0, len(bad), 12):
                bad[place] = rng.integers(0, 256)
            try:
                opened = open_image(bytes(bad))
            except (InvalidInput, TooLarge):
                continue
            assert opened.image.mode == "RGB"


def test_content_hash_is_sha256():
    assert content_hash(b"abc") == hashlib.sha256(b"abc").hexdigest()
