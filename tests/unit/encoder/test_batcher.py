"""The tile batcher on a real (tiny) encoder: batches under the budget, order, no needless wait, errors, abandonment."""

from __future__ import annotations

import asyncio
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from services.common.errors import InvalidInput
from services.encoder.batcher import TileBatcher
from services.encoder.pipeline import EncoderPipeline
from tests.tiny_checkpoints import make_random_checkpoint


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> EncoderPipeline:
    folder = tmp_path_factory.mktemp("encoder") / "checkpoint"
    make_random_checkpoint(folder)
    return EncoderPipeline.from_checkpoint(folder)


class Recorded(EncoderPipeline):
    """A real pipeline that remembers its batches and, while `gate` or `decode_gate` is cleared, holds its threads."""

    def __init__(self, inner: EncoderPipeline):
        super().__init__(inner.model, inner.fingerprint, inner.limits)
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.decode_gate = threading.Event()
        self.decode_gate.set()
        self.decoding = threading.Event()
        self.prepared = 0

    def prepare(self, image, vision_sampler=True, options=None):
        self.prepared += 1
        self.decoding.set()
        self.decode_gate.wait()
        return super().prepare(image, vision_sampler, options)

    def encode(self, images, vision_sampler):
        self.batches.append([image.content_hash for image in images])
        self.entered.set()
        self.gate.wait()
        return super().encode(images, vision_sampler)


def png(seed: int, height: int = 56, width: int = 56) -> bytes:
    """56 x 56 is a base tile and 2 x 2 grid tiles of 28 px: five tiles."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_batch_answers_as_each_image_alone_and_keeps_within_the_budget(pipeline):
    recorded, tiles = Recorded(pipeline), []
    batcher = TileBatcher(recorded, max_tiles=12, max_wait_s=0.05, on_batch=tiles.append)
    flags = [index % 2 == 0 for index in range(9)]
    files = [png(index, 56, 28 if index % 3 else 84) for index in range(9)]
    results = await asyncio.gather(*map(batcher.encode, files, flags))
    await batcher.close()
    assert max(tiles) <= 12 and len(tiles) < 9
    assert sum(map(len, recorded.batches)) == 9
    for file, flag, result in zip(files, flags, results, strict=True):
        (alone,) = pipeline.encode([pipeline.prepare(file)], [flag])
        assert result.content_hash == alone.content_hash and result.map_hw == alone.map_hw
        torch.testing.assert_close(result.tokens_ND, alone.tokens_ND, rtol=1e-4, atol=1e-5)


async def test_an_image_larger_than_the_budget_goes_alone(pipeline):
    tiles: list[int] = []
    batcher = TileBatcher(pipeline, max_tiles=2, on_batch=tiles.append)
    await asyncio.gather(*(batcher.encode(png(seed), False) for seed in range(3)))
    await batcher.close()
    assert tiles == [5, 5, 5]


async def test_what_arrives_while_the_model_runs_is_the_next_batch_in_order(pipeline):
    recorded = Recorded(pipeline)
    recorded.gate.clear()
    batcher = TileBatcher(recorded, max_tiles=40, decode_threads=1)
    calls = [asyncio.create_task(batcher.encode(png(0), False))]
    await until(recorded.entered.is_set)
    for seed in range(1, 5):
        calls.append(asyncio.create_task(batcher.encode(png(seed), False)))
    await until(lambda: batcher.waiting == 4 and batcher.waiting_tiles >= 4)
    recorded.gate.set()
    results = await asyncio.gather(*calls)
    await batcher.close()
    hashes = [result.content_hash for result in results]
    assert recorded.batches == [hashes[:1], hashes[1:]]


async def test_a_lone_image_waits_for_nobody(pipeline):
    batcher = TileBatcher(pipeline, max_wait_s=3600)
    async with asyncio.timeout(60):
        await batcher.encode(png(0), True)
    await batcher.close()


async def test_a_failed_image_ends_the_wait_of_its_neighbour(pipeline):
    batcher = TileBatcher(pipeline, max_wait_s=3600, decode_threads=1)
    async with asyncio.timeout(60):
        good, bad = await asyncio.gather(
            batcher.encode(png(0), True), batcher.encode(b"not an image", True), return_exceptions=True
        )
    await batcher.close()
    assert isinstance(bad, InvalidInput) and not isinstance(good, BaseException)


async def test_only_two_batches_are_decoded_ahead(pipeline):
    recorded = Recorded(pipeline)
    recorded.gate.clear()
    batcher = TileBatcher(recorded, max_tiles=5, decode_threads=1)
    calls = [asyncio.create_task(batcher.encode(png(seed), False)) for seed in range(12)]
    await until(recorded.entered.is_set)
    await until(lambda: batcher.waiting == 2)
    await asyncio.sleep(0.05)
    assert batcher.waiting == 2 and recorded.prepared == 3
    recorded.gate.set()
    assert len(await asyncio.gather(*calls)) == 12
    await batcher.close()


async def test_a_caller_that_left_is_not_encoded(pipeline):
    recorded = Recorded(pipeline)
    recorded.gate.clear()
    batcher = TileBatcher(recorded, max_tiles=40, decode_threads=1)
    first = asyncio.create_task(batcher.encode(png(0), False))
    await until(recorded.entered.is_set)
    left, stays = (asyncio.create_task(batcher.encode(png(seed), False)) for seed in (1, 2))
    await until(lambda: batcher.waiting == 2)
    left.cancel()
    recorded.gate.set()
    await asyncio.gather(first, stays)
    await batcher.close()
    assert [len(batch) for batch in recorded.batches] == [1, 1]


async def test_the_event_loop_goes_on_while_an_image_is_encoded(pipeline):
    recorded = Recorded(pipeline)
    recorded.gate.clear()
    batcher = TileBatcher(recorded)
    call = asyncio.create_task(batcher.encode(png(0), False))
    await until(recorded.entered.is_set)  # the loop answers while the encoding thread is held
    recorded.gate.set()
    await call
    await batcher.close()


async def test_a_metric_that_fails_is_an_answer_and_not_the_end(pipeline):
    calls = []

    def hear(tiles: int) -> None:
        calls.append(tiles)
        if len(calls) == 1:
            raise RuntimeError("no metrics")

    batcher = TileBatcher(pipeline, on_batch=hear)
    async with asyncio.timeout(60):
        with pytest.raises(RuntimeError, match="no metrics"):
            await batcher.encode(png(0), True)
        assert (await batcher.encode(png(0), True)).tokens_ND.numel()
    await batcher.close()


async def test_closing_leaves_no_caller_waiting(pipeline):
    recorded = Recorded(pipeline)
    recorded.gate.clear()
    batcher = TileBatcher(recorded, max_tiles=5, decode_threads=1)
    # One is in the model, two are ready, three wait until there is room for what they decode to.
    calls = [asyncio.create_task(batcher.encode(png(seed), False)) for seed in range(6)]
    await until(recorded.entered.is_set)
    await until(lambda: batcher.waiting == 2)
    await batcher.close()
    async with asyncio.timeout(30):
        results = await asyncio.gather(*calls, return_exceptions=True)
        late = await asyncio.gather(batcher.encode(png(0), False), return_exceptions=True)
    recorded.gate.set()
    assert all(isinstance(result, asyncio.CancelledError) for result in (*results, *late))
    assert batcher.waiting == 0 and recorded.prepared == 3


async def test_closing_ends_the_wait_of_what_is_being_decoded(pipeline):
    recorded = Recorded(pipeline)
    recorded.decode_gate.clear()
    batcher = TileBatcher(recorded)
    call = asyncio.create_task(batcher.encode(png(0), False))
    await until(recorded.decoding.is_set)
    await batcher.close()
    recorded.decode_gate.set()
    async with asyncio.timeout(30):
        assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], asyncio.CancelledError)
    assert batcher.waiting == 0


async def test_the_tiles_that_it_has_are_those_under_way_those_ready_and_an_estimate_of_the_rest(pipeline):
    recorded = Recorded(pipeline)
    batcher = TileBatcher(recorded, max_tiles=5, max_wait_s=0, decode_threads=1)
    assert batcher.tiles(more=7) == 0, "of images nobody has seen one yet"
    recorded.gate.clear()
    running = asyncio.create_task(batcher.encode(png(0), True))
    await until(recorded.entered.is_set)
    assert batcher.tiles() == 5
    waiting = asyncio.create_task(batcher.encode(png(1), True))
    await until(lambda: batcher.waiting == 1)
    assert batcher.tiles() == 10
    recorded.decode_gate.clear()
    undecoded = [asyncio.create_task(batcher.encode(png(2), True)) for _ in range(3)]
    await asyncio.sleep(0)
    assert batcher.tiles() == 25 and batcher.tiles(more=2) == 35
    recorded.decode_gate.set()
    recorded.gate.set()
    await asyncio.gather(running, waiting, *undecoded)
    assert batcher.tiles() == 0
    await batcher.close()
