"""What an open-loop benchmark asks: the poster benchmark's questions, whose answers are scored, or photographs.

Images come from a pool. With the probability `reuse` a question is about one that was sent before; else its file is one
that nobody has seen: readers ignore bytes after a picture's end, so some are added there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.workload import QUESTION, jpeg
from evaluation.scenes import benchmark_images, is_exact
from focusllava.messages import Settings

POSTER_TOKENS = 16
"""Most tokens of an answer about a poster; the right ones have up to four."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request."""

    image: bytes
    text: str
    settings: Settings
    expected: str | None = None
    """The right answer, where there is one."""

    def is_right(self, answer: str) -> bool | None:
        """Whether it is the right answer; None where nobody knows."""
        return None if self.expected is None else is_exact(answer, self.expected)


class Work(Protocol):
    """A kind of questions."""

    @property
    def images(self) -> Sequence[bytes]:
        """The files of the pool."""

    def questions(self, count: int, seed: int) -> list[Question]:
        """Returns `count` questions; the same seed asks the same about the same pictures."""


class Posters:
    """The questions of the poster benchmark's test split."""

    def __init__(self, images: int, reuse: float):
        """images: of the pool."""
        self._asked = list(benchmark_images("test", images))
        self._reuse = reuse

    @property
    def images(self) -> Sequence[bytes]:
        return [image for image, _ in self._asked]

    def questions(self, count: int, seed: int) -> list[Question]:
        rng, settings = random.Random(seed), Settings(max_tokens=POSTER_TOKENS)
        found = []
        for _ in range(count):
            image, asked = rng.choice(self._asked)
            question = rng.choice(asked)
            found.append(
                Question(
                    image=known_or_new(image, rng, self._reuse),
                    text=question.question,
                    settings=settings,
                    expected=question.answer,
                )
            )
        return found


class Photos:
    """Random photographs of some sizes, and answers of a fixed length: for weights that know nothing."""

    def __init__(self, images: int, reuse: float, sizes_hw: Sequence[tuple[int, int]], tokens: int):
        """images: of the pool, as many of each size."""
        self.images = [jpeg(number, *sizes_hw[number % len(sizes_hw)]) for number in range(images)]
        self._reuse, self._settings = reuse, Settings(max_tokens=tokens, ignore_eos=True)

    def questions(self, count: int, seed: int) -> list[Question]:
        rng = random.Random(seed)
        images = [known_or_new(rng.choice(self.images), rng, self._reuse) for _ in range(count)]
        # The number keeps an answer's prompt from being found whole in the language model's cache.
        return [
            Question(image=image, text=f"{rng.randrange(10**6)}: {QUESTION}", settings=self._settings)
            for image in images
        ]


def known_or_new(image: bytes, rng: random.Random, reuse: float) -> bytes:
    """The file itself with the probability `reuse`, else the same picture in a file that nobody has seen."""
    return image if rng.random() < reuse else image + os.urandom(8)


def size_hw(text: str) -> tuple[int, int]:
    """ "672x1008" to (672, 1008). Raises ValueError."""
    height, _, width = text.partition("x")
    return int(height), int(width)
