"""Images of the benchmark with their questions; (split, seed, index) says all of one."""

from __future__ import annotations

import io
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from services.common.errors import InvalidInput
from training.data.pairs import SPLIT_OF_RESIDUE, PosterSplit
from training.data.poster_questions import PANEL_KINDS, poster_questions
from training.data.posters import Poster, poster_at, render_poster
from training.data.questions import QuestionAnswer

QUESTIONS_PER_IMAGE = 8
SEEDS: dict[PosterSplit, int] = {"train": 0, "validation": 1, "test": 2}
"""The seeds that reported figures use."""


def benchmark_images(
    split: PosterSplit, images: int, seed: int | None = None
) -> Iterator[tuple[bytes, list[QuestionAnswer]]]:
    """PNG files, each with up to QUESTIONS_PER_IMAGE questions; the first images are the same however many follow.

    `seed` is that of the split when left out. Raises InvalidInput for an unknown split or no image.
    """
    if split not in SPLIT_OF_RESIDUE:
        raise InvalidInput(f"must be 'train', 'validation' or 'test', not {split!r}", field="split")
    if images < 1:
        raise InvalidInput(f"must be at least 1, not {images}", field="images")
    seed = SEEDS[split] if seed is None else seed
    return (_image(split, seed, index) for index in range(images))


def asked_of(poster: Poster, split: PosterSplit, seed: int, index: int) -> list[QuestionAnswer]:
    """The benchmark's questions on the poster with this split, seed and index."""
    rng = random.Random(f"benchmark/{split}/{seed}/{index}")
    return balanced(poster_questions(poster, rng), rng, QUESTIONS_PER_IMAGE)


def training_questions(images: int = 4000) -> Iterator[QuestionAnswer]:
    """The questions of the training split's first images, for baselines that never see an image."""
    seed = SEEDS["train"]
    for index in range(images):
        yield from asked_of(poster_at("train", seed, index), "train", seed, index)


def balanced(asked: Sequence[QuestionAnswer], rng: random.Random, most: int) -> list[QuestionAnswer]:
    """Up to `most` questions: one of every kind before a second of any, and first the kinds that few images have."""
    of_kind: dict[str, list[QuestionAnswer]] = defaultdict(list)
    for question in rng.sample(asked, len(asked)):
        of_kind[question.kind].append(question)
    kinds = sorted(of_kind)
    rng.shuffle(kinds)
    kinds.sort(key=lambda kind: kind not in PANEL_KINDS)
    rounds = itertools.zip_longest(*(of_kind[kind] for kind in kinds))
    return [question for one_of_each in rounds for question in one_of_each if question is not None][:most]


def _image(split: PosterSplit, seed: int, index: int) -> tuple[bytes, list[QuestionAnswer]]:
    poster = poster_at(split, seed, index)
    file = io.BytesIO()
    # The lowest level of compression: a file of a million pixels is written three times as fast.
    render_poster(poster).save(file, "PNG", compress_level=1)
    return file.getvalue(), asked_of(poster, split, seed, index)
