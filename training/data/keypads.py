"""Keypads: small coloured keys side by side, each with a digit: an answer is on a patch or two among many like it.

Of all that a poster shows this loses most when patches are pooled: a region of 48 px holds nine keys.
"""

import random
from dataclasses import dataclass

from PIL import ImageDraw

from training.data.fonts import Box
from training.data.panels import Place, Text, draw_text, fill_box, set_text
from training.data.scenes import RGB, ink_on, jittered
from training.data.vocabulary import COLOURS

ROW_COUNT, COLUMN_COUNT = (2, 3), (2, 4)
KEY_SIDE_PX, KEY_GAP_PX = (14, 17), (0, 2)
KEY_FONTS_PX = (11, 12, 13)


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, in model pixels."""

    box_xyxy: Box
    colour: str
    fill: RGB
    """The colour as drawn, with its jitter."""
    digit: Text
    ink: RGB


@dataclass(frozen=True, kw_only=True)
class Keypad:
    """Keys in rows. No two have the same colour or the same digit."""

    box_xyxy: Box
    keys: tuple[Key, ...]


def sample_keypad(rng: random.Random, place: Place) -> Keypad | None:
    """A random keypad where `place` finds room for it; None when there is none."""
    columns, rows = rng.randint(*COLUMN_COUNT), rng.randint(*ROW_COUNT)
    rows = min(rows, len(COLOURS) // columns)
    side, gap, font_px = rng.randint(*KEY_SIDE_PX), rng.randint(*KEY_GAP_PX), rng.choice(KEY_FONTS_PX)
    box = place((columns * side + (columns - 1) * gap, rows * side + (rows - 1) * gap))
    if box is None:
        return None
    colours, digits = rng.sample(list(COLOURS), rows * columns), rng.sample("0123456789", rows * columns)
    keys = []
    for index, (colour, digit) in enumerate(zip(colours, digits, strict=True)):
        row, column = divmod(index, columns)
        x, y = box[0] + column * (side + gap), box[1] + row * (side + gap)
        fill = jittered(rng, COLOURS[colour])
        text = set_text(digit, font_px, (x + side / 2, y + side / 2))
        keys.append(Key(box_xyxy=(x, y, x + side, y + side), colour=colour, fill=fill, digit=text, ink=ink_on(fill)))
    return Keypad(box_xyxy=box, keys=tuple(keys))


def draw_keypad(draw: ImageDraw.ImageDraw, keypad: Keypad, scale: float) -> None:
    """Keys, then their digits."""
    for key in keypad.keys:
        fill_box(draw, key.box_xyxy, scale, key.fill)
        draw_text(draw, key.digit, scale, key.ink)
