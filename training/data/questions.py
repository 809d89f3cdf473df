"""Scene -> questions, their answers, and the region of the image that holds the evidence."""

import dataclasses
import random
from dataclasses import dataclass, field

from training.data.fonts import Box
from training.data.scenes import Card, Scene, Shape
from training.data.vocabulary import COLOURS, PHRASINGS, SHAPES

MIDDLE_MARGIN = 0.08
"""Nothing is asked about a position closer to the line that decides it than this share of the side."""


@dataclass(frozen=True, kw_only=True)
class QuestionAnswer:
    """One question about a scene."""

    kind: str
    """One of vocabulary.KINDS."""
    question: str
    answer: str
    box_xyxy: Box | None
    """Where the evidence is, as fractions of width and height; None when it is not one object."""
    several_xyxy: tuple[Box, ...] = field(default=(), repr=False)
    """The objects that the answer takes, where it takes several. For training alone: not in repr, on which the version
    of a benchmark depends."""

    @property
    def evidence_xyxy(self) -> tuple[Box, ...]:
        """Every box that the answer can be read from; empty when that is the whole image."""
        return self.several_xyxy or ((self.box_xyxy,) if self.box_xyxy else ())


def questions(scene: Scene, rng: random.Random) -> list[QuestionAnswer]:
    """Every detail question, both counts, and a few on position and presence, in a fixed order."""
    return [
        *_detail(scene, rng),
        *_counts(scene, rng),
        *_where(scene, rng),
        *_left_of(scene, rng),
        *_presence(scene, rng),
    ]


def _detail(scene: Scene, rng: random.Random) -> list[QuestionAnswer]:
    asked = []
    for card in scene.cards:
        text_box, card_box = _fractions(scene, card.text_box_xyxy), _fractions(scene, card.box_xyxy)
        asked.append(_ask(rng, card.kind, card.kind, card.text, text_box, colour=card.colour))
        asked.append(_ask(rng, "colour", f"colour of {card.kind}", card.colour, card_box, text=card.text))
    for shape in scene.shapes:
        box = _fractions(scene, shape.box_xyxy)
        asked.append(_ask(rng, "colour", "colour of shape", shape.colour, box, shape=shape.shape))
        asked.append(_ask(rng, "shape", "shape", shape.shape, box, colour=shape.colour))
    return asked


def _counts(scene: Scene, rng: random.Random) -> list[QuestionAnswer]:
    counts = {"cards": len(scene.cards), "shapes": len(scene.shapes)}
    return [_ask(rng, "count", "count", str(count), None, plural=plural) for plural, count in counts.items()]


def _where(scene: Scene, rng: random.Random) -> list[QuestionAnswer]:
    asked = []
    for thing in scene.objects:
        x, y = _centre(scene, thing)
        if min(abs(x - 0.5), abs(y - 0.5)) < MIDDLE_MARGIN:
            continue
        answer = f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
        asked.append(_ask(rng, "where", "where", answer, _fractions(scene, thing.box_xyxy), thing=_name(thing)))
    return asked


def _left_of(scene: Scene, rng: random.Random) -> list[QuestionAnswer]:
    """Up to two questions, on different pairs: the order within a pair is random, and with it the answer."""
    objects = scene.objects
    pairs = [(a, b) for index, a in enumerate(objects) for b in objects[index + 1 :]]
    asked: list[QuestionAnswer] = []
    for pair in rng.sample(pairs, len(pairs)):
        thing, other = rng.sample(pair, 2)
        distance = _centre(scene, other)[0] - _centre(scene, thing)[0]
        if abs(distance) >= MIDDLE_MARGIN and len(asked) < 2:
            answer = "yes" if distance > 0 else "no"
            question = _ask(rng, "left_of", "left_of", answer, None, thing=_name(thing), other=_name(other))
            boxes = tuple(_fractions(scene, one.box_xyxy) for one in pair)
            asked.append(dataclasses.replace(question, several_xyxy=boxes))
    return asked


def _presence(scene: Scene, rng: random.Random) -> list[QuestionAnswer]:
    """One question answered yes, one no: the no puts a colour and a shape of the scene together wrongly."""
    present = rng.choice(scene.objects)
    yes_box = _fractions(scene, present.box_xyxy)
    card_colours = {card.colour for card in scene.cards}
    shape_names = {(shape.colour, shape.shape) for shape in scene.shapes}
    if not scene.shapes or rng.random() < 0.5:
        tempting = [shape.colour for shape in scene.shapes if shape.colour not in card_colours]
        absent = f"{_pick(rng, tempting, [colour for colour in COLOURS if colour not in card_colours])} card"
    else:
        near = rng.choice(scene.shapes)
        everywhere = [(near.colour, shape) for shape in SHAPES] + [(colour, near.shape) for colour in COLOURS]
        absent = " ".join(rng.choice([pair for pair in everywhere if pair not in shape_names]))
    present_name = f"{present.colour} {present.shape if isinstance(present, Shape) else 'card'}"
    return [
        _ask(rng, "presence", "presence", "yes", yes_box, thing=_with_article(present_name)),
        _ask(rng, "presence", "presence", "no", None, thing=_with_article(absent)),
    ]


def _ask(
    rng: random.Random, kind: str, phrasing: str, answer: str, box_xyxy: Box | None, **words: str
) -> QuestionAnswer:
    question = rng.choice(PHRASINGS[phrasing]).format(**words)
    return QuestionAnswer(kind=kind, question=question, answer=answer, box_xyxy=box_xyxy)


def _name(thing: Card | Shape) -> str:
    return thing.shape if isinstance(thing, Shape) else f"{thing.colour} card"


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _centre(scene: Scene, thing: Card | Shape) -> tuple[float, float]:
    x0, y0, x1, y1 = _fractions(scene, thing.box_xyxy)
    return (x0 + x1) / 2, (y0 + y1) / 2


def _fractions(scene: Scene, box: Box) -> Box:
    (width, height), (x0, y0, x1, y1) = scene.size_wh, box
    return x0 / width, y0 / height, x1 / width, y1 / height


def _pick(rng: random.Random, tempting: list[str], possible: list[str]) -> str:
    return rng.choice(tempting) if tempting and rng.random() < 0.5 else rng.choice(possible)
