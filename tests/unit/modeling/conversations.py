"""A small random checkpoint and conversations of every kind, for the tests of the model."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.types import ImageTiles
from services.encoder.reading import read_tiles
from services.modeling import FocusLlavaForConditionalGeneration
from tests.serving_client import picture
from tests.tiny_checkpoints import make_random_checkpoint
from training.sequence import IGNORED, TrainingSequence

SIZES_WH = ((56, 40), (80, 30), (90, 90), (28, 28), (30, 100))


def checkpoint(folder: pathlib.Path, family: str = "llama", **fields) -> pathlib.Path:
    fields = {"layers": 4, "hidden": 32, "vision_width": 32, "vision_layers": 2, **fields}
    make_random_checkpoint(folder, family, **fields)
    return folder


def load(folder: pathlib.Path) -> FocusLlavaForConditionalGeneration:
    return FocusLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def image(config: FocusLlavaConfig, seed: int) -> ImageTiles:
    return read_tiles(picture(seed, SIZES_WH[seed % len(SIZES_WH)]), config)[0]


def sequence(config: FocusLlavaConfig, layout: str, seed: int = 0, first_image: int = 0) -> TrainingSequence:
    """A conversation of random words: "i" is an image, "u" five words of the user, "a" four of an answer, "t" two of
    the template."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, instruction, images = [], [], [], []
    for kind in layout:
        if kind == "i":
            ids += [config.image_token_id]
            labels += [IGNORED]
            instruction += [False]
            images.append(image(config, first_image + len(images)))
            continue
        words = torch.randint(10, 250, ({"u": 5, "a": 4, "t": 2}[kind],), generator=generator).tolist()
        ids += words
        labels += words if kind == "a" else [IGNORED] * len(words)
        instruction += [kind == "u"] * len(words)
    return TrainingSequence(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        instruction=torch.tensor(instruction),
        images=tuple(images),
        name=f"{layout}/{seed}",
    )


KINDS = ("tiutata", "tuatiiuta", "tutata", "tiua", "titaua", "tit")
"""Several turns; several images, late and together; text alone; one question; words before an answer only; no answer
and no instruction."""


def batch(config: FocusLlavaConfig, kinds: Sequence[str] = KINDS) -> list[TrainingSequence]:
    return [sequence(config, kind, seed=n, first_image=n) for n, kind in enumerate(kinds)]
