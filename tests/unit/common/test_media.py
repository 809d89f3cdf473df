"""Images from strangers: every format, limits, and files that lie."""

from __future__ import annotations

import hashlib
import struct
import time

import numpy as np
import pytest
from PIL import Image

from services.common.errors import InvalidInput, TooLarge
from services.common.media import FORMATS, MediaLimits, check_image, content_hash, open_image
from tests.image_files import chunk, file_of, png_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's words on damaged TIFF tags


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
