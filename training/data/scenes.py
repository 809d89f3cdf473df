"""Procedural scenes: a large, mostly empty canvas with a few cards of small text and a few filled shapes.

Coordinates are model pixels: where a scene lies once anyres has scaled its file onto a grid of 96 px tiles.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.data.fonts import Box, lay_out, shift
from training.data.vocabulary import COLOURS, NUMBERS, SHAPES, WORDS

RGB = tuple[int, int, int]

TILE_PX = 96
"""Side of one anyres tile, in model pixels."""

GRID_WEIGHTS: dict[tuple[int, int], float] = {
    (1, 1): 0.08,
    (1, 2): 0.06,
    (2, 1): 0.06,
    (2, 2): 0.16,
    (1, 3): 0.05,
    (3, 1): 0.05,
    (1, 4): 0.04,
    (4, 1): 0.04,
    (2, 3): 0.13,
    (3, 2): 0.13,
    (3, 3): 0.20,
}
"""(rows, columns) of the tile grid that a canvas is made for -> how often."""

MAX_SHRINK = 0.25
"""One side of the canvas is up to this share shorter than its grid, so aspect ratios vary and anyres pads."""

WHOLE_TEXT_PREFERENCE = 0.7
"""Share of the cards that are drawn again when a tile boundary cuts their text. Not 1: real text is cut too."""
WHOLE_TEXT_TRIES = 5

PLACEMENT_TRIES = 40
GAP_PX = 5

CARD_WIDTH_PX, CARD_HEIGHT_PX = (34, 56), (24, 34)
SHAPE_SIDE_PX = (20, 44)
FONT_SIZES_PX = (12, 13, 14, 15)
FILL_JITTER = 10
"""Largest change of a fill's RGB channel, of 255."""

BLACK, WHITE = (16, 16, 16), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Background:
    """A pale canvas: one tint, or a gradient to a second one, with faint noise."""

    colour: RGB
    end_colour: RGB
    noise_amplitude: int
    """Largest change of a channel by noise, of 255; 0 is none."""
    noise_seed: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """A coloured rectangle that shows a two-digit number or a short word."""

    box_xyxy: Box
    colour: str
    fill: RGB
    """The colour as drawn, with its jitter."""
    text: str
    kind: Literal["number", "word"]
    ink: RGB
    font_px: int
    origin_xy: tuple[float, float]
    """Where the text's baseline starts."""
    text_box_xyxy: Box
    glyph_boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A filled shape."""

    box_xyxy: Box
    colour: str
    fill: RGB
    shape: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one image shows, in full: rendering it and asking about it draw on nothing else."""

    size_wh: tuple[int, int]
    background: Background
    cards: tuple[Card, ...]
    shapes: tuple[Shape, ...]
    render_scale: float
    """Pixels of the image file for one model pixel."""

    @property
    def objects(self) -> tuple[Card | Shape, ...]:
        """Cards, then shapes."""
        return (*self.cards, *self.shapes)


def sample_scene(rng: random.Random) -> Scene:
    """A random scene."""
    rows, columns = rng.choices(list(GRID_WEIGHTS), weights=list(GRID_WEIGHTS.values()))[0]
    width, height = columns * TILE_PX, rows * TILE_PX
    shrink = 1 - rng.uniform(0, MAX_SHRINK)
    if rng.random() < 0.5:
        width = round(width * shrink)
    else:
        height = round(height * shrink)

    # A small canvas has little room, and detail has to stay a small part of it.
    tiles = rows * columns
    if tiles == 1:
        card_count, shape_count = rng.choice([(1, 0), (1, 1), (1, 1), (2, 0)])
    elif tiles == 2:
        card_count, shape_count = rng.randint(1, 2), rng.randint(0, 2)
    else:
        card_count, shape_count = rng.randint(2, 4), rng.randint(1, 3)

    cards, shapes = place_objects(
        rng, (width, height), card_count, shape_count, tile_lines=inner_tile_lines((width, height), (rows, columns))
    )
    return Scene(
        size_wh=(width, height),
        background=sample_background(rng),
        cards=cards,
        shapes=shapes,
        render_scale=sample_render_scale(rng, rows, columns),
    )


def sample_background(rng: random.Random) -> Background:
    """A pale tint; sometimes a gradient, sometimes faint noise."""
    colour = _pale(rng)
    return Background(
        colour=colour,
        end_colour=_pale(rng) if rng.random() < 0.15 else colour,
        noise_amplitude=rng.randint(2, 8) if rng.random() < 0.15 else 0,
        noise_seed=rng.getrandbits(32),
    )


def place_objects(
    rng: random.Random,
    size_wh: tuple[int, int],
    card_count: int,
    shape_count: int,
    tile_lines: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> tuple[tuple[Card, ...], tuple[Shape, ...]]:
    """Cards and shapes that do not overlap; an object that finds no room is left out.

    Colours are unique among the cards and among the shapes, and so are texts and kinds of shape, so that a
    question can name one object. `tile_lines` are the x and y of the boundaries that text should not cross.
    """
    taken: list[Box] = []
    cards: list[Card] = []
    shapes: list[Shape] = []
    numbers, words = rng.sample(NUMBERS, card_count), rng.sample(WORDS, card_count)
    for colour, number, word in zip(rng.sample(list(COLOURS), card_count), numbers, words, strict=True):
        kind: Literal["number", "word"] = "number" if rng.random() < 0.5 else "word"
        text = str(number) if kind == "number" else word
        card = sample_card(rng, size_wh, taken, colour, kind, text)
        if rng.random() < WHOLE_TEXT_PREFERENCE:
            for _ in range(WHOLE_TEXT_TRIES):
                if card is None or not is_cut(card.text_box_xyxy, tile_lines):
                    break
                card = sample_card(rng, size_wh, taken, colour, kind, text) or card
        if card is not None:
            cards.append(card)
            taken.append(card.box_xyxy)
    for colour, shape in zip(rng.sample(list(COLOURS), shape_count), rng.sample(SHAPES, shape_count), strict=True):
        side = rng.randint(*SHAPE_SIDE_PX)
        box = free_box(rng, size_wh, (side, side), taken)
        if box is not None:
            shapes.append(Shape(box_xyxy=box, colour=colour, fill=jittered(rng, COLOURS[colour]), shape=shape))
            taken.append(box)
    return tuple(cards), tuple(shapes)


def sample_card(
    rng: random.Random,
    size_wh: tuple[int, int],
    taken: list[Box],
    colour: str,
    kind: Literal["number", "word"],
    text: str,
) -> Card | None:
    font_px = rng.choice(FONT_SIZES_PX)
    layout = lay_out(text, font_px)
    ink_x0, ink_y0, ink_x1, ink_y1 = layout.ink_box
    text_width, text_height = ink_x1 - ink_x0, ink_y1 - ink_y0
    width = rng.randint(max(CARD_WIDTH_PX[0], round(text_width) + 8), max(CARD_WIDTH_PX[1], round(text_width) + 8))
    height = rng.randint(*CARD_HEIGHT_PX)
    box = free_box(rng, size_wh, (width, height), taken)
    if box is None:
        return None
    # The text's place on the card jitters, with at least 3 px of card around it.
    left = box[0] + (width - text_width) / 2 + _jitter(rng, min(5, (width - text_width) / 2 - 3))
    top = box[1] + (height - text_height) / 2 + _jitter(rng, min(4, (height - text_height) / 2 - 3))
    origin = (round(left - ink_x0, 2), round(top - ink_y0, 2))
    fill = jittered(rng, COLOURS[colour])
    return Card(
        box_xyxy=box,
        colour=colour,
        fill=fill,
        text=text,
        kind=kind,
        ink=ink_on(fill),
        font_px=font_px,
        origin_xy=origin,
        text_box_xyxy=shift(layout.ink_box, origin),
        glyph_boxes=tuple(shift(glyph, origin) for glyph in layout.glyph_boxes),
    )


def free_box(rng: random.Random, size_wh: tuple[int, int], object_wh: tuple[int, int], taken: list[Box]) -> Box | None:
    """A random place on the canvas that keeps GAP_PX to everything taken; None when none was found."""
    (canvas_width, canvas_height), (width, height) = size_wh, object_wh
    if width + 2 > canvas_width or height + 2 > canvas_height:
        return None
    for _ in range(PLACEMENT_TRIES):
        x = rng.randint(1, canvas_width - width - 1)
        y = rng.randint(1, canvas_height - height - 1)
        if all(
            x >= x1 + GAP_PX or x + width + GAP_PX <= x0 or y >= y1 + GAP_PX or y + height + GAP_PX <= y0
            for x0, y0, x1, y1 in taken
        ):
            return (x, y, x + width, y + height)
    return None


def inner_tile_lines(size_wh: tuple[int, int], grid: tuple[int, int]) -> tuple[list[float], list[float]]:
    """x and y of the inner tile boundaries on the canvas; anyres centres the image on its grid."""
    (width, height), (rows, columns) = size_wh, grid
    x_offset, y_offset = (columns * TILE_PX - width) / 2, (rows * TILE_PX - height) / 2
    return (
        [column * TILE_PX - x_offset for column in range(1, columns)],
        [row * TILE_PX - y_offset for row in range(1, rows)],
    )


def is_cut(box: Box, tile_lines: tuple[Sequence[float], Sequence[float]]) -> bool:
    x_lines, y_lines = tile_lines
    return any(box[0] < x < box[2] for x in x_lines) or any(box[1] < y < box[3] for y in y_lines)


def sample_render_scale(rng: random.Random, rows: int, columns: int) -> float:
    # Anyres gives a larger file a larger grid while one exists, so a small canvas drawn large is seen enlarged and
    # no longer shows a small grid. Only canvases that fill the largest grids are freely high-resolution files.
    if rows * columns <= 4 and max(rows, columns) < 4:
        return 1.0 if rng.random() < 0.85 else round(rng.uniform(1.0, 1.5), 2)
    return round(rng.uniform(1.0, 1.5) if rng.random() < 0.7 else rng.uniform(1.5, 4.0), 2)


def _pale(rng: random.Random) -> RGB:
    return rng.randint(226, 255), rng.randint(226, 255), rng.randint(226, 255)


def jittered(rng: random.Random, colour: RGB) -> RGB:
    red, green, blue = (min(255, max(0, channel + rng.randint(-FILL_JITTER, FILL_JITTER))) for channel in colour)
    return red, green, blue


def ink_on(fill: RGB) -> RGB:
    """Black or white, whichever can be read on a fill."""
    luma = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    return BLACK if luma > 125 else WHITE


def _jitter(rng: random.Random, reach: float) -> float:
    return rng.uniform(-reach, reach)
