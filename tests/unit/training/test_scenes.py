"""The procedural scenes: deterministic, splits that never overlap, answers that follow from geometry, local detail."""

import itertools
import math
import random
import re

import numpy as np
import pytest

from services.common.errors import InvalidInput
from tests.tiny_training import tiny_run
from training.data.questions import QuestionAnswer, questions
from training.data.rendering import render
from training.data.scenes import Card, Scene, Shape, sample_scene
from training.data.splits import canonical_spec, dataset_version, scene_at, scene_stream, split_of
from training.data.tokenizer import build_tokenizer, closed_words
from training.data.vocabulary import COLOURS, DETAIL_KINDS, KINDS, PHRASINGS, SHAPES
from training.question_stage import QuestionTask

SCENES = [scene_at("train", 3, index) for index in range(200)]


def test_a_seed_gives_the_same_scene_question_and_pixels():
    first, again = sample_scene(random.Random(7)), sample_scene(random.Random(7))
    assert first == again and canonical_spec(first) == canonical_spec(again)
    assert questions(first, random.Random(1)) == questions(again, random.Random(1))
    assert np.array_equal(np.asarray(render(first)), np.asarray(render(again)))
    assert sample_scene(random.Random(8)) != first


def test_a_stream_resumes_at_any_index():
    resumed = scene_stream("heldout", seed=2, start=3)
    assert list(itertools.islice(scene_stream("heldout", seed=2), 6))[3:] == list(itertools.islice(resumed, 3))


def test_a_curriculum_starts_with_small_images():
    task = QuestionTask(tiny_run("unused", stage={"curriculum": {"steps": 8, "max_tiles": 2}}))
    tiles = [[len(s.image.pixels_T3HW) - 1 for step in steps for s in task.batch(step, 0, 1)[1]]
             for steps in (range(8), range(8, 16))]  # fmt: skip
    assert max(tiles[0]) == 2 and max(tiles[1]) > 2


def test_a_curriculum_can_ask_for_a_panel():
    stage = {"data": "posters", "curriculum": {"steps": 8, "max_tiles": 4, "panel": "table"}}
    batches = QuestionTask(tiny_run("unused", stage=stage)).data
    first, later = ([batches._scene(index, small) for index in range(12)] for small in (True, False))
    assert all(poster.table and batches._size(poster)[0] <= 4 * batches.config.tile_px**2 for poster in first)
    assert not all(poster.table for poster in later)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"data": "posters", "curriculum": {"panel": "map"}}, "curriculum.panel: is 'map'"),
        ({"data": "scenes", "curriculum": {"panel": "table"}}, "with data 'scenes'"),
        ({"data": "posters", "curriculum": {"panel": "table", "max_tiles": 2}}, "curriculum.max_tiles: is 2"),
    ],
)
def test_a_panel_that_no_small_image_has_is_refused(stage, message):
    with pytest.raises(InvalidInput, match=message):
        QuestionTask(tiny_run("unused", stage=stage))


def test_splits_do_not_overlap():
    train = {canonical_spec(scene_at("train", 0, index)) for index in range(500)}
    heldout = {canonical_spec(scene_at("heldout", 0, index)) for index in range(100)}
    assert len(train) == 500 and len(heldout) == 100 and not train & heldout
    assert all(split_of(scene) == "train" for scene in SCENES)
    drawn = [split_of(sample_scene(random.Random(index))) for index in range(500)]
    assert 25 <= drawn.count("heldout") <= 80


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="heldout"):
        scene_at("test", 0, 0)  # type: ignore[arg-type]


def test_dataset_version_is_a_short_hash_that_follows_the_phrasings(monkeypatch):
    version = dataset_version()
    assert re.fullmatch("[0-9a-f]{12}", version)
    monkeypatch.setitem(PHRASINGS, "where", ("Where on earth is the {thing}?",))
    dataset_version.cache_clear()
    assert dataset_version() != version
    dataset_version.cache_clear()


def test_objects_lie_apart_on_the_canvas_and_can_be_named():
    for scene in SCENES:
        boxes = [thing.box_xyxy for thing in scene.objects]
        width, height = scene.size_wh
        assert scene.cards
        assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for names in (
            [card.colour for card in scene.cards],
            [card.text for card in scene.cards],
            [shape.colour for shape in scene.shapes],
            [shape.shape for shape in scene.shapes],
        ):
            assert len(set(names)) == len(names)


def test_text_lies_on_its_card_and_its_ink_in_its_box():
    for scene in SCENES[:60]:
        pixels = np.asarray(render(scene)).astype(int)
        for card in scene.cards:
            assert _inside(card.text_box_xyxy, card.box_xyxy)
            assert all(_inside(glyph, card.text_box_xyxy) for glyph in card.glyph_boxes)
            x0, y0, x1, y1 = (round(edge * scene.render_scale) for edge in card.box_xyxy)
            differs = np.abs(pixels[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] - card.fill).max(-1) > 40
            rows, columns = np.nonzero(differs)
            ink = columns.min() + x0 + 2, rows.min() + y0 + 2, columns.max() + x0 + 3, rows.max() + y0 + 3
            # Hinting differs between font sizes: up to a model pixel and a half.
            assert _inside([edge / scene.render_scale for edge in ink], card.text_box_xyxy, slack=1.5)


def test_files_have_many_sizes_and_the_stated_scale():
    sizes = {scene.size_wh for scene in SCENES}
    assert len(sizes) > 80
    assert min(width / height for width, height in sizes) < 0.4
    assert max(width / height for width, height in sizes) > 2.5
    for scene in SCENES[:20]:
        assert render(scene).size == tuple(round(side * scene.render_scale) for side in scene.size_wh)


def test_detail_is_local():
    shares = []
    for scene in SCENES:
        patches = math.ceil(scene.size_wh[0] / 12) * math.ceil(scene.size_wh[1] / 12)
        shares.append(len(set().union(*(_patches(card.text_box_xyxy) for card in scene.cards))) / patches)
    assert max(shares) < 0.3 and sum(shares) / len(shares) < 0.08


def test_every_answer_follows_from_the_scene():
    asked_kinds = set()
    for index, scene in enumerate(SCENES):
        for asked in questions(scene, random.Random(index)):
            asked_kinds.add(asked.kind)
            assert asked.answer == _answer(scene, asked), asked
    assert asked_kinds == set(KINDS)


def test_boxes_hold_the_evidence():
    for scene in SCENES:
        for asked in questions(scene, random.Random(0)):
            if asked.kind in DETAIL_KINDS or asked.kind == "where":
                assert asked.box_xyxy is not None
            if asked.kind in ("count", "left_of"):
                assert asked.box_xyxy is None
            assert len(asked.evidence_xyxy) == (2 if asked.kind == "left_of" else asked.box_xyxy is not None)
            for x0, y0, x1, y1 in asked.evidence_xyxy:
                assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            if asked.kind in ("number", "word") and asked.box_xyxy is not None:
                (card,) = [card for card in scene.cards if card.text == asked.answer]
                scaled = [edge * side for edge, side in zip(asked.box_xyxy, scene.size_wh * 2, strict=True)]
                assert scaled == pytest.approx(card.text_box_xyxy)


def test_yes_and_no_are_as_frequent():
    for kind in ("presence", "left_of"):
        answers = [
            asked.answer
            for index, scene in enumerate(SCENES)
            for asked in questions(scene, random.Random(index))
            if asked.kind == kind
        ]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_words_of_the_vocabulary_are_one_token_and_digits_one_each(tokenizer):
    for word in closed_words():
        for form in (word, f" {word}"):
            assert len(tokenizer(form, add_special_tokens=False).input_ids) == 1, form
    assert tokenizer.tokenize(" 47") == ["Ġ", "4", "7"]


@pytest.mark.parametrize("text", ["What number?", "  ", "naïve 世界 🙂\n\tx , y 's", "\x00\x7f 1234", "ﬁ ½"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_conversations_read_as_llava_writes_them(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What number?"}, {"type": "image"}]},
        {"role": "assistant", "content": "47"},
        {"role": "user", "content": "And now?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nWhat number? ASSISTANT: 47</s>USER: And now? ASSISTANT:"
    assert tokenizer(text).input_ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
    assert tokenizer(text).input_ids.count(tokenizer.eos_token_id) == 1


def test_training_the_tokenizer_twice_gives_the_same(tokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def _answer(scene: Scene, asked: QuestionAnswer) -> str:
    """The answer worked out again from the question's words."""
    words = re.findall(r"[a-z]+|\d+", asked.question.lower())
    colours = [word for word in words if word in COLOURS]
    if asked.kind in ("number", "word"):
        (card,) = [card for card in scene.cards if card.colour == colours[0]]
        assert card.kind == asked.kind
        return card.text
    if asked.kind == "shape":
        return {shape.colour: shape.shape for shape in scene.shapes}[colours[0]]
    if asked.kind == "colour":
        colour_of = {card.text: card.colour for card in scene.cards}
        colour_of |= {shape.shape: shape.colour for shape in scene.shapes}
        return colour_of[words[-1]]
    if asked.kind == "count":
        return str(len(scene.cards if "cards" in words else scene.shapes))
    named = re.findall(rf"({'|'.join(COLOURS)})?\s?\b(card|{'|'.join(SHAPES)})\b", asked.question)
    if asked.kind == "presence":
        ((colour, noun),) = named
        things = [("card", card.colour) for card in scene.cards]
        things += [(shape.shape, shape.colour) for shape in scene.shapes]
        return "yes" if (noun, colour) in things else "no"
    centres = [_centre(_find(scene, colour, noun)) for colour, noun in named]
    if asked.kind == "left_of":
        (first_x, _), (second_x, _) = centres
        return "yes" if first_x < second_x else "no"
    ((x, y),) = centres
    width, height = scene.size_wh
    return f"{'top' if 2 * y < height else 'bottom'} {'left' if 2 * x < width else 'right'}"


def _find(scene: Scene, colour: str, noun: str) -> Card | Shape:
    things: list[Card | Shape] = [card for card in scene.cards if noun == "card" and card.colour == colour]
    things += [shape for shape in scene.shapes if shape.shape == noun]
    (thing,) = things
    return thing


def _centre(thing: Card | Shape) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box_xyxy
    return (x0 + x1) / 2, (y0 + y1) / 2


def _inside(inner, outer, slack: float = 0.01) -> bool:
    starts = all(inner[axis] >= outer[axis] - slack for axis in (0, 1))
    return starts and all(inner[axis] <= outer[axis] + slack for axis in (2, 3))


def _patches(box) -> set[tuple[int, int]]:
    x0, y0, x1, y1 = box
    return set(itertools.product(range(int(x0 // 12), math.ceil(x1 / 12)), range(int(y0 // 12), math.ceil(y1 / 12))))
