"""Images from strangers: byte and pixel limits from the header alone, then decoding to RGB with notes for the user."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from services.common.errors import InvalidInput, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The only decoders that are ever tried. Pillow opens a phone's multi-picture JPEG with its JPEG plug-in too."""
_JPEG = ("JPEG", "MPO")
FORMATS_TEXT = "JPEG, PNG, WebP, GIF, BMP or TIFF"


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What is accepted; checked on the header, before any pixel is decoded."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 16_384
    """Pixels. The first two leave room for long pages; this bounds one row."""
    max_aspect_ratio: float = 100.0
    """Longer side over shorter side. Beyond it the shorter side would vanish in the feature map."""


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
    """Refuses what the header alone shows to be unusable: microseconds, no pixel is decoded.

    Raises:
        InvalidInput: empty, not one of our formats, a broken header, no pixels, or too narrow.
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
        try:
            image.load()
        except MemoryError:
            raise TooLarge("does not fit in memory when decoded", field=field) from None
        except Exception as error:  # decoders raise almost anything on damaged data
            raise InvalidInput(f"is a truncated or damaged {_name(image)} file", field=field) from error
        _check_size(image, limits, field)  # TIFF and GIF may change their size while loading
        upright = _upright(image)
        try:
            rgb, more = _to_rgb(upright, field)
        except (ValueError, OSError) as error:
            raise InvalidInput(f"has pixels of mode {image.mode}, which cannot be read", field=field) from error
    return OpenedImage(image=rgb, size_hw=stored_hw or (rgb.height, rgb.width), notes=(*notes, *more))


def _reduce(image: Image.Image, enough_hw: Callable[[tuple[int, int]], tuple[int, int]]) -> tuple[int, int]:
    """Has a JPEG decoded at reduced scale where that is enough; returns its upright height and width."""
    width, height = image.size
    turned = _is_turned(image)
    upright_hw = (width, height) if turned else (height, width)
    needed = enough_hw(upright_hw)
    image.draft(None, needed if turned else needed[::-1])  # type: ignore[arg-type]
    return upright_hw


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF has it stored on its side."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as in `_upright`
        return False


def _open_header(data: bytes, limits: MediaLimits, field: str) -> Image.Image:
    if not data:
        raise InvalidInput("has 0 bytes", field=field)
    if len(data) > limits.max_bytes:
        raise TooLarge(f"has {len(data)} bytes, the limit is {limits.max_bytes}", field=field)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"has more pixels than the limit of {limits.max_pixels}", field=field) from None
    except Exception as error:  # decoders raise almost anything on damaged data
        raise InvalidInput(f"is not a readable image; send {FORMATS_TEXT}", field=field) from error
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


def _name(image: Image.Image) -> str:
    return image.format or "image"


def _frame_notes(image: Image.Image) -> tuple[str, ...]:
    if image.format == "MPO":  # a phone's JPEG with a preview or depth map behind it: the first picture is the photo
        return ()
    try:
        frames = getattr(image, "n_frames", 1)
        image.seek(0)
    except Exception:  # a broken later frame: the first one decides below
        with contextlib.suppress(Exception):
            image.seek(0)
        return ()
    if frames <= 1:
        return ()
    if image.format == "TIFF":
        return (f"file of several pages: first of {frames} pages used",)
    return (f"animated image: first of {frames} frames used",)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing of the pixels
        return image.copy()


def _to_rgb(image: Image.Image, field: str) -> tuple[Image.Image, tuple[str, ...]]:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image, field)
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        lowest = with_alpha.getchannel("A").getextrema()[0]
        if lowest == 255:
            return with_alpha.convert("RGB"), ()
        canvas = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        canvas.alpha_composite(with_alpha)
        return canvas.convert("RGB"), ("transparent image: drawn on white",)
    return image.convert("RGB"), ()


def _wide_to_rgb(image: Image.Image, field: str) -> tuple[Image.Image, tuple[str, ...]]:
    """16-bit, 32-bit and float grey. Pillow's own convert would clip at 255."""
    values_HW = np.asarray(image).astype(np.float64)
    if not np.isfinite(values_HW).all():
        raise InvalidInput("has pixels that are not finite numbers", field=field)
    low, high = float(values_HW.min()), float(values_HW.max())
    notes: tuple[str, ...] = ()
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        values_HW = values_HW / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        values_HW = values_HW * 255
    elif low < 0 or high > 255:
        values_HW = (values_HW - low) * (255 / max(high - low, 1e-12))
        notes = (f"grey values from {low:g} to {high:g}: stretched to 0..255",)
    grey = Image.fromarray(np.clip(np.rint(values_HW), 0, 255).astype(np.uint8))
    return grey.convert("RGB"), notes
