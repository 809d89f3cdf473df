"""Salient things that no question is about: full of contrast and edges, without a colour, word or number to name."""

import random
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import ImageDraw

from training.data.fonts import Box
from training.data.panels import PAPER, Place, Text, draw_paper, draw_text, fill_box, set_text
from training.data.scenes import RGB

DistractorKind = Literal["checkers", "stripes", "confetti", "symbols"]
SIDE_PX = (30, 64)
GRAIN_PX = (4, 8)
CONFETTI_SHARE = 0.3
SYMBOLS = "#%&@?!*+=~$"
"""Glyphs as fine as a card's, with no letter or digit among them."""
SYMBOL_FONTS_PX = (11, 12, 13)
# None of these is a colour of the vocabulary.
DARK_FILLS: tuple[RGB, ...] = ((18, 18, 18), (70, 46, 30), (64, 64, 64))


@dataclass(frozen=True, kw_only=True)
class Distractor:
    """A panel of pattern or of symbols, in model pixels."""

    box_xyxy: Box
    kind: DistractorKind
    fill: RGB
    marks: tuple[Box, ...]
    """Boxes to fill on white paper."""
    symbols: tuple[Text, ...]


def sample_distractor(rng: random.Random, place: Place) -> Distractor | None:
    """A random distractor where `place` finds room for it; None when there is none."""
    kind, grain = rng.choice(get_args(DistractorKind)), rng.randint(*GRAIN_PX)
    columns, rows = (rng.randint(*SIDE_PX) // grain for _ in range(2))
    box = place((columns * grain, rows * grain))
    if box is None:
        return None
    x0, y0, x1, y1 = box
    marks: list[Box] = []
    symbols: list[Text] = []
    if kind == "stripes":
        marks = [(x, y0, x + grain, y1) for x in (x0 + column * grain for column in range(0, columns, 2))]
        if rng.random() < 0.5:
            marks = [(x0, y, x1, y + grain) for y in (y0 + row * grain for row in range(0, rows, 2))]
    elif kind == "symbols":
        font_px = rng.choice(SYMBOL_FONTS_PX)
        rows, columns = int((y1 - y0) // (font_px + 2)), int((x1 - x0) // (font_px + 2))
        for row in range(rows):
            for column in range(columns):
                centre = x0 + (column + 0.5) * (x1 - x0) / columns, y0 + (row + 0.5) * (y1 - y0) / rows
                symbols.append(set_text(rng.choice(SYMBOLS), font_px, centre))
    else:
        for row in range(rows):
            for column in range(columns):
                x, y = x0 + column * grain, y0 + row * grain
                if (row + column) % 2 == 0 if kind == "checkers" else rng.random() < CONFETTI_SHARE:
                    marks.append((x, y, x + grain, y + grain))
    return Distractor(box_xyxy=box, kind=kind, fill=rng.choice(DARK_FILLS), marks=tuple(marks), symbols=tuple(symbols))


def draw_distractor(draw: ImageDraw.ImageDraw, distractor: Distractor, scale: float) -> None:
    """White paper, then its marks or symbols."""
    if distractor.symbols:
        draw_paper(draw, distractor.box_xyxy, scale, distractor.fill)
    else:
        fill_box(draw, distractor.box_xyxy, scale, PAPER)
    for mark in distractor.marks:
        fill_box(draw, mark, scale, distractor.fill)
    for symbol in distractor.symbols:
        draw_text(draw, symbol, scale, distractor.fill)
