"""Micro-batches that background processes read before they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch.utils.data

from services.common.errors import InternalError
from training.data.background import background
from training.data.reading import Read, Reader

Numbers = Callable[[int, int, int, int], tuple[int, ...]]
"""Numbers of the entries of a step's micro-batch on a rank of so many."""
_ROWS = ("input_ids", "labels", "instruction")


class Ahead:
    """Micro-batches that background processes have begun: those that follow the one asked for last."""

    def __init__(self, reader: Reader, numbers: Numbers, *, accumulation: int, processes: int, prefetch: int):
        """numbers: the numbers of the entries of a micro-batch; accumulation: micro-batches of a step."""
        self.numbers, self.accumulation, self.processes = numbers, accumulation, processes
        self.due = (0, 0, 0, 1)
        """The step, micro-batch, rank and world size that come next."""
        self._iterator: Iterator[tuple[Read, torch.Tensor]] | None = None
        self._workers = torch.utils.data.DataLoader(
            reader,
            batch_size=None,
            sampler=self,  # type: ignore[arg-type]
            num_workers=processes,
            prefetch_factor=math.ceil(prefetch / processes),
            multiprocessing_context=background(),
            persistent_workers=True,
            collate_fn=pack,
            generator=torch.Generator(),  # of its own: the training's random state is left as it is
        )

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The entries of the micro-batches from `due` on."""
        step, micro, rank, world_size = self.due
        while True:
            yield self.numbers(step, micro, rank, world_size)
            step, micro = self._after(step, micro)

    def read(self, place: tuple[int, int, int, int]) -> Read:
        """The micro-batch of a step, micro-batch, rank and world size."""
        try:
            if self._iterator is None or place != self.due:
                self.due = place
                self._iterator = iter(self._workers)
            step, micro, rank, world_size = place
            self.due = (*self._after(step, micro), rank, world_size)
            return unpack(next(self._iterator))
        except (RuntimeError, OSError, EOFError) as error:  # the last two: what it had read is gone with it
            if str(error).startswith("Caught"):  # it lives, and this is what went wrong in it
                raise
            raise InternalError(
                f"one of the {self.processes} processes that read the data has died, of too little memory perhaps: "
                f"{error or type(error).__name__}",
                field="data",
            ) from None

    def process_ids(self) -> list[int]:
        return [process.pid for process in getattr(self._iterator, "_workers", ())]

    def _after(self, step: int, micro: int) -> tuple[int, int]:
        return (step, micro + 1) if micro + 1 < self.accumulation else (step + 1, 0)


def pack(read: Any) -> tuple[Read, torch.Tensor]:
    """All images' pixels as one tensor, which goes through shared memory; the rest goes through a pipe as arrays.

    A tensor of its own would cost each a file descriptor and a connection.
    """
    pixels = [image.pixels_T3HW.flatten() for one in read.sequences for image in one.images]
    packed = [
        replace(
            one,
            **{name: getattr(one, name).numpy() for name in _ROWS},
            images=tuple(replace(image, pixels_T3HW=image.pixels_T3HW.shape) for image in one.images),
        )
        for one in read.sequences
    ]
    return replace(read, sequences=packed), torch.cat(pixels) if pixels else torch.empty(0)


def unpack(packed: tuple[Read, torch.Tensor]) -> Read:
    """What `pack` was given; the pixels are views of the one tensor."""
    read, pixels = packed
    sequences, at = [], 0
    for one in read.sequences:
        images = []
        for image in one.images:
            shape: Any = image.pixels_T3HW
            size = math.prod(shape)
            images.append(replace(image, pixels_T3HW=pixels[at : at + size].view(shape)))
            at += size
        rows: dict[str, Any] = {name: torch.from_numpy(getattr(one, name)) for name in _ROWS}
        sequences.append(replace(one, **rows, images=tuple(images)))
    return replace(read, sequences=sequences)
