"""A small random checkpoint and conversations of every kind, for the tests of the model."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.types import ImageTiles
from services.encoder.reading import read_tiles
from services.modeling import FocusLlavaForConditionalGeneration
from services.modeling.loss import IGNORED
from services.modeling.packing import TrainedSequence
from tests.serving_client import picture
from tests.tiny_checkpoints import make_random_checkpoint

SIZES_WH = ((56, 40), (80, 30), (90, 90), (28, 28), (30, 100))


def checkpoint(folder: pathlib.Path, family: str = "llama", **fields) -> pathlib.Path:
    fields = {"layers": 4, "hidden": 32, "vision_width": 32, "vision_layers": 2, **fields}
    make_random_checkpoint(folder, family, **fields)
    return folder


def load(folder: pathlib.Path) -> FocusLlavaForConditionalGeneration:
    return FocusLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def image(config: FocusLlavaConfig, seed: int) -> ImageTiles:
    return read_tiles(picture(seed, SIZES_WH[seed % len(SIZES_WH)]), config)[0]


def sequence(config: FocusLlavaConfig, layout: str, seed: int = 0, first_image: int = 0) -> TrainedSequence:
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
    return TrainedSequence(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        instruction=torch.tensor(instruction),
        images=tuple(images),
        name=f"{layout}/{seed}",
    )


KINDS = ("tiutata", "tuatiiuta", "tutata", "tiua", "titaua", "tit")
"""Several turns; several images, late and together; text alone; one question; words before an answer only; no answer
and no instruction."""


def branched(config: FocusLlavaConfig, prefix: str, *branches: str, seed: int = 0) -> TrainedSequence:
    """Branches that share a prefix, spelt as for `sequence`."""
    parts = [sequence(config, layout, seed=seed + n, first_image=seed) for n, layout in enumerate((prefix, *branches))]
    return TrainedSequence(
        input_ids=torch.cat([part.input_ids for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        instruction=torch.cat([part.instruction for part in parts]),
        images=tuple(image for part in parts for image in part.images),
        branches=tuple(len(part.input_ids) for part in parts[1:]),
    )


def alone(config: FocusLlavaConfig, each: TrainedSequence) -> list[TrainedSequence]:
    """A conversation for every branch: the prefix, then the branch."""
    split = (getattr(each, name).split(each.parts) for name in ("input_ids", "labels", "instruction"))
    prefix, *branches = zip(*split, strict=True)
    images = iter(each.images)

    def own(ids: torch.Tensor) -> tuple[ImageTiles, ...]:
        return tuple(next(images) for _ in range(int((ids == config.image_token_id).sum())))

    shared, found = own(prefix[0]), []
    for branch in branches:
        ids, labels, instruction = (torch.cat(both) for both in zip(prefix, branch, strict=True))
        labels[len(prefix[0])] = IGNORED  # as in a branch, nothing predicts its first token
        images_of = (*shared, *own(branch[0]))
        found.append(TrainedSequence(input_ids=ids, labels=labels, instruction=instruction, images=images_of))
    return found


def batch(config: FocusLlavaConfig, kinds: Sequence[str] = KINDS) -> list[TrainedSequence]:
    return [sequence(config, kind, seed=n, first_image=n) for n, kind in enumerate(kinds)]
