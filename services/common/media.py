"""Images from strangers: byte and pixel limits from the header alone, then decoding to RGB with notes for the user."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from services.common.errors import FocusError, InvalidInput, TooLarge
from services.common.settings import require

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The only decoders that are ever tried. Pillow opens a phone's multi-picture JPEG with its JPEG plug-in too."""
_JPEG = ("JPEG", "MPO")
FORMATS_TEXT = "JPEG, PNG, WebP, GIF, BMP or TIFF"

HEADER_READS = 2**16
"""Most reads of a file until its header is parsed; a usual header takes some tens."""
BYTES_PER_READ = 32
"""Decoding may take one more read for each so many bytes. The most that honest files need is a GIF's, one in 128."""
_ON_WHITE = "transparent image: drawn on white"
_BLOCK_PIXELS = 2**20
"""Wide grey values are scaled so many at a time, in 8 bytes each."""


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What is accepted; checked on the header, before any pixel is decoded."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 16_384
    """Longest side, in pixels: the limits above leave room for long pages, this one bounds a row."""
    max_aspect_ratio: float = 100.0
    """Longer side over shorter side. A less narrow image may lose its feature map, depending on the checkpoint's grid:
    the encoder says so in a note (`EncoderPipeline.prepare`)."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_side", "max_aspect_ratio"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """A decoded image: mode RGB, upright."""

    image: Image.Image
    size_hw: tuple[int, int]
    """Height and width of the picture as stored, upright; `image` is smaller when it was decoded at reduced scale."""
    notes: tuple[str, ...] = ()
    """What the user should know of how it was read."""


def content_hash(data: bytes) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_image(data: bytes, limits: MediaLimits | None = None, field: str = "image") -> None:
    """Refuses what the header alone shows to be unusable; no pixel is decoded.

    Microseconds, and some hundredths of a second for a header made to take long (`HEADER_READS`).

    Raises:
        InvalidInput: empty, not one of our formats, a broken or an endless header, no pixels, or too narrow.
        TooLarge: more bytes or pixels than `limits`, or than Pillow's own decompression-bomb limit.
    """
    _open_header(data, limits or MediaLimits(), field).close()


def open_image(
    data: bytes,
    limits: MediaLimits | None = None,
    field: str = "image",
    *,
    enough_hw: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
) -> OpenedImage:
    """Decodes an image file: first frame, EXIF rotation applied, 16-bit scaled to 8, transparency drawn on white.

    Thread-safe; CPU-bound, so call it off an event loop: Pillow lets go of the GIL while it decodes.

    enough_hw: given the upright height and width, the ones that suffice. A JPEG is then decoded at the smallest of 1/1,
    1/2, 1/4 and 1/8 that has at least so many pixels either way: an inverse transform of fewer coefficients.

    Raises:
        InvalidInput: as `check_image`, and when the pixels are truncated or damaged.
        TooLarge: as `check_image`.
    """
    limits = limits or MediaLimits()
    with _open_header(data, limits, field) as image:
        notes = _frame_notes(image)
        stored_hw = _reduce(image, enough_hw) if enough_hw and image.format in _JPEG else None
        with _pillow(f"is a truncated or damaged {image.format or 'image'} file", limits, field):
            image.load()
        _check_size(image, limits, field)  # TIFF and GIF may change their size while loading
        with contextlib.suppress(Exception):  # unreadable EXIF says nothing of the pixels
            ImageOps.exif_transpose(image, in_place=True)
        with _pillow(f"has pixels of mode {image.mode}, which cannot be read", limits, field):
            rgb, more = _to_rgb(image, field)
    return OpenedImage(image=rgb, size_hw=stored_hw or (rgb.height, rgb.width), notes=(*notes, *more))


@contextlib.contextmanager
def _pillow(otherwise: str, limits: MediaLimits, field: str) -> Iterator[None]:
    """Turns Pillow's errors, of almost any type on damaged data, into ours; `otherwise` says what went wrong."""
    try:
        yield
    except FocusError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"has more pixels than the limit of {limits.max_pixels}", field=field) from None
    except MemoryError:
        raise TooLarge("does not fit in memory when decoded", field=field) from None
    except Exception as error:
        raise InvalidInput(otherwise, field=field) from error


class _CountedReads(io.BytesIO):
    """A file that ends a parser's work once it has read often enough.

    Pillow's parsers are Python, a microsecond a read, and hold the GIL: 20 MB of empty chunks would take them seconds.
    """

    def __init__(self, data: bytes, field: str):
        super().__init__(data)
        self.left, self._field = HEADER_READS, field

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise InvalidInput("is made of too many parts, each of a few bytes", field=self._field)
        return super().read(size)


def _reduce(image: Image.Image, enough_hw: Callable[[tuple[int, int]], tuple[int, int]]) -> tuple[int, int]:
    """Has a JPEG decoded at reduced scale where that is enough; returns its upright height and width."""
    width, height = image.size
    turned = _is_turned(image)
    upright_hw = (width, height) if turned else (height, width)
    needed = enough_hw(upright_hw)
    image.draft(None, needed if turned else needed[::-1])  # type: ignore[arg-type]
    return upright_hw


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the picture is stored on its side."""
    with contextlib.suppress(Exception):  # as in `open_image`
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return False


def _open_header(data: bytes, limits: MediaLimits, field: str) -> Image.Image:
    if not data:
        raise InvalidInput("has 0 bytes", field=field)
    if len(data) > limits.max_bytes:
        raise TooLarge(f"has {len(data)} bytes, the limit is {limits.max_bytes}", field=field)
    file = _CountedReads(data, field)
    with _pillow(f"is not a readable image; send {FORMATS_TEXT}", limits, field):
        image = Image.open(file, formats=FORMATS)
    file.left += len(data) // BYTES_PER_READ
    try:
        _check_size(image, limits, field)
    except BaseException:
        image.close()
        raise
    return image


def _check_size(image: Image.Image, limits: MediaLimits, field: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidInput(f"is {width} x {height} pixels", field=field)
    if max(width, height) > limits.max_side:
        raise TooLarge(f"is {width} x {height} pixels, the longest side allowed is {limits.max_side}", field=field)
    if width * height > limits.max_pixels:
        raise TooLarge(f"is {width} x {height} pixels, the limit is {limits.max_pixels} pixels", field=field)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise InvalidInput(
            f"is {width} x {height} pixels, narrower than the limit of {limits.max_aspect_ratio:g} to 1", field=field
        )


def _frame_notes(image: Image.Image) -> tuple[str, ...]:
    """Notes that give no number of frames: to count them Pillow reads all, a TIFF's in quadratic time."""
    if image.format == "MPO":  # a phone's JPEG with a preview or depth map behind it: the first picture is the photo
        return ()
    several = False
    with contextlib.suppress(Exception):  # a broken later frame: the first one decides
        several = getattr(image, "is_animated", False)
    with contextlib.suppress(Exception):
        image.seek(0)
    if not several:
        return ()
    return ("file of several pages: first one used" if image.format == "TIFF" else "animated image: first frame used",)


def _to_rgb(image: Image.Image, field: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts to RGB, with notes; an RGB image is not copied, which would take up to a quarter of a gigabyte."""
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image, field)
    if image.mode == "P" and image.palette is None:
        image = image.copy()  # a copy has an empty palette, which Pillow asks for
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB"), ()
    with_alpha = image if image.mode == "RGBA" else image.convert("RGBA")
    if with_alpha.getchannel("A").getextrema()[0] == 255:
        return with_alpha.convert("RGB"), ()
    on_white = Image.alpha_composite(Image.new("RGBA", with_alpha.size, (255, 255, 255, 255)), with_alpha)
    return on_white.convert("RGB"), (_ON_WHITE,)


def _wide_to_rgb(image: Image.Image, field: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts 16-bit, 32-bit and float grey: Pillow's convert clips at 255 and knows no transparent 16-bit level."""
    values_HW = np.asarray(image)
    low, high = float(values_HW.min()), float(values_HW.max())
    if not (math.isfinite(low) and math.isfinite(high)):  # both are NaN where any pixel is
        raise InvalidInput("has pixels that are not finite numbers", field=field)
    notes: tuple[str, ...] = ()
    subtract, multiply, divide = 0.0, 1.0, 1.0
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        divide = 257.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        multiply = 255.0
    elif low < 0 or high > 255:
        subtract, multiply = low, 255 / max(high - low, 1e-12)
        notes = (f"grey values from {low:g} to {high:g}: stretched to 0..255",)
    clear = image.info.get("transparency")
    grey_HW = np.empty(values_HW.shape, np.uint8)
    rows = max(1, _BLOCK_PIXELS // image.width)
    drawn = False
    for top in range(0, image.height, rows):
        block_HW = values_HW[top : top + rows]
        scaled_HW = (block_HW.astype(np.float64) - subtract) * multiply / divide
        grey_HW[top : top + rows] = np.clip(np.rint(scaled_HW), 0, 255)
        if isinstance(clear, int):
            is_clear_HW = block_HW == clear
            grey_HW[top : top + rows][is_clear_HW] = 255
            drawn |= bool(is_clear_HW.any())
    if drawn:
        notes = (*notes, _ON_WHITE)
    return Image.fromarray(grey_HW).convert("RGB"), notes
