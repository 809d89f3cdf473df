"""The benchmark: splits share no pair and no image, every answer follows from what is drawn, everything repeats."""

import io
import itertools
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evaluation.scenes import POSTER_KINDS, SEEDS, asked_of, benchmark_images, benchmark_version, training_questions
from evaluation.scenes.images import QUESTIONS_PER_IMAGE
from services.common.errors import InvalidInput
from training.data.pairs import cells_of, number_groups, word_groups
from training.data.poster_questions import POSTER_PHRASINGS, poster_questions
from training.data.posters import POSTER_GRID_WEIGHTS, Poster, poster_at, render_poster
from training.data.scenes import TILE_PX
from training.data.vocabulary import COLOURS, NUMBERS, SHAPES, WORDS

POSTERS = [poster_at("validation", 5, index) for index in range(250)]


def test_splits_share_no_pair_and_no_image():
    pairs: dict[str, set[tuple[str, str]]] = {split: set() for split in SEEDS}
    specs: dict[str, set[str]] = {split: set() for split in SEEDS}
    for split in SEEDS:
        # The same seed for all: what keeps splits apart is not the seed.
        for index in range(1000):
            poster = poster_at(split, 0, index)
            read = _texts_drawn(poster)
            seen = set(itertools.product(read & set(WORDS), read & {str(number) for number in NUMBERS}))
            assert seen, "an image without a pair could be in every split"
            pairs[split] |= seen
            specs[split].add(repr(poster))
    for one, other in itertools.combinations(SEEDS, 2):
        assert not pairs[one] & pairs[other] and not specs[one] & specs[other]
    # Nearly every pair of the vocabulary was seen, and every word and number in every split.
    assert sum(map(len, pairs.values())) > 0.95 * len(WORDS) * len(NUMBERS)
    assert all(len({word for word, _ in seen}) == len(WORDS) for seen in pairs.values())
    assert all(len({number for _, number in seen}) == len(NUMBERS) for seen in pairs.values())


def test_every_pair_has_one_split_and_training_two_thirds_of_them():
    split_of = {
        (word, number): split
        for split in SEEDS
        for word_group, number_group in cells_of(split)
        for word in word_groups()[word_group]
        for number in number_groups()[number_group]
    }
    assert split_of.keys() == {(word, str(number)) for word in WORDS for number in NUMBERS}
    splits = list(split_of.values())
    assert len(splits) == sum(len(word_groups()[w]) * len(number_groups()[n]) for s in SEEDS for w, n in cells_of(s))
    assert [splits.count(split) * 6 // len(splits) for split in ("train", "validation", "test")] == [4, 1, 1]
    with pytest.raises(ValueError, match="heldout"):
        poster_at("heldout", 0, 0)  # type: ignore[arg-type]


def test_more_images_change_none_of_the_first():
    few, more = list(benchmark_images("test", 2)), list(benchmark_images("test", 4))
    assert few == more[:2] and len({file for file, _ in more}) == 4
    assert list(benchmark_images("test", 1, seed=9)) != few[:1]


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("tables", "RULE", (10, 20, 30)),
        ("charts", "UNIT_PX", (6, 8)),
        ("keypads", "KEY_GAP_PX", (0, 1)),
        ("distractors", "SYMBOLS", "#"),
    ],
)
def test_the_version_follows_the_generators_constants(monkeypatch, module, name, value):
    version = benchmark_version()
    monkeypatch.setattr(f"training.data.{module}.{name}", value)
    benchmark_version.cache_clear()
    assert benchmark_version() != version
    monkeypatch.undo()
    benchmark_version.cache_clear()
    assert benchmark_version() == version


def test_the_version_follows_what_is_drawn(monkeypatch):
    version = benchmark_version()
    monkeypatch.setattr("evaluation.scenes.version.render_poster", lambda poster: _one_pixel_changed(poster))
    benchmark_version.cache_clear()
    assert benchmark_version() != version
    benchmark_version.cache_clear()


def test_every_answer_follows_from_what_is_drawn():
    kinds = set()
    for index, poster in enumerate(POSTERS):
        for asked in poster_questions(poster, random.Random(index)):
            kinds.add(asked.kind)
            assert asked.answer == _answer(poster, asked.question), asked
            assert asked.kind != "colour" or re.search("|".join(SHAPES), asked.question)
            assert asked.kind != "card_colour" or not re.search("|".join(SHAPES), asked.question)
            if asked.box_xyxy is not None:
                x0, y0, x1, y1 = asked.box_xyxy
                assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    assert kinds == set(POSTER_KINDS)


def test_every_phrasing_is_used():
    asked = {q.question for n, poster in enumerate(POSTERS) for q in poster_questions(poster, random.Random(n))}
    for phrasing in itertools.chain(*POSTER_PHRASINGS.values()):
        pattern = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(phrasing))
        assert any(re.fullmatch(pattern, question) for question in asked), phrasing


def test_a_bar_measured_on_the_pixels_has_its_value():
    bars = 0
    for poster in [poster for poster in POSTERS if poster.chart][:40]:
        assert poster.chart is not None
        pixels = np.asarray(render_poster(poster)).astype(int)
        height, width = pixels.shape[:2]
        left, top, right, bottom = (edge * poster.render_scale for edge in poster.chart.plot_xyxy)
        unit = (bottom - top) / poster.chart.top_value
        for asked in poster_questions(poster, random.Random(0)):
            if asked.kind != "bar" or asked.box_xyxy is None:
                continue
            (bar,) = [bar for bar in poster.chart.bars if bar.colour in asked.question.split()]
            column = round((asked.box_xyxy[0] + asked.box_xyxy[2]) / 2 * width)
            # Measured on the pixels: the bar's colour from the axis upwards, in units of the lines behind it.
            filled = np.abs(pixels[round(top) : round(bottom), column] - bar.fill).max(-1) < 8
            assert round(filled.sum() / unit) == int(asked.answer)
            bars += 1
    assert bars > 60


def test_nothing_overlaps_and_most_of_an_image_is_empty():
    covered = []
    for poster in POSTERS:
        width, height = poster.size_wh
        boxes = _boxes(poster)
        assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        covered.append(sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes) / (width * height))
    assert max(covered) < 0.65 and sum(covered) / len(covered) < 0.3


def test_text_stays_inside_its_panel():
    for poster in POSTERS:
        texts = [(d.box_xyxy, text) for d in poster.distractors for text in d.symbols]
        if poster.chart:
            texts += [(poster.chart.box_xyxy, tick) for tick in poster.chart.ticks]
        if poster.table:
            table = poster.table
            texts += [(table.box_xyxy, text) for text in (*table.rows, *table.columns, *itertools.chain(*table.cells))]
        for key in poster.keypad.keys if poster.keypad else ():
            texts.append((key.box_xyxy, key.digit))
        for (left, top, right, bottom), text in texts:
            x0, y0, x1, y1 = text.box_xyxy
            assert left + 1 <= x0 and top <= y0 and x1 <= right - 1 and y1 <= bottom, text


def test_images_have_many_sizes_and_distractors_no_name():
    ratios = [poster.size_wh[0] / poster.size_wh[1] for poster in POSTERS]
    assert min(ratios) < 0.4 and max(ratios) > 2.5 and len({poster.size_wh for poster in POSTERS}) > 100
    rows, columns = max(POSTER_GRID_WEIGHTS, key=lambda grid: grid[0] * grid[1])
    assert max(w * h for w, h in (poster.size_wh for poster in POSTERS)) > 0.95 * rows * columns * TILE_PX**2
    distractors = [distractor for poster in POSTERS for distractor in poster.distractors]
    assert {distractor.kind for distractor in distractors} == {"checkers", "stripes", "confetti", "symbols"}
    assert not any(symbol.text.isalnum() for distractor in distractors for symbol in distractor.symbols)
    for file, _ in benchmark_images("train", 2):
        assert Image.open(io.BytesIO(file)).mode == "RGB"


def test_an_image_is_asked_several_kinds_and_panels_always():
    for index, poster in enumerate(POSTERS):
        asked = asked_of(poster, "validation", 5, index)
        kinds = [question.kind for question in asked]
        assert len(asked) == QUESTIONS_PER_IMAGE and len(set(kinds)) >= 5
        assert len({question.question for question in asked}) == len(asked)
        assert not poster.keypad or {"key", "key_colour"} <= set(kinds)
        assert not poster.chart or {"bar", "extreme"} <= set(kinds)
        assert not poster.table or {"cell", "row"} <= set(kinds)
    assert sum(1 for _ in training_questions(5)) == 5 * QUESTIONS_PER_IMAGE


def test_the_command_writes_the_same_in_a_process_with_another_hash_seed(tmp_path):
    command = [sys.executable, "-m", "evaluation.scenes", "--split", "test", "--images", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    written = json.loads((tmp_path / "questions.json").read_text())
    assert re.fullmatch("[0-9a-f]{12}", written["version"])
    assert written["version"] == benchmark_version() and written["split"] == "test" and written["seed"] == 2
    for shown, (file, asked) in zip(written["images"], benchmark_images("test", 2), strict=True):
        assert (tmp_path / shown["file"]).read_bytes() == file
        assert [q["question"] for q in shown["questions"]] == [q.question for q in asked]


def test_wrong_settings_are_named():
    with pytest.raises(InvalidInput, match="split: .*'heldout'"):
        benchmark_images("heldout", 1)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="images: .*0"):
        benchmark_images("test", 0)


def _texts_drawn(poster: Poster) -> set[str]:
    """Every text in the poster's own fields, whatever holds it."""
    texts = {card.text for card in poster.scene.cards} | {s.text for d in poster.distractors for s in d.symbols}
    if poster.keypad:
        texts |= {key.digit.text for key in poster.keypad.keys}
    if poster.chart:
        texts |= {tick.text for tick in poster.chart.ticks}
    if poster.table:
        table = poster.table
        texts |= {text.text for text in (*table.rows, *table.columns, *itertools.chain(*table.cells))}
    return texts


def _boxes(poster: Poster) -> list[tuple[float, float, float, float]]:
    panels = [panel for panel in (poster.keypad, poster.chart, poster.table) if panel]
    return [thing.box_xyxy for thing in (*poster.scene.objects, *poster.distractors, *panels)]


def _one_pixel_changed(poster: Poster) -> Image.Image:
    image = render_poster(poster)
    red, *rest = image.getpixel((0, 0))  # type: ignore[misc]
    image.putpixel((0, 0), ((red + 1) % 256, *rest))
    return image


def _answer(poster: Poster, question: str) -> str:
    """The answer worked out again from the question's words alone."""
    words = re.findall(r"[A-Za-z]+|\d+", question)
    colours = [word for word in words if word in COLOURS]
    shapes = [word for word in words if word in SHAPES]
    cards, figures, table, chart = poster.scene.cards, poster.scene.shapes, poster.table, poster.chart
    keys = {key.colour: key.digit.text for key in poster.keypad.keys} if poster.keypad else {}
    if words[0] in ("Where", "In") and "number" not in words:
        boxes = {f"{card.colour} card": card.box_xyxy for card in cards} | {f.shape: f.box_xyxy for f in figures}
        panels = (("table", table), ("chart", chart), ("keypad", poster.keypad))
        boxes |= {name: panel.box_xyxy for name, panel in panels if panel}
        (box,) = [box for name, box in boxes.items() if question.endswith(f"the {name}?")]
        x, y = (box[0] + box[2]) / poster.size_wh[0], (box[1] + box[3]) / poster.size_wh[1]
        return f"{'top' if y < 1 else 'bottom'} {'left' if x < 1 else 'right'}"
    if table and "table" in words:
        if words[0] in ("How", "Count"):
            return str(len(table.rows))
        grid = [[cell.text for cell in row] for row in table.cells]
        if "number" in words and words[-1].isdigit() or words[-1] not in WORDS and words[-1] not in "table ABC":
            (row,) = [n for n, cells in enumerate(grid) if [word for word in words if word.isdigit()][0] in cells]
            return table.rows[row].text
        letters = [word for word in words if word in ("A", "B", "C")]
        (row,) = [n for n, name in enumerate(table.rows) if name.text in words]
        return grid[row]["ABC".index(letters[0]) if letters else 0]
    if chart and ("bar" in words or "bars" in words):
        heights = {bar.colour: bar.box_xyxy[3] - bar.box_xyxy[1] for bar in chart.bars}
        if words[0] in ("How", "Count"):
            return str(len(heights))
        if colours:
            unit = (chart.plot_xyxy[3] - chart.plot_xyxy[1]) / chart.top_value
            return str(round(heights[colours[0]] / unit))
        return (max if "tallest" in words else min)(heights, key=lambda colour: heights[colour])
    if words[0] in ("How", "Count") and "keys" in words:
        return str(len(keys))
    if "key" in words and not {"card", "table"} & set(words):
        return keys[colours[0]] if colours else {digit: colour for colour, digit in keys.items()}[words[-1]]
    if words[0] in ("How", "Count"):
        return str(len(cards if "cards" in words else figures))
    if "left" in words:
        ends = re.findall(rf"(?:{'|'.join(COLOURS)}) card|{'|'.join(SHAPES)}", question)
        named = {f"{card.colour} card": card.box_xyxy for card in cards}
        named |= {figure.shape: figure.box_xyxy for figure in figures}
        (first, second) = [named[end][0] + named[end][2] for end in ends]
        return "yes" if first < second else "no"
    if words[0] in ("Is", "Can", "Does"):
        there = {(card.colour, "card") for card in cards} | {(figure.colour, figure.shape) for figure in figures}
        return "yes" if (colours[0], shapes[0] if shapes else "card") in there else "no"
    if re.search("(number|word) (is on|does|on)", question) and colours:
        (text,) = [card.text for card in cards if card.colour == colours[0]]
        return text
    if "shape" in words:
        return {figure.colour: figure.shape for figure in figures}[colours[0]]
    return ({figure.shape: figure.colour for figure in figures} | {card.text: card.colour for card in cards})[words[-1]]
