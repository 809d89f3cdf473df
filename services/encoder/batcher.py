"""Batches the tiles of many requests under a tile budget, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.common.types import CompressedVisualTokens
from services.encoder.pipeline import EncoderPipeline, PreparedImage


@dataclass(frozen=True)
class _Waiting:
    image: PreparedImage
    vision_sampler: bool
    result: asyncio.Future[CompressedVisualTokens]

    @property
    def tiles(self) -> int:
        return len(self.image.tiles.pixels_T3HW)


class TileBatcher:
    """Decodes on a small thread pool, encodes on one thread of its own; a batch is what waits when the thread is free.

    max_tiles bounds a batch (one larger image goes alone). max_wait_s is how long a first request waits for company.
    on_batch hears the tiles of each batch.
    """

    def __init__(self, pipeline: EncoderPipeline, *, max_tiles: int = 40, max_wait_s: float = 0.002,
                 decode_threads: int = 2, on_batch: Callable[[int], None] | None = None):  # fmt: skip
        self.pipeline = pipeline
        self.max_tiles, self.max_wait_s = max_tiles, max_wait_s
        self._on_batch = on_batch
        self._decode = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._encode = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def encode(self, image: bytes, vision_sampler: bool) -> CompressedVisualTokens:
        """Raises what `EncoderPipeline.prepare` raises; a bad image never reaches a batch."""
        loop = asyncio.get_running_loop()
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = loop.create_task(self._run())
        prepared = await loop.run_in_executor(self._decode, self.pipeline.prepare, image)
        waiting = _Waiting(prepared, vision_sampler, loop.create_future())
        self._queue.put_nowait(waiting)
        return await waiting.result

    async def close(self) -> None:
        if self._loop_task:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        self._decode.shutdown(wait=False)
        self._encode.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        held: _Waiting | None = None
        while True:
            batch = [held or await self._queue.get()]
            held = None
            if self._queue.empty():
                await asyncio.sleep(self.max_wait_s)
            while not self._queue.empty():
                waiting = self._queue.get_nowait()
                if sum(w.tiles for w in batch) + waiting.tiles > self.max_tiles:
                    held = waiting
                    break
                batch.append(waiting)
            # A caller that went away is not encoded.
            batch = [w for w in batch if not w.result.done()]
            if not batch:
                continue
            if self._on_batch:
                self._on_batch(sum(w.tiles for w in batch))
            try:
                results = await loop.run_in_executor(
                    self._encode, self.pipeline.encode, [w.image for w in batch], [w.vision_sampler for w in batch]
                )
            except Exception as error:
                for waiting in batch:
                    if not waiting.result.done():
                        waiting.result.set_exception(error)
                continue
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.result.done():
                    waiting.result.set_result(result)
