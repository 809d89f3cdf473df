"""Labelled tiles: deterministic, and labels on exactly the patches that show their evidence."""

import random

import numpy as np

from training.data.charts import Bar, Chart
from training.data.keypads import Key, Keypad
from training.data.panels import set_text
from training.data.posters import Poster
from training.data.scenes import Background, Card, Scene, Shape
from training.data.tables import Table
from training.data.tiles import (
    COLOUR_NAMES,
    GRID,
    IGNORE,
    KIND_NAMES,
    LABEL_CLASSES,
    View,
    label_patches,
    label_poster,
    labelled_tile,
    tile_batch,
)
from training.data.vocabulary import COLOURS, WORDS

WHITE = (255, 255, 255)
PLAIN = Background(colour=WHITE, end_colour=WHITE, noise_amplitude=0, noise_seed=0)


def _card(box, text, glyph_boxes, kind="number") -> Card:
    x0s, y0s, x1s, y1s = zip(*glyph_boxes, strict=True)
    return Card(
        box_xyxy=box,
        colour="red",
        fill=(218, 38, 42),
        text=text,
        kind=kind,
        ink=WHITE,
        font_px=14,
        origin_xy=(x0s[0], y1s[0]),
        text_box_xyxy=(min(x0s), min(y0s), max(x1s), max(y1s)),
        glyph_boxes=tuple(glyph_boxes),
    )


# The card covers patches (1..2, 1..4); its digits lie on patches (1, 2) and (1, 3) alone.
NUMBER = _card((12, 12, 60, 36), "47", [(26, 13, 34, 23), (37, 13, 45, 23)])
SQUARE = Shape(box_xyxy=(60, 60, 96, 96), colour="blue", fill=(36, 82, 212), shape="square")
SCENE = Scene(size_wh=(96, 96), background=PLAIN, cards=(NUMBER,), shapes=(SQUARE,), render_scale=1.0)


def _labels(scene: Scene, **view) -> dict[str, np.ndarray]:
    labels = label_patches(scene, View(**{"scale_xy": (1.0, 1.0), **view}))
    return {name: array.reshape(GRID, GRID) for name, array in labels.items()}


def _where(condition: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(int(index) for index in place) for place in np.argwhere(condition)}


def test_labels_lie_on_the_patches_of_their_evidence():
    labels = _labels(SCENE)
    card = {(row, column) for row in (1, 2) for column in (1, 2, 3, 4)}
    square = {(row, column) for row in (5, 6, 7) for column in (5, 6, 7)}
    assert _where(labels["kind"] == KIND_NAMES.index("number card")) == card
    assert _where(labels["kind"] == KIND_NAMES.index("square")) == square
    assert _where(labels["colour"] == COLOUR_NAMES.index("red")) == card
    assert _where(labels["colour"] == COLOUR_NAMES.index("blue")) == square
    assert _where(labels["tens"] != IGNORE) == {(1, 2)} and labels["tens"][1, 2] == 4
    assert _where(labels["ones"] != IGNORE) == {(1, 3)} and labels["ones"][1, 3] == 7
    assert (labels["word"] == IGNORE).all()


def test_a_glyph_cut_by_the_tile_is_labelled_while_sixty_percent_is_inside():
    # The tens glyph spans x 26 to 34: cut at 29 it keeps 5 of 8 pixels, at 30 only 4.
    kept, lost = _labels(SCENE, offset_xy=(29, 0)), _labels(SCENE, offset_xy=(30, 0))
    assert _where(kept["tens"] == 4) == {(1, 0)} and (lost["tens"] == IGNORE).all()
    assert (lost["ones"] == 7).any()


def test_a_word_needs_every_letter():
    letters = [(14, 14, 21, 24), (22, 14, 29, 24), (30, 14, 37, 24)]
    fox = _card((12, 12, 60, 36), "fox", letters, kind="word")
    scene = Scene(size_wh=(96, 96), background=PLAIN, cards=(fox,), shapes=(), render_scale=1.0)
    assert _where(_labels(scene)["word"] == WORDS.index("fox")) == {(1, 1), (1, 2)}
    assert (_labels(scene, offset_xy=(22, 0))["word"] == IGNORE).all()


def test_a_card_without_visible_text_has_a_colour_but_no_kind():
    labels = _labels(SCENE, offset_xy=(47, 0))
    assert labels["colour"][1, 0] == COLOUR_NAMES.index("red")
    assert labels["kind"][1, 0] == IGNORE


def test_nothing_is_labelled_under_padding():
    labels = _labels(SCENE, window=(0, 48, 96, 96))
    assert (labels["kind"][:4] == 0).all() and (labels["colour"][:4] == 0).all()
    assert (labels["tens"] == IGNORE).all()
    assert labels["kind"][6, 6] == KIND_NAMES.index("square")


def test_labels_follow_the_scale():
    labels = _labels(SCENE, scale_xy=(2.0, 2.0), offset_xy=(24, 24))
    # Twice as large and moved up and left by two patches, the card fills the tile's top four rows.
    assert (labels["colour"][:4] == COLOUR_NAMES.index("red")).all()
    assert (labels["colour"][4:] == 0).all()
    assert _where(labels["tens"] == 4) == {(0, 2), (0, 3), (1, 2), (1, 3)}


def _poster_labels(poster: Poster, **view) -> dict[str, np.ndarray]:
    labels = label_poster(poster, View(**{"scale_xy": (1.0, 1.0), **view}))
    return {name: array.reshape(GRID, GRID) for name, array in labels.items()}


EMPTY = Scene(size_wh=(96, 96), background=PLAIN, cards=(), shapes=(), render_scale=1.0)
# A panel over patches (1..6, 1..4). The red bar's top edge lies in patch (2, 2), the blue one's in (5, 3).
CHART = Chart(
    box_xyxy=(12, 12, 60, 84),
    plot_xyxy=(20, 18, 56, 78),
    top_value=9,
    bars=(
        Bar(box_xyxy=(25, 30, 35, 78), colour="red", fill=(218, 38, 42), value=8),
        Bar(box_xyxy=(37, 66, 47, 78), colour="blue", fill=(36, 82, 212), value=2),
    ),
    ticks=(),
)


def test_a_bar_is_labelled_where_it_stands_and_its_value_at_its_top():
    labels = _poster_labels(Poster(scene=EMPTY, keypad=None, chart=CHART, table=None, distractors=()))
    red, blue = {(row, 2) for row in (2, 3, 4, 5, 6)}, {(5, 3), (6, 3)}
    assert _where(labels["colour"] == COLOUR_NAMES.index("red")) == red
    assert _where(labels["colour"] == COLOUR_NAMES.index("blue")) == blue
    bars = labels["kind"] == KIND_NAMES.index("bar")
    assert _where(bars) == red | blue
    panel = {(row, column) for row in range(1, 7) for column in range(1, 5)}
    assert _where(bars | (labels["kind"] == KIND_NAMES.index("chart"))) == panel
    assert _where(labels["value"] == 7) == {(2, 2)} and _where(labels["value"] == 1) == {(5, 3)}
    assert _where(labels["value"] != IGNORE) == {(2, 2), (5, 3)}


def test_a_chart_cut_by_the_tile_keeps_its_colours_and_loses_its_values():
    labels = _poster_labels(
        Poster(scene=EMPTY, keypad=None, chart=CHART, table=None, distractors=()), offset_xy=(20, 0)
    )
    assert (labels["colour"] == COLOUR_NAMES.index("red")).any() and (labels["value"] == IGNORE).all()


def test_a_tables_words_numbers_and_letters_are_labelled_on_their_own_patches():
    table = Table(
        box_xyxy=(0, 0, 84, 48),
        rows=(set_text("fox", 12, (18, 36)),),
        columns=(set_text("A", 12, (48, 12)), set_text("B", 12, (72, 12))),
        cells=((set_text("47", 12, (48, 36)), set_text("52", 12, (72, 36))),),
        rules=(),
        header=None,
    )
    labels = _poster_labels(Poster(scene=EMPTY, keypad=None, chart=None, table=table, distractors=()))
    assert (labels["kind"][:4, :7] == KIND_NAMES.index("table")).all() and (labels["kind"][4:] == 0).all()
    for name, columns, value in (("word", {0, 1, 2}, WORDS.index("fox")), ("tens", {3}, 4), ("tens", {5}, 5),
                                 ("ones", {4}, 7), ("ones", {6}, 2)):  # fmt: skip
        where = _where(labels[name] == value)
        assert where and {row for row, _ in where} <= {2, 3} and {column for _, column in where} <= columns, name
    assert {column for _, column in _where(labels["letter"] == 0)} <= {3, 4} and (labels["letter"] == 1).any()
    # Every patch that shows a cell says which row and column the cell is in, and no other patch does.
    cells = {3: 0, 4: 0, 5: 1, 6: 1}
    where = _where(labels["row word"] == WORDS.index("fox"))
    assert where == _where(labels["row word"] != IGNORE) and {column for _, column in where} == set(cells)
    assert all(labels["column letter"][row, column] == cells[column] for row, column in where)


def test_a_cell_whose_name_the_tile_cuts_off_is_read_and_not_named():
    table = Table(
        box_xyxy=(0, 0, 84, 24),
        rows=(set_text("fox", 12, (18, 12)),),
        columns=(),
        cells=((set_text("47", 12, (60, 12)),),),
        rules=(),
        header=None,
    )
    labels = _poster_labels(
        Poster(scene=EMPTY, keypad=None, chart=None, table=table, distractors=()), offset_xy=(30, 0)
    )
    assert (labels["tens"] == 4).any()
    assert (labels["row word"] == IGNORE).all() and (labels["column letter"] == IGNORE).all()


def test_a_key_is_labelled_by_colour_and_digit_on_its_own_patches():
    def key(x: float, colour: str, digit: str) -> Key:
        box, text = (x, 12, x + 24, 36), set_text(digit, 12, (x + 12, 24))
        return Key(box_xyxy=box, colour=colour, fill=COLOURS[colour], digit=text, ink=(255, 255, 255))

    keypad = Keypad(box_xyxy=(12, 12, 60, 36), keys=(key(12, "red", "7"), key(36, "blue", "0")))
    poster = Poster(scene=EMPTY, keypad=keypad, chart=None, table=None, distractors=())
    labels = _poster_labels(poster)
    for colour, digit, columns in (("red", 7, {1, 2}), ("blue", 0, {3, 4})):
        patches = {(row, column) for row in (1, 2) for column in columns}
        assert _where(labels["colour"] == COLOUR_NAMES.index(colour)) == patches
        shown = _where(labels["digit"] == digit)
        assert shown and shown <= patches
    assert _where(labels["kind"] == KIND_NAMES.index("key")) == _where(labels["colour"] != 0)
    unread = label_poster(poster, View(scale_xy=(1.0, 1.0)), read_text=False)
    assert (unread["digit"] == IGNORE).all() and (unread["kind"] == KIND_NAMES.index("key")).any()


def test_every_patch_says_where_in_the_tile_it_is():
    labels = _labels(SCENE)
    assert labels["row"][3, 5] == 3 and labels["column"][3, 5] == 5


def test_a_batch_depends_on_seed_and_step_alone():
    batch, again, next_step = tile_batch(1, 5, 6), tile_batch(1, 5, 6), tile_batch(1, 6, 6)
    assert batch["pixels"].shape == (6, 96, 96, 3) and batch["pixels"].dtype == np.uint8
    for name in ("pixels", *LABEL_CLASSES):
        assert np.array_equal(batch[name], again[name])
    assert not np.array_equal(batch["pixels"], next_step["pixels"])
    assert set(batch) == {"pixels", *LABEL_CLASSES}


def test_labels_are_in_range_local_and_frequent_enough_to_learn_from():
    batch = tile_batch(0, 0, 64)
    for name, classes in LABEL_CLASSES.items():
        assert batch[name].shape == (64, 64) and batch[name].dtype == np.int64
        labelled = batch[name][batch[name] != IGNORE]
        assert labelled.min() >= 0 and labelled.max() < classes
    for name in ("tens", "ones", "word"):
        share = (batch[name] != IGNORE).mean()
        assert 0.01 < share < 0.08
    # A poster has one panel, so each kind of panel is on a third of the tiles that are cut around one.
    for name, least in (("tens", 0.25), ("digit", 0.12), ("value", 0.08), ("row word", 0.12)):
        assert ((batch[name] != IGNORE).any(1)).mean() > least


def test_colour_labels_agree_with_the_pixels():
    """Patches labelled blue hold more blue than red; patches labelled red the reverse."""
    blue, red = COLOUR_NAMES.index("blue"), COLOUR_NAMES.index("red")
    for seed in range(40):
        image, labels = labelled_tile(random.Random(seed))
        patches = np.asarray(image).astype(int).reshape(GRID, 12, GRID, 12, 3).mean((1, 3)).reshape(-1, 3)
        assert (patches[labels["colour"] == blue, 2] > patches[labels["colour"] == blue, 0]).all()
        assert (patches[labels["colour"] == red, 0] > patches[labels["colour"] == red, 2]).all()
