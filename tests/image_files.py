"""Image files made by hand, and the pixels that are read of them."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from services.common.media import open_image


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


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    return open_image(data).image.getpixel((x, y))
