"""Where the things of a poster are: what an oracle would look at, and what a selector should not.

Boxes are fractions of the image's width and height.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from training.data.fonts import Box
from training.data.posters import Poster

Content = Literal["glyph", "shape", "distractor", "panel"]


def content_boxes(poster: Poster) -> dict[Content, tuple[Box, ...]]:
    """Glyphs of cards and table, keys, bars and labels of the chart ("glyph"); shapes; distractors; all of cards,
    keypad, chart and table ("panel")."""
    panels = [card.box_xyxy for card in poster.scene.cards]
    panels += [panel.box_xyxy for panel in (poster.keypad, poster.chart, poster.table) if panel]
    glyphs = [card.text_box_xyxy for card in poster.scene.cards]
    if poster.keypad:
        glyphs += [key.box_xyxy for key in poster.keypad.keys]
    if poster.chart:
        glyphs += [bar.box_xyxy for bar in poster.chart.bars] + [tick.box_xyxy for tick in poster.chart.ticks]
    if poster.table:
        texts = (*poster.table.rows, *poster.table.columns, *(cell for row in poster.table.cells for cell in row))
        glyphs += [text.box_xyxy for text in texts]
    return {
        "glyph": _fractions(poster, glyphs),
        "shape": _fractions(poster, (shape.box_xyxy for shape in poster.scene.shapes)),
        "distractor": _fractions(poster, (distractor.box_xyxy for distractor in poster.distractors)),
        "panel": _fractions(poster, panels),
    }


def glyph_boxes(poster: Poster) -> tuple[Box, ...]:
    """The boxes that need full resolution."""
    return content_boxes(poster)["glyph"]


def _fractions(poster: Poster, boxes: Iterable[Box]) -> tuple[Box, ...]:
    width, height = poster.size_wh
    return tuple((x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in boxes)
