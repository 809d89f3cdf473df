"""Batches of images with questions: images of like size together, so that little is padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from PIL import Image

from services.checkpoint.config import FocusLlavaConfig
from services.common.grid import best_resolution
from services.common.settings import Count, Natural, require
from services.encoder.reading import tiles_of
from training.data.branches import BranchBuilder, Exchange, Sample
from training.data.easy_vqa import easy_vqa_asked, easy_vqa_at, open_easy_vqa
from training.data.fonts import Box
from training.data.poster_boxes import glyph_boxes
from training.data.poster_questions import poster_questions
from training.data.posters import CONTENTS, poster_at, render_poster, textured_poster_at
from training.data.questions import QuestionAnswer, questions
from training.data.rendering import render
from training.data.splits import scene_at

STEPS_SORTED_TOGETHER = 8
POSITION_KINDS = ("where", "left_of")
"""Kinds of question whose answer is a place in the whole image."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Small images first: among fewer patches, where to look is learned in fewer and cheaper steps."""

    steps: Natural = 0
    """Steps that it lasts; images of every size follow."""
    max_tiles: Count = 4
    """Most tiles of an image meanwhile, the base tile not counted."""
    panel: Literal["", "keypad", "chart", "table"] = ""
    """The panel that each image shows meanwhile (posters only). Looking a word up in a table has to be learned for
    every word, and few images of the whole mixture ask for it."""

    def __post_init__(self) -> None:
        if self.panel:
            least = min(tiles for tiles, contents in CONTENTS.items() if contents.panels)
            require(self.max_tiles >= least, "max_tiles", self.max_tiles, f"{least} or more, which a panel needs")


@dataclass(frozen=True, kw_only=True)
class SceneSource:
    """A generator of images: its scenes have `size_wh` in model pixels and a `render_scale`."""

    at: Callable[..., Any]
    """(split, seed, index, accept) -> scene."""
    ask: Callable[..., list[QuestionAnswer]]
    """(scene, rng) -> its questions."""
    draw: Callable[..., Image.Image]
    glyph_boxes: Callable[..., tuple[Box, ...]] | None = None
    """scene -> `Sample.glyph_boxes`."""


SOURCES: dict[str, SceneSource] = {
    "scenes": SceneSource(at=scene_at, ask=questions, draw=render),
    "posters": SceneSource(at=poster_at, ask=poster_questions, draw=render_poster, glyph_boxes=glyph_boxes),
    "textured_posters": SceneSource(
        at=textured_poster_at, ask=poster_questions, draw=render_poster, glyph_boxes=glyph_boxes
    ),
    "easy_vqa": SceneSource(at=easy_vqa_at, ask=easy_vqa_asked, draw=open_easy_vqa),
}
"""Values of a stage's `data` that name a generator, or a public set that is installed."""


class SceneBatches:
    """The same (step, rank) gives the same samples. A rank is a worker, or one of its accumulated micro-batches."""

    identity = ""
    """A generator has no data that may be edited: its seed and settings are the run's."""

    def __init__(self, config: FocusLlavaConfig, builder: BranchBuilder, *, seed: int, images: int,
                 questions_per_image: int, kind_weights: Mapping[str, float], split: str = "train",
                 curriculum: Curriculum | None = None, source: SceneSource = SOURCES["scenes"]):  # fmt: skip
        self.config, self.builder, self.split, self.source = config, builder, split, source
        self.curriculum = curriculum or Curriculum()
        self.seed, self.images, self.questions_per_image = seed, images, questions_per_image
        self.kind_weights = dict(kind_weights)
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def batch(self, step: int, rank: int, world_size: int) -> list[Sample]:
        block, within = divmod(step, STEPS_SORTED_TOGETHER)
        indices = self._plan(block, world_size)[within * world_size + rank]
        small = self._starts_small(block)
        return [self.sample(index, small) for index in indices]

    def sample(self, index: int, small: bool = False) -> Sample:
        """The scene with this index and its questions; `small` takes it among those that the curriculum starts with."""
        scene = self._scene(index, small)
        rng = random.Random(f"{self.seed}/{index}/questions")
        image = tiles_of(self.source.draw(scene), self.config)
        branches = []
        prefix: tuple[int, ...] = ()
        for asked in self._choose(self.source.ask(scene, rng), rng):
            exchange = Exchange(
                question=asked.question,
                answer=asked.answer,
                evidence_xyxy=asked.evidence_xyxy,
                asks_place=asked.kind in POSITION_KINDS,
            )
            prefix, branch = self.builder.build(exchange)
            branches.append(branch)
        boxes = self.source.glyph_boxes(scene) if self.source.glyph_boxes else ()
        return Sample(image=image, prefix_ids=prefix, branches=tuple(branches), glyph_boxes=boxes)

    def _choose(self, asked: list[QuestionAnswer], rng: random.Random) -> list[QuestionAnswer]:
        """Weighted draw without replacement: the largest of u ** (1 / weight) win."""
        keyed = [(rng.random() ** (1 / self.kind_weights.get(a.kind, 1.0)), n) for n, a in enumerate(asked)]
        return [asked[n] for _, n in sorted(keyed, reverse=True)[: self.questions_per_image]]

    def _make_plan(self, block: int, world_size: int) -> list[list[int]]:
        """Plans the scenes of each batch of a block: sorted by tiles, neighbours to the ranks of one step."""
        count = STEPS_SORTED_TOGETHER * world_size * self.images
        first, small = block * count, self._starts_small(block)
        order = sorted(range(first, first + count), key=lambda i: self._size(self._scene(i, small)))
        batches = [order[n : n + self.images] for n in range(0, count, self.images)]
        steps = [batches[n : n + world_size] for n in range(0, len(batches), world_size)]
        random.Random(f"{self.seed}/{block}/order").shuffle(steps)
        return [batch for of_step in steps for batch in of_step]

    def _starts_small(self, block: int) -> bool:
        return block * STEPS_SORTED_TOGETHER < self.curriculum.steps

    def _scene(self, index: int, small: bool) -> Any:
        most = self.curriculum.max_tiles * self.config.tile_px**2
        panel = self.curriculum.panel

        def accept(scene: Any) -> bool:
            return not small or (self._size(scene)[0] <= most and (not panel or getattr(scene, panel) is not None))

        return self.source.at(self.split, self.seed, index, accept)

    def _size(self, scene: Any) -> tuple[int, int]:
        size_hw = (round(scene.size_wh[1] * scene.render_scale), round(scene.size_wh[0] * scene.render_scale))
        height, width = best_resolution(size_hw, self.config.image_grid_pinpoints)
        return height * width, size_hw[0] * size_hw[1]
