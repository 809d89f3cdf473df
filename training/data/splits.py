"""The splits of scenes, endless and resumable streams of them, and the version of the data."""

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal

from training.data import scenes, tiles, vocabulary
from training.data.questions import questions
from training.data.scenes import Scene, sample_scene

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.1


def canonical_spec(scene: Scene) -> str:
    """A scene as JSON with sorted keys: equal scenes, equal text."""
    return json.dumps(dataclasses.asdict(scene), sort_keys=True, separators=(",", ":"))


def split_of(scene: Scene) -> Split:
    """The split of a scene, decided by the scene alone: no seed can put a held-out scene into training."""
    digest = hashlib.sha256(canonical_spec(scene).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64 else "train"


def scene_at(split: Split, seed: int, index: int, accept: Callable[[Scene], bool] = lambda _: True) -> Scene:
    """The scene with this index: the first of the split, and accepted, among the draws that (seed, index) gives."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    for attempt in itertools.count():
        # A string seeds through SHA-512: the same on every machine and Python.
        scene = sample_scene(random.Random(f"{seed}/{index}/{attempt}"))
        if accept(scene) and split_of(scene) == split:
            return scene
    raise AssertionError("unreachable: the count is endless")


def scene_stream(split: Split, seed: int, start: int = 0) -> Iterator[Scene]:
    """Scenes without end from `start` on, so that training resumes where it stopped."""
    return (scene_at(split, seed, index) for index in itertools.count(start))


@lru_cache(maxsize=1)
def dataset_version() -> str:
    """Twelve hex digits that change with the vocabulary, the generator's constants, or what it draws."""
    digest = hashlib.sha256()
    for module in (vocabulary, scenes, tiles):
        constants = {name: repr(value) for name, value in vars(module).items() if name.isupper()}
        digest.update(json.dumps(constants, sort_keys=True).encode())
    for index in range(16):
        scene = scene_at("train", 0, index)
        digest.update(canonical_spec(scene).encode())
        digest.update(repr(questions(scene, random.Random(index))).encode())
    return digest.hexdigest()[:12]
