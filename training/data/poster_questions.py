"""Poster -> questions: those of scenes on its cards and shapes, and more on its keypad, chart and table."""

import dataclasses
import random

from training.data.charts import Chart
from training.data.fonts import Box
from training.data.keypads import Keypad
from training.data.posters import Poster
from training.data.questions import MIDDLE_MARGIN, QuestionAnswer, questions
from training.data.tables import Table
from training.data.vocabulary import SHAPES

FINE_KINDS: tuple[str, ...] = ("number", "word", "card_colour", "key", "key_colour", "bar", "cell", "row")
"""The kinds that need a small glyph, or a few pixels of a bar, to be read."""
COARSE_KINDS: tuple[str, ...] = ("colour", "shape", "count", "where", "left_of", "presence", "extreme")
PANEL_KINDS: tuple[str, ...] = ("key", "key_colour", "bar", "extreme", "cell", "row")
"""The kinds that only a poster with a keypad, a chart or a table can be asked."""
POSTER_KINDS: tuple[str, ...] = (*FINE_KINDS, *COARSE_KINDS)

POSTER_PHRASINGS: dict[str, tuple[str, ...]] = {
    "key": (
        "What number is on the {colour} key?",
        "Which number does the {colour} key show?",
        "Read the number on the {colour} key.",
    ),
    "key colour": (
        "What colour is the key with the number {number}?",
        "Which colour is the key that says {number}?",
    ),
    "keys": ("How many keys are there?", "Count the keys."),
    "bar": (
        "What is the value of the {colour} bar?",
        "What value does the {colour} bar have?",
        "Read the {colour} bar of the chart.",
    ),
    "tallest": ("What colour is the tallest bar?", "Which bar of the chart is the tallest?"),
    "shortest": ("What colour is the shortest bar?", "Which bar of the chart is the shortest?"),
    "list cell": ("What number is next to {word} in the table?", "Which number does the table give for {word}?"),
    "cell": (
        "What number is in row {word}, column {column} of the table?",
        "Read the table: row {word}, column {column}.",
    ),
    "row": ("In which row of the table is the number {number}?", "Which row of the table has the number {number}?"),
    "rows": ("How many words are in the table?", "Count the words in the table."),
    "bars": ("How many bars does the chart have?", "Count the bars of the chart."),
    "where": ("Where is the {panel}?", "In which corner is the {panel}?"),
}


def poster_questions(poster: Poster, rng: random.Random) -> list[QuestionAnswer]:
    """Every question on cards, shapes, keys, bars and cells, and a few on the whole, in an order that is fixed."""
    asked = [_by_evidence(question) for question in questions(poster.scene, rng)]
    if poster.keypad:
        asked += _on_keypad(poster, poster.keypad, rng)
    if poster.chart:
        asked += _on_chart(poster, poster.chart, rng)
    if poster.table:
        asked += _on_table(poster, poster.table, rng)
    return asked


def _by_evidence(asked: QuestionAnswer) -> QuestionAnswer:
    """Sets card colours apart: a shape's colour is coarse, but the card that says 47 is found by reading its text."""
    if asked.kind == "colour" and not any(shape in asked.question for shape in SHAPES):
        return dataclasses.replace(asked, kind="card_colour")
    return asked


def _on_keypad(poster: Poster, keypad: Keypad, rng: random.Random) -> list[QuestionAnswer]:
    asked = []
    for key in keypad.keys:
        digit = key.digit.text
        asked.append(_ask(poster, rng, "key", "key", digit, key.digit.box_xyxy, colour=key.colour))
        asked.append(_ask(poster, rng, "key_colour", "key colour", key.colour, key.box_xyxy, number=digit))
    asked.append(_ask(poster, rng, "count", "keys", str(len(keypad.keys)), keypad.box_xyxy))
    return asked + _where(poster, rng, "keypad", keypad.box_xyxy)


def _on_chart(poster: Poster, chart: Chart, rng: random.Random) -> list[QuestionAnswer]:
    asked = []
    for bar in chart.bars:
        question = _ask(poster, rng, "bar", "bar", str(bar.value), bar.box_xyxy, colour=bar.colour)
        # A bar is read at its upper edge.
        top = _fractions(poster, bar.top_xyxy)
        asked.append(dataclasses.replace(question, several_xyxy=(top,)))
    by_value = sorted(chart.bars, key=lambda bar: bar.value)
    for phrasing, bar in (("shortest", by_value[0]), ("tallest", by_value[-1])):
        asked.append(_ask(poster, rng, "extreme", phrasing, bar.colour, bar.box_xyxy))
    asked.append(_ask(poster, rng, "count", "bars", str(len(chart.bars)), chart.plot_xyxy))
    return asked + _where(poster, rng, "chart", chart.box_xyxy)


def _on_table(poster: Poster, table: Table, rng: random.Random) -> list[QuestionAnswer]:
    asked = []
    for name, cells in zip(table.rows, table.cells, strict=True):
        for column, cell in enumerate(cells):
            if table.columns:
                words = {"word": name.text, "column": table.columns[column].text}
                asked.append(_ask(poster, rng, "cell", "cell", cell.text, cell.box_xyxy, **words))
            else:
                asked.append(_ask(poster, rng, "cell", "list cell", cell.text, cell.box_xyxy, word=name.text))
            row = _ask(poster, rng, "row", "row", name.text, name.box_xyxy, number=cell.text)
            # The number is what can be searched for, and the row's name lies beside it.
            boxes = tuple(_fractions(poster, one.box_xyxy) for one in (name, cell))
            asked.append(dataclasses.replace(row, several_xyxy=boxes))
    asked.append(_ask(poster, rng, "count", "rows", str(len(table.rows)), table.box_xyxy))
    return asked + _where(poster, rng, "table", table.box_xyxy)


def _where(poster: Poster, rng: random.Random, panel: str, box_xyxy: Box) -> list[QuestionAnswer]:
    x0, y0, x1, y1 = _fractions(poster, box_xyxy)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    if min(abs(x - 0.5), abs(y - 0.5)) < MIDDLE_MARGIN:
        return []
    answer = f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    return [_ask(poster, rng, "where", "where", answer, box_xyxy, panel=panel)]


def _ask(
    poster: Poster, rng: random.Random, kind: str, phrasing: str, answer: str, box_xyxy: Box, **words: str
) -> QuestionAnswer:
    question = rng.choice(POSTER_PHRASINGS[phrasing]).format(**words)
    return QuestionAnswer(kind=kind, question=question, answer=answer, box_xyxy=_fractions(poster, box_xyxy))


def _fractions(poster: Poster, box: Box) -> Box:
    (width, height), (x0, y0, x1, y1) = poster.size_wh, box
    return x0 / width, y0 / height, x1 / width, y1 / height
