"""Posters: large, mostly empty images with cards, shapes, a keypad, chart or table, and what nobody asks about.

What a benchmark's splits need is decided here. Each poster takes its words from one group and its numbers from another,
so every word and number in it make a pair of its own split, and each poster has a card of either kind: no pair and no
image can be in two splits.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from PIL import Image, ImageDraw

from training.data.charts import Chart, draw_chart, sample_chart
from training.data.distractors import Distractor, draw_distractor, sample_distractor
from training.data.fonts import Box
from training.data.keypads import Keypad, draw_keypad, sample_keypad
from training.data.pairs import PosterSplit, cells_of, number_groups, word_groups
from training.data.panels import Place
from training.data.rendering import render
from training.data.scenes import (
    MAX_SHRINK,
    SHAPE_SIDE_PX,
    TILE_PX,
    WHOLE_TEXT_PREFERENCE,
    WHOLE_TEXT_TRIES,
    Card,
    Scene,
    Shape,
    free_box,
    inner_tile_lines,
    is_cut,
    jittered,
    sample_background,
    sample_card,
    sample_render_scale,
)
from training.data.tables import Table, draw_table, sample_table
from training.data.textures import often_textured
from training.data.vocabulary import COLOURS, SHAPES

POSTER_GRID_WEIGHTS: dict[tuple[int, int], float] = {
    (1, 2): 0.02,
    (2, 1): 0.02,
    (1, 3): 0.03,
    (3, 1): 0.03,
    (1, 4): 0.04,
    (4, 1): 0.04,
    (2, 2): 0.1,
    (2, 3): 0.14,
    (3, 2): 0.14,
    (3, 3): 0.44,
}
"""(rows, columns) of the tile grid that a poster is made for -> how often."""

PANELS = ("keypad", "chart", "table")
PANEL_SHARE = 0.8
"""How often a poster tries for each of its panels."""
WHOLE_PANEL_PREFERENCE, WHOLE_PANEL_TRIES = 0.75, 60
"""Share of the panels that are placed again when a tile boundary cuts them, and how often: a tile of 96 px is small
for a panel, where CLIP's 336 px hold one. Not 1: some are cut there too."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Fewest and most of what a poster tries to hold."""

    panels: int
    """Most of keypad, chart and table together."""
    number_cards: tuple[int, int]
    word_cards: tuple[int, int]
    shapes: tuple[int, int]
    distractors: tuple[int, int]


CONTENTS: dict[int, Contents] = {
    2: Contents(panels=0, number_cards=(1, 1), word_cards=(1, 1), shapes=(0, 1), distractors=(0, 1)),
    4: Contents(panels=1, number_cards=(1, 1), word_cards=(1, 1), shapes=(0, 2), distractors=(0, 1)),
    6: Contents(panels=1, number_cards=(1, 2), word_cards=(1, 2), shapes=(1, 2), distractors=(1, 2)),
    9: Contents(panels=1, number_cards=(1, 2), word_cards=(1, 2), shapes=(1, 3), distractors=(1, 3)),
}
"""Most tiles -> contents, so that a poster of any size is mostly empty."""


@dataclass(frozen=True, kw_only=True)
class Poster:
    """What one image shows, in full: rendering it and asking about it draw on nothing else."""

    scene: Scene
    """Canvas, cards and shapes."""
    keypad: Keypad | None
    chart: Chart | None
    table: Table | None
    distractors: tuple[Distractor, ...]

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in model pixels."""
        return self.scene.size_wh

    @property
    def render_scale(self) -> float:
        """Pixels of the image file for one model pixel."""
        return self.scene.render_scale

    @property
    def words(self) -> frozenset[str]:
        """Every word that can be read in the image."""
        rows = self.table.rows if self.table else ()
        return frozenset({card.text for card in self.scene.cards if card.kind == "word"} | {row.text for row in rows})

    @property
    def numbers(self) -> frozenset[str]:
        """Every two-digit number that can be read in the image."""
        cells = [cell.text for row in self.table.cells for cell in row] if self.table else []
        return frozenset({card.text for card in self.scene.cards if card.kind == "number"} | set(cells))


def poster_at(split: PosterSplit, seed: int, index: int, accept: Callable[[Poster], bool] = lambda _: True) -> Poster:
    """The first accepted among the posters that (split, seed, index) gives. Raises ValueError for an unknown split."""
    for attempt in itertools.count():
        # A string seeds through SHA-512: the same on every machine and Python.
        poster = sample_poster(random.Random(f"poster/{split}/{seed}/{index}/{attempt}"), split)
        if {card.kind for card in poster.scene.cards} == {"number", "word"} and accept(poster):
            return poster
    raise AssertionError("unreachable: the count is endless")


def textured_poster_at(
    split: PosterSplit, seed: int, index: int, accept: Callable[[Poster], bool] = lambda _: True
) -> Poster:
    """The poster of `poster_at`, often on a background with a pattern; all else is the same."""
    poster = poster_at(split, seed, index, accept)
    rng = random.Random(f"background/{split}/{seed}/{index}")
    return replace(poster, scene=replace(poster.scene, background=often_textured(rng, poster.scene.background)))


def sample_poster(rng: random.Random, split: PosterSplit) -> Poster:
    """A random poster of a split. Things that find no room are left out; panels, the largest, are placed first."""
    word_group, number_group = rng.choice(cells_of(split))
    words, numbers = word_groups()[word_group], number_groups()[number_group]
    rows, columns = rng.choices(list(POSTER_GRID_WEIGHTS), weights=list(POSTER_GRID_WEIGHTS.values()))[0]
    contents = CONTENTS[min(tiles for tiles in CONTENTS if tiles >= rows * columns)]
    width, height = columns * TILE_PX, rows * TILE_PX
    shrink = 1 - rng.uniform(0, MAX_SHRINK)
    if rng.random() < 0.5:
        width = round(width * shrink)
    else:
        height = round(height * shrink)

    taken: list[Box] = []
    place = partial(_place, rng, (width, height), taken)
    panels = [name for name in rng.sample(PANELS, contents.panels) if rng.random() < PANEL_SHARE]
    place_panel = partial(_place_panel, rng, (width, height), taken, inner_tile_lines((width, height), (rows, columns)))
    keypad = sample_keypad(rng, place_panel) if "keypad" in panels else None
    chart = sample_chart(rng, place_panel) if "chart" in panels else None
    table = sample_table(rng, place_panel, words, numbers) if "table" in panels else None
    texts = (
        rng.sample(numbers, rng.randint(*contents.number_cards)),
        rng.sample(words, rng.randint(*contents.word_cards)),
    )
    cards = _sample_cards(rng, (width, height), (rows, columns), taken, *texts)
    shapes = _sample_shapes(rng, place, rng.randint(*contents.shapes))
    distractors = [sample_distractor(rng, place) for _ in range(rng.randint(*contents.distractors))]
    scene = Scene(
        size_wh=(width, height),
        background=sample_background(rng),
        cards=cards,
        shapes=shapes,
        render_scale=sample_render_scale(rng, rows, columns),
    )
    shown = tuple(distractor for distractor in distractors if distractor)
    return Poster(scene=scene, keypad=keypad, chart=chart, table=table, distractors=shown)


def render_poster(poster: Poster) -> Image.Image:
    """The image file of a poster: size_wh times render_scale, RGB."""
    image = render(poster.scene)
    draw = ImageDraw.Draw(image)
    for distractor in poster.distractors:
        draw_distractor(draw, distractor, poster.render_scale)
    if poster.keypad:
        draw_keypad(draw, poster.keypad, poster.render_scale)
    if poster.chart:
        draw_chart(draw, poster.chart, poster.render_scale)
    if poster.table:
        draw_table(draw, poster.table, poster.render_scale)
    return image


def _place(rng: random.Random, canvas_wh: tuple[int, int], taken: list[Box], object_wh: tuple[int, int]) -> Box | None:
    box = free_box(rng, canvas_wh, object_wh, taken)
    if box is not None:
        taken.append(box)
    return box


def _place_panel(
    rng: random.Random,
    canvas_wh: tuple[int, int],
    taken: list[Box],
    tile_lines: tuple[list[float], list[float]],
    object_wh: tuple[int, int],
) -> Box | None:
    tries = WHOLE_PANEL_TRIES if rng.random() < WHOLE_PANEL_PREFERENCE else 1
    for _ in range(tries):
        box = free_box(rng, canvas_wh, object_wh, taken)
        if box is None or not is_cut(box, tile_lines):
            break
    if box is not None:
        taken.append(box)
    return box


def _sample_cards(
    rng: random.Random,
    size_wh: tuple[int, int],
    grid: tuple[int, int],
    taken: list[Box],
    numbers: list[str],
    words: list[str],
) -> tuple[Card, ...]:
    """Cards that differ in colour and in text; a tile boundary seldom cuts their text."""
    asked: list[tuple[Literal["number", "word"], str]] = [("number", text) for text in numbers]
    asked += [("word", text) for text in words]
    lines = inner_tile_lines(size_wh, grid)
    cards = []
    for (kind, text), colour in zip(asked, rng.sample(list(COLOURS), len(asked)), strict=True):
        tries = WHOLE_TEXT_TRIES if rng.random() < WHOLE_TEXT_PREFERENCE else 0
        card = sample_card(rng, size_wh, taken, colour, kind, text)
        while card is not None and tries and is_cut(card.text_box_xyxy, lines):
            card, tries = sample_card(rng, size_wh, taken, colour, kind, text) or card, tries - 1
        if card is not None:
            cards.append(card)
            taken.append(card.box_xyxy)
    return tuple(cards)


def _sample_shapes(rng: random.Random, place: Place, count: int) -> tuple[Shape, ...]:
    shapes = []
    for colour, shape in zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count), strict=True):
        side = rng.randint(*SHAPE_SIDE_PX)
        box = place((side, side))
        if box is not None:
            shapes.append(Shape(box_xyxy=box, colour=colour, fill=jittered(rng, COLOURS[colour]), shape=shape))
    return tuple(shapes)
