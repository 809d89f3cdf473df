"""Labelled 96 px tiles: the dense supervision that stands in for CLIP's pre-training of the vision tower.

A label lies only on the patches that show its evidence, so that features learn to keep detail local.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.data.charts import TOP_VALUE, Chart
from training.data.fonts import Box
from training.data.keypads import Keypad
from training.data.posters import Poster, render_poster, sample_poster
from training.data.rendering import fill_shape, render
from training.data.scenes import TILE_PX, Card, Scene, place_objects, sample_background, sample_scene
from training.data.tables import COLUMN_NAMES, Table
from training.data.vocabulary import COLOURS, SHAPES, WORDS

PATCH_PX = 12
GRID = TILE_PX // PATCH_PX
IGNORE = -100
"""PyTorch's ignore_index: nothing is asked of this patch."""

KIND_NAMES: tuple[str, ...] = ("background", "number card", "word card", *SHAPES, "chart", "bar", "table", "key")
COLOUR_NAMES: tuple[str, ...] = ("none", *COLOURS)
LABEL_CLASSES: dict[str, int] = {
    "kind": len(KIND_NAMES),
    "colour": len(COLOUR_NAMES),
    "tens": 10,
    "ones": 10,
    "word": len(WORDS),
    "letter": len(COLUMN_NAMES),
    "digit": 10,
    "row word": len(WORDS),
    "column letter": len(COLUMN_NAMES),
    "value": TOP_VALUE[1],
    "row": GRID,
    "column": GRID,
}
"""Name of each label -> number of its classes. A table's cell has the names of its row and column too, which are
elsewhere; "row" and "column" are the patch's own, for where things are is asked too."""

EMPTY_SHARE, THUMBNAIL_SHARE, PANEL_SHARE = 0.05, 0.15, 0.55
"""Shares of all tiles: empty, a whole image squeezed, or cut from a poster around its keypad, chart or table."""
ENLARGED_SHARE = 0.1
"""Share of tiles with glyphs up to twice their size, as when anyres enlarges a small file."""
PADDED_SHARE = 0.1
"""Share of tiles with a black band, as anyres pads."""
DOWNSCALED_SHARE = 0.25
"""Share of tiles drawn twice as large and scaled down, as anyres does with large files."""

DENSE_CANVAS_PX = 160
OBJECT_COVERAGE = 0.35
"""An object owns a patch when it covers this much of it, and more than any other."""
VISIBLE_GLYPH = 0.6
"""A glyph is labelled when this much of it is inside the tile."""
VISIBLE_CHART = 0.95
"""A bar's value is labelled when this much of the chart is: it is read against the axis."""

Labels = dict[str, NDArray[np.int64]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """How a scene's model pixels land on a tile: x * scale - offset, seen through a window."""

    scale_xy: tuple[float, float]
    offset_xy: tuple[float, float] = (0.0, 0.0)
    window: Box = (0, 0, TILE_PX, TILE_PX)

    def box_on_tile(self, box: Box) -> Box:
        (sx, sy), (dx, dy), (x0, y0, x1, y1) = self.scale_xy, self.offset_xy, box
        return x0 * sx - dx, y0 * sy - dy, x1 * sx - dx, y1 * sy - dy


def labelled_tile(rng: random.Random) -> tuple[Image.Image, Labels]:
    """One 96 px tile and its labels, each int64 [64] in row-major patch order."""
    draw = rng.random()
    if draw < EMPTY_SHARE:
        return _cut_from(rng, card_count=0, shape_count=0)
    if draw < EMPTY_SHARE + THUMBNAIL_SHARE:
        return _thumbnail(rng)
    if draw < EMPTY_SHARE + THUMBNAIL_SHARE + PANEL_SHARE:
        return _cut_around_panel(rng)
    return _cut_from(rng, card_count=rng.randint(5, 7), shape_count=rng.randint(2, 4))


def tile_batch(seed: int, step: int, batch_size: int) -> dict[str, NDArray]:
    """`pixels` uint8 [B, 96, 96, 3] and the labels int64 [B, 64]; the same for the same (seed, step)."""
    tiles = [labelled_tile(random.Random(f"{seed}/{step}/{index}")) for index in range(batch_size)]
    batch: dict[str, NDArray] = {"pixels": np.stack([np.asarray(image) for image, _ in tiles])}
    for name in LABEL_CLASSES:
        batch[name] = np.stack([labels[name] for _, labels in tiles])
    return batch


def label_patches(scene: Scene, view: View, *, read_text: bool = True) -> Labels:
    """The labels of the tile that `view` cuts from a scene. Without `read_text` no glyph is labelled.

    A card's kind is ignored where too little of its text is inside to tell a number from a word.
    """
    labels = {name: np.full((GRID, GRID), IGNORE, dtype=np.int64) for name in LABEL_CLASSES}
    labels["kind"][:] = 0
    labels["colour"][:] = 0
    labels["row"][:], labels["column"][:] = np.indices((GRID, GRID))
    covered = _coverage(scene, view)
    owner = covered.argmax(0)
    for index, thing in enumerate(scene.objects):
        owned = (owner == index) & (covered[index] >= OBJECT_COVERAGE)
        if not owned.any():
            continue
        labels["colour"][owned] = COLOUR_NAMES.index(thing.colour)
        if isinstance(thing, Card):
            text_is_seen = _visible_share(view, thing.text_box_xyxy) >= 0.3
            labels["kind"][owned] = KIND_NAMES.index(f"{thing.kind} card") if text_is_seen else IGNORE
        else:
            labels["kind"][owned] = KIND_NAMES.index(thing.shape)
    if read_text:
        for card in scene.cards:
            label_text = _label_number if card.kind == "number" else _label_word
            label_text(labels, card.text, card.glyph_boxes, view)
    return {name: array.reshape(-1) for name, array in labels.items()}


def label_poster(poster: Poster, view: View, *, read_text: bool = True) -> Labels:
    """`label_patches` of the poster's scene, then of its keypad, chart and table."""
    flat = label_patches(poster.scene, view, read_text=read_text)
    labels = {name: array.reshape(GRID, GRID) for name, array in flat.items()}
    if poster.keypad:
        _label_keypad(labels, poster.keypad, view, read_text)
    if poster.chart:
        _label_chart(labels, poster.chart, view, read_text)
    if poster.table:
        _label_table(labels, poster.table, view, read_text)
    return {name: array.reshape(-1) for name, array in labels.items()}


def _cut_from(rng: random.Random, card_count: int, shape_count: int) -> tuple[Image.Image, Labels]:
    """A tile cut from a canvas denser than any scene: most tiles show several glyphs, some of them cut."""
    cards, shapes = place_objects(rng, (DENSE_CANVAS_PX, DENSE_CANVAS_PX), card_count, shape_count)
    scale = rng.uniform(1.3, 2.0) if rng.random() < ENLARGED_SHARE else rng.uniform(0.7, 1.3)
    oversampling = 2 if rng.random() < DOWNSCALED_SHARE else 1
    scene = Scene(
        size_wh=(DENSE_CANVAS_PX, DENSE_CANVAS_PX),
        background=sample_background(rng),
        cards=cards,
        shapes=shapes,
        render_scale=scale * oversampling,
    )
    last = int(DENSE_CANVAS_PX * scale) - TILE_PX
    x, y = rng.randint(0, last), rng.randint(0, last)
    left, top, side = x * oversampling, y * oversampling, TILE_PX * oversampling
    tile = render(scene).crop((left, top, left + side, top + side))
    if oversampling > 1:
        tile = tile.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    window = _padded_window(rng) if rng.random() < PADDED_SHARE else (0, 0, TILE_PX, TILE_PX)
    if window != (0, 0, TILE_PX, TILE_PX):
        padded = Image.new("RGB", tile.size)
        padded.paste(tile.crop(window), window[:2])
        tile = padded
    view = View(scale_xy=(scale, scale), offset_xy=(x, y), window=window)
    return tile, label_patches(scene, view)


def _cut_around_panel(rng: random.Random) -> tuple[Image.Image, Labels]:
    """A tile of a poster that holds the middle of its keypad, chart or table."""
    poster = _poster_with_panel(rng)
    panel = rng.choice([panel for panel in (poster.keypad, poster.chart, poster.table) if panel])
    scale = rng.uniform(0.8, 1.3)
    poster = _at_scale(poster, scale)
    image = render_poster(poster)
    x0, y0, x1, y1 = (edge * scale for edge in panel.box_xyxy)
    # Mostly whole where a tile can hold it, as its questions need.
    spare = [max(8.0, (TILE_PX - side) / 2 + 6) for side in (x1 - x0, y1 - y0)]
    x, y = (
        min(max(0, round(middle + rng.uniform(-room, room) - TILE_PX / 2)), max(0, size - TILE_PX))
        for middle, room, size in zip(((x0 + x1) / 2, (y0 + y1) / 2), spare, image.size, strict=True)
    )
    window = (0, 0, min(TILE_PX, image.width), min(TILE_PX, image.height))
    view = View(scale_xy=(scale, scale), offset_xy=(x, y), window=window)
    return image.crop((x, y, x + TILE_PX, y + TILE_PX)), label_poster(poster, view)


def _poster_with_panel(rng: random.Random) -> Poster:
    while True:
        poster = sample_poster(rng, "train")
        if poster.keypad or poster.chart or poster.table:
            return poster


def _at_scale(poster: Poster, scale: float) -> Poster:
    return dataclasses.replace(poster, scene=dataclasses.replace(poster.scene, render_scale=scale))


def _thumbnail(rng: random.Random) -> tuple[Image.Image, Labels]:
    """A whole image squeezed into one tile, as anyres makes the base tile; its text is too small to ask for."""
    if rng.random() < 0.5:
        poster = _at_scale(sample_poster(rng, "train"), 1.0)
        image, (width, height) = render_poster(poster), poster.size_wh
        view = View(scale_xy=(TILE_PX / width, TILE_PX / height))
        labels = label_poster(poster, view, read_text=False)
    else:
        scene = dataclasses.replace(sample_scene(rng), render_scale=1.0)
        image, (width, height) = render(scene), scene.size_wh
        view = View(scale_xy=(TILE_PX / width, TILE_PX / height))
        labels = label_patches(scene, view, read_text=False)
    return image.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC), labels


def _padded_window(rng: random.Random) -> tuple[int, int, int, int]:
    band = rng.randint(4, 36)
    return rng.choice(
        [
            (band, 0, TILE_PX, TILE_PX),
            (0, band, TILE_PX, TILE_PX),
            (0, 0, TILE_PX - band, TILE_PX),
            (0, 0, TILE_PX, TILE_PX - band),
        ]
    )


def _coverage(scene: Scene, view: View) -> NDArray[np.float64]:
    """Share of each patch that each object covers, [objects (at least one row), GRID, GRID]."""
    canvas = Image.new("L", (TILE_PX, TILE_PX))
    draw = ImageDraw.Draw(canvas)
    for index, thing in enumerate(scene.objects):
        x0, y0, x1, y1 = (round(edge) for edge in view.box_on_tile(thing.box_xyxy))
        fill_shape(draw, "square" if isinstance(thing, Card) else thing.shape, (x0, y0, x1, y1), fill=index + 1)
    owners = np.zeros((TILE_PX, TILE_PX), dtype=np.uint8)
    left, top, right, bottom = (round(edge) for edge in view.window)
    owners[top:bottom, left:right] = np.asarray(canvas)[top:bottom, left:right]
    patches = owners.reshape(GRID, PATCH_PX, GRID, PATCH_PX)
    rows = [(patches == index + 1).mean((1, 3)) for index in range(max(1, len(scene.objects)))]
    return np.stack(rows)


def _label_number(labels: Labels, text: str, glyph_boxes: Sequence[Box], view: View) -> None:
    for name, digit, glyph in zip(("tens", "ones"), text, glyph_boxes, strict=True):
        if _visible_share(view, glyph) >= VISIBLE_GLYPH:
            labels[name][_patches_showing(view, glyph)] = int(digit)


def _label_word(labels: Labels, text: str, glyph_boxes: Sequence[Box], view: View) -> None:
    if all(_visible_share(view, glyph) >= VISIBLE_GLYPH for glyph in glyph_boxes):
        x0s, y0s, x1s, y1s = zip(*glyph_boxes, strict=True)
        labels["word"][_patches_showing(view, (min(x0s), min(y0s), max(x1s), max(y1s)))] = WORDS.index(text)


def _label_keypad(labels: Labels, keypad: Keypad, view: View, read_text: bool) -> None:
    overlaps = np.stack([_overlap(view, key.box_xyxy) for key in keypad.keys])
    owner = overlaps.argmax(0)
    for index, key in enumerate(keypad.keys):
        owned = (owner == index) & (overlaps[index] >= OBJECT_COVERAGE * PATCH_PX**2)
        labels["kind"][owned], labels["colour"][owned] = KIND_NAMES.index("key"), COLOUR_NAMES.index(key.colour)
        if read_text and _visible_share(view, key.digit.box_xyxy) >= VISIBLE_GLYPH:
            labels["digit"][_patches_showing(view, key.digit.box_xyxy)] = int(key.digit.text)


def _label_chart(labels: Labels, chart: Chart, view: View, read_values: bool) -> None:
    owned = _overlap(view, chart.box_xyxy) >= OBJECT_COVERAGE * PATCH_PX**2
    labels["kind"][owned], labels["colour"][owned] = KIND_NAMES.index("chart"), 0
    overlaps = np.stack([_overlap(view, bar.box_xyxy) for bar in chart.bars])
    owner = overlaps.argmax(0)
    whole = _visible_share(view, chart.box_xyxy) >= VISIBLE_CHART
    for index, bar in enumerate(chart.bars):
        owned = (owner == index) & (overlaps[index] >= OBJECT_COVERAGE * PATCH_PX**2)
        labels["kind"][owned], labels["colour"][owned] = KIND_NAMES.index("bar"), COLOUR_NAMES.index(bar.colour)
        if whole and read_values:
            labels["value"][_patches_showing(view, bar.top_xyxy)] = bar.value - 1


def _label_table(labels: Labels, table: Table, view: View, read_text: bool) -> None:
    owned = _overlap(view, table.box_xyxy) >= OBJECT_COVERAGE * PATCH_PX**2
    labels["kind"][owned], labels["colour"][owned] = KIND_NAMES.index("table"), 0
    if not read_text:
        return
    for name in table.rows:
        _label_word(labels, name.text, name.glyph_boxes, view)
    for column in table.columns:
        if _visible_share(view, column.box_xyxy) >= VISIBLE_GLYPH:
            labels["letter"][_patches_showing(view, column.box_xyxy)] = COLUMN_NAMES.index(column.text)
    for name, cells in zip(table.rows, table.cells, strict=True):
        for cell, column in itertools.zip_longest(cells, table.columns):
            _label_number(labels, cell.text, cell.glyph_boxes, view)
            for label, of, names in (("row word", name, WORDS), ("column letter", column, COLUMN_NAMES)):
                if of and min(_visible_share(view, text.box_xyxy) for text in (cell, of)) >= VISIBLE_GLYPH:
                    labels[label][_patches_showing(view, cell.box_xyxy)] = names.index(of.text)


def _overlap(view: View, box: Box) -> NDArray[np.float64]:
    """Square pixels of each patch [GRID, GRID] that a box covers."""
    x0, y0, x1, y1 = view.box_on_tile(box)
    edges = np.arange(GRID) * PATCH_PX
    window_x0, window_y0, window_x1, window_y1 = view.window
    across = np.minimum(min(x1, window_x1), edges + PATCH_PX) - np.maximum(max(x0, window_x0), edges)
    down = np.minimum(min(y1, window_y1), edges + PATCH_PX) - np.maximum(max(y0, window_y0), edges)
    return np.clip(down, 0, None)[:, None] * np.clip(across, 0, None)[None, :]


def _patches_showing(view: View, box: Box) -> NDArray[np.bool_]:
    """The patches that hold a quarter of the box, or that the box fills by a third: never a patch it only grazes."""
    x0, y0, x1, y1 = view.box_on_tile(box)
    overlap = _overlap(view, box)
    return (overlap >= 0.25 * (x1 - x0) * (y1 - y0)) | (overlap >= PATCH_PX**2 / 3)


def _visible_share(view: View, box: Box) -> float:
    """Share of a box that lies inside the tile's window."""
    x0, y0, x1, y1 = view.box_on_tile(box)
    left, top, right, bottom = view.window
    width, height = min(x1, right) - max(x0, left), min(y1, bottom) - max(y0, top)
    return max(0.0, width) * max(0.0, height) / ((x1 - x0) * (y1 - y0))
