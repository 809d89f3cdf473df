"""Posters on backgrounds with a pattern: the same posters, as pale as before, and none of it in the benchmark."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.tiny_training import tiny_run
from training.data.posters import poster_at, render_poster, textured_poster_at
from training.data.rendering import render_background
from training.data.scenes import Background
from training.data.textures import REACH, SHARE, Texture
from training.question_stage import QuestionTask

POSTERS = [textured_poster_at("train", 4, index) for index in range(120)]
TEXTURED = [poster for poster in POSTERS if isinstance(poster.scene.background, Texture)]


def pixels(background: Background) -> np.ndarray:
    return np.asarray(render_background(background, (150, 120), 1.0)).astype(int)


def test_so_many_have_a_pattern_and_nothing_else_changes() -> None:
    assert abs(len(TEXTURED) / len(POSTERS) - SHARE) < 0.15
    for index, poster in enumerate(POSTERS):
        plain = poster_at("train", 4, index)
        assert not isinstance(plain.scene.background, Texture)
        scene = dataclasses.replace(poster.scene, background=plain.scene.background)
        assert dataclasses.replace(poster, scene=scene) == plain


def test_a_poster_is_drawn_alike_every_time() -> None:
    first, again = (textured_poster_at("train", 4, POSTERS.index(TEXTURED[0])) for _ in range(2))
    assert first == again
    assert np.array_equal(np.asarray(render_poster(first)), np.asarray(render_poster(again)))


@pytest.mark.parametrize("pattern", ["paper", "stripes", "blotches"])
def test_a_pattern_changes_a_pale_background_by_its_reach_at_most(pattern: str) -> None:
    texture = next(p.scene.background for p in TEXTURED if getattr(p.scene.background, "pattern", "") == pattern)
    assert isinstance(texture, Texture) and REACH[0] <= texture.reach <= REACH[1]
    flat = dataclasses.replace(texture, end_colour=texture.colour)
    change = pixels(flat) - np.array(texture.colour)
    assert 1 <= change.std(axis=(0, 1)).max() and np.abs(change).max() <= texture.reach + 1
    assert pixels(texture).min() > 200


def test_training_takes_them_by_name() -> None:
    batches = QuestionTask(tiny_run("unused", stage={"data": "textured_posters"})).data
    drawn = [batches._scene(index, False).scene.background for index in range(12)]  # type: ignore[union-attr]
    assert {type(background) for background in drawn} == {Background, Texture}
