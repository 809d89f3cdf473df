"""What charts, tables and distractors share: text set in a panel, and boxes filled at any render scale."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

from training.data.fonts import Box, bundled_font, lay_out, shift
from training.data.scenes import RGB

PAPER, INK = (252, 252, 252), (24, 24, 24)
LINE_PX = 1.0

Place = Callable[[tuple[int, int]], Box | None]
"""Finds room on the canvas for something of a (width, height), or None."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A short text on the canvas, in model pixels."""

    text: str
    font_px: int
    origin_xy: tuple[float, float]
    """Where the baseline starts."""
    box_xyxy: Box
    """The ink."""

    @property
    def glyph_boxes(self) -> tuple[Box, ...]:
        """The ink of each glyph."""
        return tuple(shift(glyph, self.origin_xy) for glyph in lay_out(self.text, self.font_px).glyph_boxes)


def set_text(text: str, font_px: int, centre_xy: tuple[float, float]) -> Text:
    """Text whose ink is centred across, and whose digits would be centred down: one baseline a row."""
    layout = lay_out(text, font_px)
    x0, _, x1, _ = layout.ink_box
    _, digit_top, _, digit_bottom = lay_out("0", font_px).ink_box
    origin = (round(centre_xy[0] - (x0 + x1) / 2, 2), round(centre_xy[1] - (digit_top + digit_bottom) / 2, 2))
    return Text(text=text, font_px=font_px, origin_xy=origin, box_xyxy=shift(layout.ink_box, origin))


def text_width(text: str, font_px: int) -> float:
    """Width of the ink, in model pixels."""
    x0, _, x1, _ = lay_out(text, font_px).ink_box
    return x1 - x0


def draw_text(draw: ImageDraw.ImageDraw, text: Text, scale: float, ink: RGB = INK) -> None:
    """Draws glyph by glyph, so that the layout is the same at every scale; half-pixel sizes keep the fonts few."""
    font = bundled_font(round(2 * text.font_px * scale) / 2)
    x, y = text.origin_xy
    for pen, character in zip(lay_out(text.text, text.font_px).pens, text.text, strict=True):
        draw.text(((x + pen) * scale, y * scale), character, font=font, fill=ink, anchor="ls")


def fill_box(draw: ImageDraw.ImageDraw, box_xyxy: Box, scale: float, fill: RGB) -> None:
    """A filled rectangle of model pixels, at least one file pixel wide and high."""
    x0, y0, x1, y1 = (round(edge * scale) for edge in box_xyxy)
    draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=fill)


def draw_paper(draw: ImageDraw.ImageDraw, box_xyxy: Box, scale: float, line: RGB) -> None:
    """A white panel with a thin border."""
    x0, y0, x1, y1 = box_xyxy
    fill_box(draw, box_xyxy, scale, line)
    fill_box(draw, (x0 + LINE_PX, y0 + LINE_PX, x1 - LINE_PX, y1 - LINE_PX), scale, PAPER)
