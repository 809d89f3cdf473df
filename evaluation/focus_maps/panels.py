"""Drawings with captions, side by side and below each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from evaluation.focus_maps.drawing import KEPT_COLOUR

MARGIN_PX, GAP_PX = 28, 20
INK, FAINT, PAPER = (24, 24, 28), (96, 96, 104), (255, 255, 255)


def stacked(parts: Sequence[Image.Image], width: int) -> Image.Image:
    """The parts below each other on paper of this width, with margins."""
    sheet = Image.new("RGB", (width, sum(part.height + GAP_PX for part in parts) + 2 * MARGIN_PX - GAP_PX), PAPER)
    top = MARGIN_PX
    for part in parts:
        sheet.paste(part, (MARGIN_PX, top))
        top += part.height + GAP_PX
    return sheet


def tiled(panels: Sequence[Image.Image], columns: int, gap_px: int = GAP_PX) -> Image.Image:
    """Panels of equal width side by side, in rows of `columns`, each at the top of its row."""
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    step = panels[0].width + gap_px
    sheet = Image.new(
        "RGB", (step * min(columns, len(panels)) - gap_px, sum(heights) + gap_px * (len(rows) - 1)), PAPER
    )
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            sheet.paste(panel, (column * step, top))
        top += height + gap_px
    return sheet


def captioned(drawing: Image.Image, lines: Sequence[str], width: int, *, strong: bool = False) -> Image.Image:
    """A drawing under its caption, on paper of this width. strong: framed and its caption's first line underlined."""
    height = 22 * len(lines) + 4
    panel = Image.new("RGB", (width, height + drawing.height + 4), PAPER)
    draw = ImageDraw.Draw(panel)
    for number, line in enumerate(lines):
        draw.text((0, 22 * number), line, font=font_of(16 if number == 0 else 14), fill=FAINT if number else INK)
    panel.paste(drawing, (2, height + 2))
    if strong:
        draw.rectangle((0, height, drawing.width + 3, height + drawing.height + 3), outline=KEPT_COLOUR, width=3)
        length = draw.textlength(lines[0], font=font_of(16))
        draw.line((0, 20, length, 20), fill=KEPT_COLOUR, width=3)
    return panel


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, so that no machine draws with another; it knows Latin letters only."""
    return ImageFont.load_default(size)
