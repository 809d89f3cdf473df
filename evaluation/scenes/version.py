"""The benchmark's version: what a score names, so that it says exactly what it was measured on."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from types import ModuleType

from evaluation.scenes import images
from evaluation.scenes.images import SEEDS, asked_of
from training.data import (
    charts,
    distractors,
    keypads,
    pairs,
    panels,
    poster_questions,
    posters,
    scenes,
    tables,
    vocabulary,
)
from training.data.posters import poster_at, render_poster

GENERATOR: tuple[ModuleType, ...] = (
    vocabulary,
    scenes,
    pairs,
    panels,
    keypads,
    charts,
    tables,
    distractors,
    posters,
    poster_questions,
    images,
)
SAMPLED = 8
"""Images of each split that are drawn and hashed."""


@lru_cache(maxsize=1)
def benchmark_version() -> str:
    """Twelve hex digits that change with the generator's constants, and with any pixel or question of a sample.

    Text is drawn by Pillow, so a Pillow that draws glyphs differently is another version.
    """
    digest = hashlib.sha256()
    for module in GENERATOR:
        constants = {name: repr(value) for name, value in vars(module).items() if name.isupper()}
        digest.update(json.dumps([module.__name__, constants], sort_keys=True).encode())
    for split, seed in SEEDS.items():
        for index in range(SAMPLED):
            poster = poster_at(split, seed, index)
            image = render_poster(poster)
            digest.update(repr((image.size, poster, asked_of(poster, split, seed, index))).encode())
            digest.update(image.tobytes())
    return digest.hexdigest()[:12]
