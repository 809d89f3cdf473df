"""Batches the tiles of many requests under a tile budget, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.common.recent_mean import RecentMean
from services.common.types import CompressedVisualTokens, ImageOptions
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
    """Decodes on a small thread pool, encodes on one thread of its own; a batch is what waits when that thread is free.

    First come, first served. The images of the next batches are decoded while the model runs, but only two batches
    ahead: a file is small, its tiles are not.
    """

    def __init__(self, pipeline: EncoderPipeline, *, max_tiles: int = 40, max_wait_s: float = 0.002,
                 decode_threads: int = 2, on_batch: Callable[[int], None] | None = None):  # fmt: skip
        """max_tiles: most tiles of a batch (one larger image goes alone). max_wait_s: how long an image waits for
        others that are being decoded; with none on its way it does not wait. on_batch: hears each batch's tiles."""
        self.pipeline = pipeline
        self.max_tiles, self.max_wait_s = max_tiles, max_wait_s
        self._on_batch = on_batch
        self._decode = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._encode = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._ready: deque[_Waiting] = deque()
        self._ready_tiles = 0
        self._coming = 0
        """Requests that are not ready yet."""
        self._encoding_tiles = 0
        """Tiles of the batch under way."""
        self._tiles_an_image = RecentMean()
        self._decoders = asyncio.Semaphore(decode_threads)
        self._changed = asyncio.Event()
        """Something became ready, or will not."""
        self._room = asyncio.Event()
        self._room.set()
        self._loop_task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Images decoded and not in a batch yet."""
        return len(self._ready)

    @property
    def waiting_tiles(self) -> int:
        """Tiles of these images."""
        return self._ready_tiles

    def tiles(self, more: int = 0) -> float:
        """Tiles that are encoded or wait for it, where `more` images are still to come here.

        Of an image that is not decoded nobody has counted the tiles: it counts as the latest ones on average.
        """
        unknown = self._coming + more
        return self._encoding_tiles + self._ready_tiles + unknown * self._tiles_an_image.value

    async def encode(
        self, image: bytes, vision_sampler: bool, options: ImageOptions | None = None
    ) -> CompressedVisualTokens:
        """Raises what `EncoderPipeline.prepare` raises; a bad image never reaches a batch. Cancelled by `close`."""
        loop = asyncio.get_running_loop()
        self._coming += 1
        try:
            async with self._decoders:  # its waiters are served in order
                await self._room.wait()
                self._check_open()
                if self._loop_task is None or self._loop_task.done():
                    self._loop_task = loop.create_task(self._run())
                prepared = await loop.run_in_executor(
                    self._decode, self.pipeline.prepare, image, vision_sampler, options
                )
                self._check_open()
                waiting = _Waiting(prepared, vision_sampler, loop.create_future())
                self._ready.append(waiting)
                self._tiles_an_image.add(waiting.tiles)
                self._count(waiting.tiles)
        finally:
            self._coming -= 1
            self._changed.set()
        return await waiting.result

    async def close(self) -> None:
        """Cancels the callers that still wait."""
        self._closed = True
        if self._loop_task:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        for waiting in self._ready:
            waiting.result.cancel()
        self._ready.clear()
        self._count(-self._ready_tiles)  # those that wait for room find it closed
        self._decode.shutdown(wait=False)
        self._encode.shutdown(wait=False)

    def _check_open(self) -> None:
        if self._closed:
            raise asyncio.CancelledError("the batcher is closed")

    def _count(self, tiles: int) -> None:
        self._ready_tiles += tiles
        if self._ready_tiles < 2 * self.max_tiles:
            self._room.set()
        else:
            self._room.clear()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            self._encoding_tiles = sum(waiting.tiles for waiting in batch)
            try:
                if self._on_batch:
                    self._on_batch(self._encoding_tiles)
                results = await loop.run_in_executor(
                    self._encode, self.pipeline.encode, [w.image for w in batch], [w.vision_sampler for w in batch]
                )
            except asyncio.CancelledError:
                for waiting in batch:
                    waiting.result.cancel()
                raise
            except Exception as error:
                for waiting in batch:
                    if not waiting.result.done():
                        waiting.result.set_exception(error)
                continue
            finally:
                self._encoding_tiles = 0
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.result.done():
                    waiting.result.set_result(result)

    async def _next_batch(self) -> list[_Waiting]:
        """Waits for an image, then a moment for those that are being decoded; takes what fits, in order."""
        while not self._ready:
            await self._change(None)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.max_wait_s
        while self._coming and self._ready_tiles < self.max_tiles and loop.time() < deadline:
            await self._change(deadline - loop.time())
        batch: list[_Waiting] = []
        tiles = 0
        while self._ready and (not batch or tiles + self._ready[0].tiles <= self.max_tiles):
            waiting = self._ready.popleft()
            self._count(-waiting.tiles)
            # A caller that went away is not encoded.
            if not waiting.result.done():
                batch.append(waiting)
                tiles += waiting.tiles
        return batch

    async def _change(self, timeout_s: float | None) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
