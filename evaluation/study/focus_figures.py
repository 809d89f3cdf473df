"""Figures 4 to 10: what a checkpoint's samplers choose on posters of the test split, by `evaluation.focus_maps`."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from evaluation.focus_maps.drawing import (
    KEPT_COLOUR,
    branch_colour,
    fitted,
    importance_map,
    kept_map,
    kept_of,
    scale_map,
)
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
"""Posters at the beginning of the split among which those that are shown are looked for."""
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


Panels = Callable[[FocusModel, Shown, EncodedPicture], Iterable[Picture]]


@dataclass(frozen=True, kw_only=True)
class FocusFigure:
    """A figure of the paper: which posters, and the panels of each in a row."""

    what: str
    posters: Callable[[], Sequence[Shown]]
    panels: Panels
    across: int = 0
    """Panels a row, where that is not a poster's."""
    key: tuple[str, ...] = ()
    """Colours that the key explains: "scales", "kept"."""


def focus_figure(number: int, model: FocusModel) -> Image:
    """One of FOCUS_FIGURES. Which posters are shown depends on the posters alone, never on the answers."""
    figure = FOCUS_FIGURES[number]
    rows = [list(figure.panels(model, shown, model.encode(shown.file))) for shown in figure.posters()]
    if figure.across:
        panels = list(itertools.chain.from_iterable(rows))
        rows = [panels[first : first + figure.across] for first in range(0, len(panels), figure.across)]
    branches = enumerate(model.pipeline.config.vision_sampler.branches)
    scales = {f"pooled {height}x{width}": _hex(branch_colour(branch)) for branch, (height, width) in branches}
    key = (scales if "scales" in figure.key else {}) | (
        {"kept by the text-guided sampler": _hex(KEPT_COLOUR)} if "kept" in figure.key else {}
    )
    told = (f"Row {row}: {' | '.join(one.caption for one in of_row)}" for row, of_row in enumerate(rows, start=1))
    return Image(
        file=f"figure-{number}.svg",
        svg=pictures(rows, key=key or None),
        alt=f"{figure.what} {' '.join(told)}",
        caption=f"Figure {number}. {figure.what} Model {model.pipeline.fingerprint[:12]}.",
    )


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
    """Distance between the centres of the evidence, in shares of the sides."""
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for asked in pair for x0, y0, x1, y1 in (asked.box_xyxy or (0, 0, 0, 0),)]
    return math.dist(*centres)


def _scales(model: FocusModel, shown: Shown, picture: EncodedPicture) -> list[Picture]:
    """The picture and its scale map."""
    width, height = picture.picture.size
    assert picture.map.regions, "posters are not narrow, and the model has the vision-guided sampler"
    shares = " / ".join(f"{100 * share:.0f}" for share in picture.map.regions.branch_shares())
    caption = f"{len(picture.map.boxes)} tokens of {picture.tokens.uncompressed_tokens}; branches {shares} %"
    return [
        Picture(image=fitted(picture.picture, BOX_WH), caption=f"{width} x {height} px"),
        Picture(image=scale_map(picture.picture, picture.map, BOX_WH), caption=caption),
    ]


def _kept(questions: Callable[[Shown], Iterable[QuestionAnswer]]) -> Panels:
    """The picture, and what is kept of it for each of these questions."""

    def panels(model: FocusModel, shown: Shown, picture: EncodedPicture) -> Iterable[Picture]:
        yield _scales(model, shown, picture)[0]
        for asked in questions(shown):
            focus = model.ask([picture], asked.question)
            (where,) = focus.maps.maps
            count = f"{kept_of(where, 'map')} tokens of the grid tiles"
            drawn = kept_map(picture.picture, where, "map", BOX_WH)
            yield Picture(image=drawn, caption=f"{_told(focus, asked)} Kept: {count}.")

    return panels


_kept_for_one = _kept(lambda shown: shown.fine[:1])
_kept_for_two = _kept(lambda shown: shown.far_apart)


def _layers(box_wh: tuple[int, int], *most: int) -> Panels:
    """The picture with a question, and importance at each layer, or at so many layers at most."""

    def panels(model: FocusModel, shown: Shown, picture: EncodedPicture) -> Iterable[Picture]:
        focus = model.ask([picture], shown.fine[0].question)
        yield Picture(image=fitted(picture.picture, box_wh), caption=_told(focus, shown.fine[0]))
        for layer in shown_layers(focus, *most):
            prunes = " (prunes)" if focus.maps.prune_layer == layer else ""
            importance = focus.importance_KN[layer - 1].tolist()
            drawn = importance_map(picture.picture, picture.map, "map", box_wh, importance=importance)
            yield Picture(image=drawn, caption=f"layer {layer}{prunes}")

    return panels


def _told(focus: Focus, asked: QuestionAnswer) -> str:
    verdict = "right" if is_exact(focus.answer, asked.answer) else f"wrong, it is {asked.answer}"
    return f"{asked.question} {focus.answer or '(nothing)'} ({verdict})."


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_TWO = "What is kept of one image for two questions whose answers lie far apart."
FOCUS_FIGURES: dict[int, FocusFigure] = {
    4: FocusFigure(
        what="What each sampler selects on a poster rich in text, one with shapes, and one mostly empty: the picture, "
        "its scale map, and what is kept for a question.",
        posters=_kinds,
        panels=lambda *of: (*_scales(*of), list(_kept_for_one(*of))[1]),
        key=("scales", "kept"),
    ),
    5: FocusFigure(
        what="Importance of visual tokens (Eq. 8) by layer, for one question each; light is more.",
        posters=lambda: _posters()[:3],
        panels=_layers(SMALL_BOX_WH, LAYERS_SHOWN),
    ),
    6: FocusFigure(what="More scale maps of the vision-guided sampler.", posters=lambda: _posters()[3:7],
                   panels=_scales, across=4, key=("scales",)),
    7: FocusFigure(what="More regions kept by the text-guided sampler.", posters=lambda: _posters()[3:7],
                   panels=_kept_for_one, across=4, key=("kept",)),
    8: FocusFigure(what=_TWO, posters=lambda: _posters()[7:9], panels=_kept_for_two, key=("kept",)),
    9: FocusFigure(what=_TWO, posters=lambda: _posters()[9:11], panels=_kept_for_two, key=("kept",)),
    10: FocusFigure(
        what="Importance of visual tokens (Eq. 8) through the layers, for one question; light is more.",
        posters=lambda: _posters()[11:12],
        panels=_layers(BOX_WH),
        across=3,
    ),
}  # fmt: skip
