"""Figures 4 to 10: what a checkpoint's samplers choose on posters of the test split, by `evaluation.focus_maps`."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from evaluation.focus_maps.drawing import KEPT_COLOUR, branch_colour, fitted, importance_map, kept_map, scale_map
from evaluation.focus_maps.focus import EncodedPicture, Focus, FocusModel
from evaluation.focus_maps.page import shown_layers
from evaluation.scenes import FINE_KINDS, SEEDS, asked_of, is_exact
from evaluation.study.charts import Picture, pictures
from evaluation.study.document import Image
from training.data.pairs import PosterSplit
from training.data.posters import Poster, poster_at, render_poster
from training.data.questions import QuestionAnswer

SPLIT: PosterSplit = "test"
POSTERS = 40
"""So many first posters of the split are looked through for those that are shown."""
LONGEST = 2.0
"""Sides of posters that are shown, as a ratio: longer ones are too small beside others."""
BOX_WH, SMALL_BOX_WH = (300, 300), (200, 200)
LAYERS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A poster that a figure shows, and what it is asked."""

    index: int
    poster: Poster

    @property
    def file(self) -> bytes:
        file = io.BytesIO()
        render_poster(self.poster).save(file, "PNG", compress_level=1)
        return file.getvalue()

    @property
    def fine(self) -> list[QuestionAnswer]:
        """Fine questions whose evidence lies in one place."""
        asked = asked_of(self.poster, SPLIT, SEEDS[SPLIT], self.index)
        return [question for question in asked if question.kind in FINE_KINDS and question.box_xyxy]

    @property
    def far_apart(self) -> tuple[QuestionAnswer, QuestionAnswer]:
        """The two whose evidence lies farthest apart."""
        return max(itertools.combinations(self.fine, 2), key=_distance)


def focus_figure(number: int, model: FocusModel) -> Image:
    """One of FOCUS_FIGURES. Which posters are shown depends on the posters alone, never on the answers."""
    return FOCUS_FIGURES[number](model)


def _figure_4(model: FocusModel) -> Image:
    rows = []
    for shown in _kinds():
        picture = model.encode(shown.file)
        focus = model.ask([picture], shown.fine[0].question)
        rows.append([_picture(picture), _scales(picture), _kept(focus, shown.fine[0])])
    return _image(4, model, rows, "What each sampler selects on a poster rich in text, one with shapes, and one mostly "
                  "empty: the picture, its scale map, and what is kept for a question.", scales=True)  # fmt: skip


def _figure_5(model: FocusModel) -> Image:
    rows = []
    for shown in _posters()[:3]:
        picture = model.encode(shown.file)
        focus = model.ask([picture], shown.fine[0].question)
        layers = shown_layers(focus, LAYERS_SHOWN)
        asked = Picture(image=fitted(picture.picture, SMALL_BOX_WH), caption=_told(focus, shown.fine[0]))
        rows.append([asked, *(_importance(focus, layer, SMALL_BOX_WH) for layer in layers)])
    return _image(5, model, rows, "Importance of visual tokens (Eq. 8) by layer, for one question each; light is more.")


def _figure_6(model: FocusModel) -> Image:
    encoded = [model.encode(shown.file) for shown in _posters()[3:7]]
    rows = [[_picture(picture), _scales(picture)] for picture in encoded]
    paired = [[*left, *right] for left, right in zip(rows[::2], rows[1::2], strict=True)]
    return _image(6, model, paired, "More scale maps of the vision-guided sampler.", scales=True)


def _figure_7(model: FocusModel) -> Image:
    panels = []
    for shown in _posters()[3:7]:
        picture = model.encode(shown.file)
        panels += [_picture(picture), _kept(model.ask([picture], shown.fine[0].question), shown.fine[0])]
    return _image(7, model, [panels[:4], panels[4:]], "More regions kept by the text-guided sampler.")


def _figure_8(model: FocusModel) -> Image:
    return _two_questions(8, model, _posters()[7:9])


def _figure_9(model: FocusModel) -> Image:
    return _two_questions(9, model, _posters()[9:11])


def _two_questions(number: int, model: FocusModel, posters: Sequence[Shown]) -> Image:
    rows = []
    for shown in posters:
        picture = model.encode(shown.file)
        answers = [_kept(model.ask([picture], asked.question), asked) for asked in shown.far_apart]
        rows.append([_picture(picture), *answers])
    return _image(number, model, rows, "What is kept of one image for two questions whose answers lie far apart.")


def _figure_10(model: FocusModel) -> Image:
    shown = _posters()[11]
    asked, picture = shown.fine[0], model.encode(shown.file)
    focus = model.ask([picture], asked.question)
    panels = [Picture(image=fitted(picture.picture, BOX_WH), caption=_told(focus, asked))]
    panels += [_importance(focus, layer, BOX_WH) for layer in shown_layers(focus)]
    rows = [panels[first : first + 3] for first in range(0, len(panels), 3)]
    return _image(10, model, rows, "Importance of visual tokens (Eq. 8) through the layers, for one question; light is "
                  "more.")  # fmt: skip


FOCUS_FIGURES: dict[int, Callable[[FocusModel], Image]] = {
    4: _figure_4,
    5: _figure_5,
    6: _figure_6,
    7: _figure_7,
    8: _figure_8,
    9: _figure_9,
    10: _figure_10,
}


@lru_cache(maxsize=1)
def _posters() -> tuple[Shown, ...]:
    """Posters of the test split, in order, with two fine questions or more and sides that are not too unlike."""
    seed = SEEDS[SPLIT]
    looked_at = (Shown(index=index, poster=poster_at(SPLIT, seed, index)) for index in range(POSTERS))
    fit = (shown for shown in looked_at if max(shown.poster.size_wh) <= LONGEST * min(shown.poster.size_wh))
    return tuple(shown for shown in fit if len(shown.fine) > 1)


def _kinds() -> list[Shown]:
    """The poster with the most text, of the rest that with the most shapes, and the emptiest of the large ones."""
    posters = list(_posters())
    largest = max(math.prod(shown.poster.size_wh) for shown in posters)
    text = max(posters, key=lambda shown: len(shown.poster.words | shown.poster.numbers))
    posters.remove(text)
    shapes = max(posters, key=lambda shown: len(shown.poster.scene.shapes))
    posters.remove(shapes)
    large = [shown for shown in posters if math.prod(shown.poster.size_wh) >= largest / 2]
    return [text, shapes, min(large, key=lambda shown: _things(shown.poster) / math.prod(shown.poster.size_wh))]


def _things(poster: Poster) -> int:
    panels = sum(panel is not None for panel in (poster.keypad, poster.chart, poster.table))
    return len(poster.scene.cards) + len(poster.scene.shapes) + len(poster.distractors) + 4 * panels


def _distance(pair: tuple[QuestionAnswer, QuestionAnswer]) -> float:
    """Between the centres of the evidence, in shares of the sides."""
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for asked in pair for x0, y0, x1, y1 in (asked.box_xyxy or (0, 0, 0, 0),)]
    return math.dist(*centres)


def _picture(picture: EncodedPicture) -> Picture:
    width, height = picture.picture.size
    return Picture(image=fitted(picture.picture, BOX_WH), caption=f"{width} x {height} px")


def _scales(picture: EncodedPicture) -> Picture:
    shares = " / ".join(f"{100 * share:.0f}" for share in picture.layout.branch_shares())
    caption = f"{len(picture.layout)} tokens of {picture.tokens.uncompressed_tokens}; branches {shares} %"
    return Picture(image=scale_map(picture, BOX_WH), caption=caption)


def _kept(focus: Focus, asked: QuestionAnswer) -> Picture:
    picture = focus.pictures[0]
    on_map = picture.layout.is_map_N
    count = f"{int((focus.kept_N & on_map).sum())} of {int(on_map.sum())} tokens of the grid tiles"
    return Picture(
        image=kept_map(picture, focus.kept_N, "map", BOX_WH), caption=f"{_told(focus, asked)} Kept: {count}."
    )


def _importance(focus: Focus, layer: int, box_wh: tuple[int, int]) -> Picture:
    prunes = " (prunes)" if focus.decision is not None and focus.decision.layer == layer else ""
    drawn = importance_map(focus.pictures[0], focus.importance_KN[layer - 1], "map", box_wh)
    return Picture(image=drawn, caption=f"layer {layer}{prunes}")


def _told(focus: Focus, asked: QuestionAnswer) -> str:
    verdict = "right" if is_exact(focus.answer, asked.answer) else f"wrong, it is {asked.answer}"
    return f"{asked.question} {focus.answer or '(nothing)'} ({verdict})."


def _image(
    number: int, model: FocusModel, rows: Sequence[Sequence[Picture]], what: str, *, scales: bool = False
) -> Image:
    branches = model.pipeline.config.vision_sampler.branches
    key = {"kept by the text-guided sampler": "#{:02x}{:02x}{:02x}".format(*KEPT_COLOUR)}
    if scales:
        key = {
            f"pooled {height}x{width}": "#{:02x}{:02x}{:02x}".format(*branch_colour(branch))
            for branch, (height, width) in enumerate(branches)
        } | (key if number == 4 else {})
    told = " ".join(f"Row {row_number}: {' | '.join(one.caption for one in row)}" for row_number, row in
                    enumerate(rows, start=1))  # fmt: skip
    return Image(
        file=f"figure-{number}.svg",
        svg=pictures(rows, key=key if scales or number in (7, 8, 9) else None),
        alt=f"{what} {told}",
        caption=f"Figure {number}. {what} Model {model.pipeline.fingerprint[:12]}.",
    )
