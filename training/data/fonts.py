"""Text layout with Pillow's bundled font: the box of each glyph, the same at every render scale."""

from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageFont

Box = tuple[float, float, float, float]
"""A box as (x0, y0, x1, y1)."""


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """Where the glyphs of a text lie, from the start of its baseline."""

    pens: tuple[float, ...]
    """x at which each glyph is drawn."""
    glyph_boxes: tuple[Box, ...]
    """The ink of each glyph."""
    ink_box: Box


@lru_cache(maxsize=512)
def bundled_font(size_px: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that no machine draws the scenes with another."""
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so the scenes' text cannot be drawn")
    return font


@lru_cache(maxsize=4096)
def lay_out(text: str, font_px: int) -> TextLayout:
    """Glyphs set one after the other: no kerning, so a layout scales exactly."""
    font = bundled_font(font_px)
    pens: list[float] = []
    glyph_boxes: list[Box] = []
    pen = 0.0
    for character in text:
        pens.append(pen)
        glyph_boxes.append(shift(font.getbbox(character, anchor="ls"), (pen, 0.0)))
        pen = round(pen + font.getlength(character), 2)
    x0s, y0s, x1s, y1s = zip(*glyph_boxes, strict=True)
    return TextLayout(
        pens=tuple(pens), glyph_boxes=tuple(glyph_boxes), ink_box=(min(x0s), min(y0s), max(x1s), max(y1s))
    )


def shift(box: Box, by_xy: tuple[float, float]) -> Box:
    """The box moved by (dx, dy)."""
    (x0, y0, x1, y1), (dx, dy) = box, by_xy
    return round(x0 + dx, 2), round(y0 + dy, 2), round(x1 + dx, 2), round(y1 + dy, 2)
