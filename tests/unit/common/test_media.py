"""Images from strangers: real files of every kind, and files that lie."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from services.common import media
from services.common.errors import InvalidInput, TooLarge
from services.common.media import FORMATS, MediaLimits, check_image, content_hash, open_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's words on damaged TIFF tags


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, bits: int, colours: int, pixels: bytes, *between: bytes) -> bytes:
    """colours: 0 grey, 3 palette. between: chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)) + b"".join(between)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height grey pixels and holds none."""
    return png_of(width, height, 8, 0, b"\0")


def tiff_of_pages(count: int) -> bytes:
    """Pages of one strip of 16 x 16 pixels that they all share."""
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 256)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    ends = [264 + (len(page) + 4) * (index + 1) for index in range(count - 1)] + [0]
    file = b"II*\0" + struct.pack("<I", 264) + bytes(256)
    return file + b"".join(page + struct.pack("<I", end) for end in ends)


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


@pytest.mark.parametrize(
    "name, value", [("max_bytes", 0), ("max_pixels", -1), ("max_side", 0), ("max_aspect_ratio", 0.5)]
)
def test_limits_that_admit_nothing_are_refused(name, value):
    with pytest.raises(InvalidInput, match=f"^{name}: is {value}, expected 1 or more"):
        MediaLimits(**{name: value})


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
    assert opened.notes == ("animated image: first frame used",)
    assert opened.image.resize((5, 5)).size == (5, 5)  # its file is closed
    red, green, blue = opened.image.getpixel((10, 10))
    assert red > 240 and green < 10 and blue < 10


def test_multi_page_tiff_says_so():
    pages = [Image.new("L", (20, 20), level) for level in (10, 20)]
    opened = open_image(file_of(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert opened.notes == ("file of several pages: first one used",)
    assert opened.image.getpixel((0, 0)) == (10, 10, 10)


def test_pages_are_not_counted():
    data = tiff_of_pages(40_000)
    started = time.process_time()
    assert open_image(data).notes == ("file of several pages: first one used",)
    assert time.process_time() - started < 2  # counting them takes 9 s, and four times that for twice as many


def many_parts(count: int) -> dict[str, bytes]:
    small = Image.new("RGB", (16, 16))
    jpeg, gif, pixels = file_of(small, "JPEG"), file_of(small.convert("L"), "GIF"), b"\0" * 17 * 16
    palette_end = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    return {
        "PNG": png_of(16, 16, 8, 0, pixels, chunk(b"abCd") * count),
        "JPEG": jpeg[:2] + b"\xff\xfe\0\2" * count + jpeg[2:],
        "GIF": gif[:palette_end] + b"\x21\xfe\0" * count + gif[palette_end:],
    }


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_a_header_of_very_many_parts_is_refused_before_it_takes_long(format):
    check_image(many_parts(1000)[format])
    assert open_image(many_parts(1000)[format]).image.size == (16, 16)
    for read in (check_image, open_image):
        with pytest.raises(InvalidInput, match="^turns: is made of too many parts"):
            read(many_parts(100_000)[format], field="turns")


def test_very_many_parts_behind_the_pixels_are_refused_too():
    data = png_of(16, 16, 8, 0, b"\0" * 17 * 16)[:-12] + chunk(b"abCd") * 100_000 + chunk(b"IEND")
    check_image(data)
    with pytest.raises(InvalidInput, match="too many parts"):
        open_image(data)


def test_honest_files_of_many_parts_are_read():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000), dtype=np.uint8))
    assert open_image(file_of(noise, "GIF")).image.size == (2000, 1500)  # blocks of 255 bytes
    strips = file_of(noise.resize((170, 16_384)), "TIFF", tiffinfo={278: 1})  # a strip a row
    assert open_image(strips).image.size == (170, 16_384)


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
