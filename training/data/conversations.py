"""Batches from conversations in LLaVA's JSON format: [{"image": path, "conversations": [{"from", "value"}]}]."""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
from functools import lru_cache
from typing import Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import FocusError, InvalidInput
from services.encoder.anyres import any_map_left
from services.encoder.reading import read_tiles
from training.data.branches import BranchBuilder, Exchange
from training.layout import Branch, Sample

IMAGE_MARK = "<image>"


class ConversationBatches:
    """One image an entry, paths relative to the file. Each epoch has its own order; (step, rank) fixes a batch."""

    def __init__(self, config: FocusLlavaConfig, builder: BranchBuilder, path: pathlib.Path, *, seed: int, images: int):
        self.config, self.builder, self.folder = config, builder, path.parent
        self.seed, self.images = seed, images
        try:
            text = path.read_bytes()
            self.entries: list[dict[str, Any]] = json.loads(text)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} cannot be read: {error}", field="stage.data") from None
        if not isinstance(self.entries, list) or not self.entries:
            raise InvalidInput(f"{path} is not a list of conversations", field="stage.data")
        self.exchanges = [read_exchanges(entry, index) for index, entry in enumerate(self.entries)]
        self.identity = hashlib.sha256(text).hexdigest()
        """A hash of the file: with another order or other entries it is another run."""
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, rank: int, world_size: int) -> list[Sample]:
        first = (step * world_size + rank) * self.images
        return [self.sample(self._at(first + n)) for n in range(self.images)]

    def sample(self, index: int) -> Sample:
        path = self.folder / self.entries[index]["image"]
        try:
            tiles, _ = read_tiles(path.read_bytes(), self.config, field=str(path))
        except (OSError, FocusError) as error:
            raise InvalidInput(str(error), field=f"stage.data[{index}].image") from None
        if not any_map_left(tiles, self.config.patches_per_side):
            height, width = tiles.image_size_hw
            raise InvalidInput(
                f"{path} is {width} x {height} pixels, too narrow a strip", field=f"stage.data[{index}].image"
            )
        built = [self._branch(index, turn) for turn in range(len(self.exchanges[index]))]
        return Sample(image=tiles, prefix_ids=built[0][0], branches=tuple(branch for _, branch in built))

    def _branch(self, index: int, turn: int) -> tuple[tuple[int, ...], Branch]:
        exchanges, field = self.exchanges[index], f"stage.data[{index}].conversations[{2 * turn}]"
        try:
            words, branch = self.builder.build(exchanges[turn], exchanges[:turn])
        except FocusError as error:
            raise InvalidInput(str(error), field=field) from None
        if (tokens := len(words) + len(branch.token_ids)) >= (context := self.builder.renderer.context):
            raise InvalidInput(f"{tokens} tokens with its answer, the model's context is {context}", field=field)
        return words, branch

    def _at(self, position: int) -> int:
        epoch, within = divmod(position, len(self.entries))
        return self._order(epoch)[within]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.entries)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


def read_exchanges(entry: Any, index: int) -> list[Exchange]:
    """Human and assistant turns in pairs; raises InvalidInput naming the entry and what is wrong with it."""
    field = f"stage.data[{index}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
        raise InvalidInput(f"{str(entry)[:60]} has no `image`, the path of one", field=field)
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise InvalidInput(f"{str(turns)[:60]} is not an even number of turns", field=f"{field}.conversations")
    said = []
    for n, turn in enumerate(turns):
        who = ("human", "gpt")[n % 2]
        if not isinstance(turn, dict) or turn.get("from") != who or not isinstance(turn.get("value"), str):
            raise InvalidInput(
                f"{str(turn)[:60]} is not {{from: {who}, value: words}}", field=f"{field}.conversations[{n}]"
            )
        said.append(turn["value"].replace(IMAGE_MARK, "").strip() if who == "human" else turn["value"].strip())
        if not said[-1]:
            raise InvalidInput(f"{turn['value']!r} has no words", field=f"{field}.conversations[{n}].value")
    return [Exchange(question=ask, answer=answer) for ask, answer in zip(said[::2], said[1::2], strict=True)]
