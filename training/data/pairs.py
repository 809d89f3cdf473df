"""The split in which a word and a two-digit number may be seen together: each is known, their pair may be held out.

Words and numbers fall into six groups each by their hash, and the sum of a pair's groups decides its split. So every
word and every number occurs in every split, a pair in one alone, and any words of one group go with any numbers of
another: an image may show many of both.
"""

import hashlib
from functools import lru_cache
from typing import Literal

from training.data.vocabulary import NUMBERS, WORDS

PosterSplit = Literal["train", "validation", "test"]

GROUPS = 6
SPLIT_OF_RESIDUE: tuple[PosterSplit, ...] = ("test", "validation", "train", "train", "train", "train")
"""(word's group + number's group) modulo GROUPS -> split."""


@lru_cache(maxsize=1)
def word_groups() -> tuple[tuple[str, ...], ...]:
    """The vocabulary's words by group, four each."""
    return _groups(list(WORDS))


@lru_cache(maxsize=1)
def number_groups() -> tuple[tuple[str, ...], ...]:
    """The two-digit numbers by group, fifteen each, as they are written."""
    return _groups([str(number) for number in NUMBERS])


def cells_of(split: PosterSplit) -> list[tuple[int, int]]:
    """The (word group, number group) whose pairs belong to a split."""
    if split not in SPLIT_OF_RESIDUE:
        raise ValueError(f"split must be 'train', 'validation' or 'test', not {split!r}")
    cells = [(word, number) for word in range(GROUPS) for number in range(GROUPS)]
    return [(word, number) for word, number in cells if SPLIT_OF_RESIDUE[(word + number) % GROUPS] == split]


def _groups(texts: list[str]) -> tuple[tuple[str, ...], ...]:
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    return tuple(tuple(sorted(by_hash[group::GROUPS])) for group in range(GROUPS))
