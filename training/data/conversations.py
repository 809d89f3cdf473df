"""Batches from conversations in LLaVA's JSON format: [{"image": path, "conversations": [{"from", "value"}]}]."""

from __future__ import annotations

import json
import pathlib
import random
from functools import lru_cache
from typing import Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.media import open_image
from services.encoder.anyres import tile_image
from training.config import ConfigError
from training.data.branches import BranchBuilder, Exchange
from training.layout import Sample

IMAGE_MARK = "<image>"


class ConversationBatches:
    """One image an entry, paths relative to the file. Each epoch has its own order; (step, rank) fixes a batch."""

    def __init__(self, config: FocusLlavaConfig, builder: BranchBuilder, path: pathlib.Path, *, seed: int, images: int):
        self.config, self.builder, self.folder = config, builder, path.parent
        self.seed, self.images = seed, images
        try:
            self.entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"stage.data: {path} cannot be read: {error}") from None
        self.exchanges = [read_exchanges(entry, index) for index, entry in enumerate(self.entries)]
        if not self.exchanges:
            raise ConfigError(f"stage.data: {path} is empty")
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, rank: int, world_size: int) -> list[Sample]:
        first = (step * world_size + rank) * self.images
        return [self.sample(self._at(first + n)) for n in range(self.images)]

    def sample(self, index: int) -> Sample:
        path = self.folder / self.entries[index]["image"]
        try:
            image = open_image(path.read_bytes(), field=str(path)).image
        except OSError as error:
            raise ConfigError(f"stage.data[{index}].image: {error}") from None
        config = self.config
        tiles = tile_image(
            image,
            tile_px=config.tile_px,
            pinpoints=config.image_grid_pinpoints,
            mean=config.image_mean,
            std=config.image_std,
        )
        exchanges = self.exchanges[index]
        built = [self.builder.build(exchange, exchanges[:n]) for n, exchange in enumerate(exchanges)]
        return Sample(image=tiles, prefix_ids=built[0][0], branches=tuple(branch for _, branch in built))

    def _at(self, position: int) -> int:
        epoch, within = divmod(position, len(self.entries))
        return self._order(epoch)[within]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.entries)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


def read_exchanges(entry: dict[str, Any], index: int) -> list[Exchange]:
    """Human and assistant turns in pairs; raises ConfigError naming the entry."""
    turns = entry.get("conversations")
    if not entry.get("image") or not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ConfigError(f"stage.data[{index}]: expected an image and an even number of conversation turns")
    exchanges = []
    for human, model in zip(turns[::2], turns[1::2], strict=True):
        if human.get("from") != "human" or model.get("from") != "gpt":
            raise ConfigError(f"stage.data[{index}]: turns must alternate between 'human' and 'gpt'")
        question = human["value"].replace(IMAGE_MARK, "").strip()
        exchanges.append(Exchange(question=question, answer=model["value"].strip()))
    return exchanges
