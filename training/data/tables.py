"""Small tables: rows named by words, columns by letters, two-digit numbers in the cells."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageDraw

from training.data.fonts import Box
from training.data.panels import LINE_PX, Place, Text, draw_paper, draw_text, fill_box, set_text, text_width

ROW_COUNT, COLUMN_COUNT = (2, 4), (1, 2)
COLUMN_NAMES: tuple[str, ...] = ("A", "B", "C")
FONTS_PX = (11, 12, 13, 14)
ROW_GAP_PX, COLUMN_GAP_PX = (4, 8), (6, 10)
"""Pixels added to the height and width of a cell's text."""
RULE, HEADER_FILLS = (160, 160, 160), ((226, 226, 226), (214, 222, 232), (234, 228, 214))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in model pixels. No word names two rows, no number is in two cells."""

    box_xyxy: Box
    rows: tuple[Text, ...]
    columns: tuple[Text, ...]
    """Names of the columns; empty in a list, which is a table of one column without a header."""
    cells: tuple[tuple[Text, ...], ...]
    """Cells by [row][column]."""
    rules: tuple[Box, ...]
    header: tuple[Box, tuple[int, int, int]] | None
    """Where the header row is, and its fill."""


def sample_table(rng: random.Random, place: Place, words: Sequence[str], numbers: Sequence[str]) -> Table | None:
    """A random table of these words and numbers where `place` finds room for it; None when there is none."""
    row_count, column_count = rng.randint(*ROW_COUNT), rng.randint(*COLUMN_COUNT)
    names = rng.sample(words, row_count)
    values = rng.sample(numbers, row_count * column_count)
    font_px = rng.choice(FONTS_PX)
    row_height = font_px + rng.randint(*ROW_GAP_PX)
    column_gap = rng.randint(*COLUMN_GAP_PX)
    name_width = round(max(text_width(name, font_px) for name in names)) + column_gap
    cell_width = round(max(text_width(value, font_px) for value in values)) + column_gap
    header_rows = 1 if column_count > 1 else 0
    box = place((name_width + column_count * cell_width, (header_rows + row_count) * row_height))
    if box is None:
        return None
    x0, y0, x1, y1 = box
    column_xs = [x0 + name_width + (column + 0.5) * cell_width for column in range(column_count)]
    row_ys = [y0 + (header_rows + row + 0.5) * row_height for row in range(row_count)]
    down = [x0 + name_width + column * cell_width for column in range(column_count)]
    across = [y0 + row * row_height for row in range(1, header_rows + row_count)]
    return Table(
        box_xyxy=box,
        rows=tuple(set_text(name, font_px, (x0 + name_width / 2, y)) for name, y in zip(names, row_ys, strict=True)),
        columns=tuple(
            set_text(name, font_px, (x, y0 + row_height / 2))
            for name, x in zip(COLUMN_NAMES, column_xs, strict=False)
            if header_rows
        ),
        cells=tuple(
            tuple(set_text(values[row * column_count + n], font_px, (x, y)) for n, x in enumerate(column_xs))
            for row, y in enumerate(row_ys)
        ),
        rules=(*((x, y0, x + LINE_PX, y1) for x in down), *((x0, y, x1, y + LINE_PX) for y in across)),
        header=((x0, y0, x1, y0 + row_height), rng.choice(HEADER_FILLS)) if header_rows else None,
    )


def draw_table(draw: ImageDraw.ImageDraw, table: Table, scale: float) -> None:
    """Paper, header, rules, then text."""
    draw_paper(draw, table.box_xyxy, scale, RULE)
    if table.header:
        (x0, y0, x1, y1), fill = table.header
        fill_box(draw, (x0 + LINE_PX, y0 + LINE_PX, x1 - LINE_PX, y1), scale, fill)
    for rule in table.rules:
        fill_box(draw, rule, scale, RULE)
    for text in (*table.rows, *table.columns, *(cell for row in table.cells for cell in row)):
        draw_text(draw, text, scale)
