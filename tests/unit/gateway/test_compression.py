"""Compression that follows the load: how the level moves, and what it sets for whom."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from focusllava.v1 import encoder_pb2, llm_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.media import content_hash
from services.common.settings import build_settings
from services.common.types import ImageOptions
from services.gateway.admission import admit
from services.gateway.callers import Caller
from services.gateway.chat import ChatService
from services.gateway.compression import Compression, LoadCompression, LoadController
from services.gateway.deadline import Deadline
from services.gateway.deployment import GatewaySettings
from tests.fakes.stages import KEY, Encoder, LanguageModel, message_for, service, serving
from tests.unit.gateway.test_admission import LIMITS, PNG, USER, ask, turn

PACE_S = 0.25
"""From one first token to the next: four that wait are a second."""
SETTINGS = LoadCompression(
    map_share=(0.5, 0.2), threshold=(0.8, 0.6), levels=3, first_token_s=1, tighten_at=0.75, relax_at=0.25,
    tighten_after_s=1, relax_after_s=10,
)  # fmt: skip
"""The level rises where more than three wait, and falls where one does."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(clock: Clock, pace_s: float = PACE_S, settings: LoadCompression = SETTINGS) -> LoadController:
    """A controller that has seen first tokens come one by one, in this time."""
    load = LoadController(settings, clock)
    for _ in range(32):
        load.change(+1)
        clock.now += pace_s
        load.first_token()
    assert (load.waiting, load.level) == (0, 0)
    return load


def at_level(level: int) -> LoadController:
    clock = Clock()
    load = paced(clock)
    load.change(+3)
    for _ in range(level):
        clock.now += SETTINGS.tighten_after_s
        load.change(+1)
    assert load.level == level
    return load


def test_a_burst_is_met_at_once_by_its_size():
    load = paced(Clock())
    levels = []
    for _ in range(15):
        load.change(+1)
        levels.append(load.level)
    assert levels == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3], "three levels are all there are"
    load.change(-12)  # 3 wait: one more than is calm
    assert load.level == 3


def test_the_level_rises_step_by_step_and_falls_slowly():
    clock = Clock()
    load = paced(clock)
    load.change(+4)
    for seconds, level in ((0, 1), (0.5, 1), (0.5, 2), (1, 3), (5, 3)):
        clock.now += seconds
        assert load.level == level
    load.change(-2)  # 2 wait: between the bounds nothing moves, however long
    clock.now += 1000
    assert load.level == 3
    load.change(-2)
    for seconds, level in ((9.9, 3), (0.2, 2), (10, 1), (9, 1), (2, 0), (1000, 0)):
        clock.now += seconds
        assert load.level == level, seconds


def test_a_call_in_the_calm_does_not_start_it_anew_and_load_does():
    clock = Clock()
    load = paced(clock)
    load.change(+4)
    load.change(-4)
    for _ in range(9):
        clock.now += 1
        load.change(+1)
        load.change(-1)
    assert load.level == 1
    load.change(+2)
    load.change(-2)
    clock.now += 9
    assert load.level == 1
    clock.now += 1.1
    assert load.level == 0


def test_it_is_the_time_to_wait_that_counts_and_not_how_many_do():
    clock = Clock()
    fast, slow = paced(clock, pace_s=1 / 64), paced(clock, pace_s=0.5)
    fast.change(+48)
    slow.change(+2)
    assert (fast.wait_s, fast.level) == (0.75, 0)
    assert (slow.wait_s, slow.level) == (1.0, 1)
    # The fast one becomes slower: so does what it expects.
    for _ in range(64):
        clock.now += 0.5
        fast.first_token()
        fast.change(+1)
    assert fast.wait_s > 20 and fast.level == 3


def test_who_leaves_without_a_first_token_makes_nothing_faster():
    clock = Clock()
    load = paced(clock)
    load.change(+2)
    clock.now += PACE_S
    load.change(-1)
    clock.now += PACE_S
    load.first_token()
    assert load.wait_s == 0 and load.waiting == 0
    load.change(+1)
    assert load.wait_s > PACE_S, "two of the clock's steps for one first token"


def test_nothing_is_known_of_a_server_that_has_answered_nobody():
    load = LoadController(SETTINGS, Clock())
    load.change(+1000)
    assert (load.wait_s, load.level) == (0, 0)


def test_levels_go_evenly_between_the_bounds():
    assert [SETTINGS.at(level) for level in range(4)] == [
        Compression(),
        Compression(level=1, map_share=0.5, threshold=0.8),
        Compression(level=2, map_share=0.35, threshold=0.7),
        Compression(level=3, map_share=0.2, threshold=0.6),
    ]
    alone = LoadCompression(threshold=(0.8, 0.5), levels=1)
    assert alone.at(1) == Compression(level=1, threshold=0.5)


@pytest.mark.parametrize(
    "raw, says",
    [
        ({}, r"load_compression\.map_share: is None, expected \[gentle, tight\]"),
        ({"threshold": [0.5, 0.8]}, r"load_compression\.threshold: is \(0\.5, 0\.8\), expected"),
        ({"map_share": [0.5, 0]}, r"load_compression\.map_share\[1\]: is 0, expected"),
        ({"map_share": [0.5, 0.2], "relax_at": 0.6}, r"load_compression\.relax_at: is 0\.6, expected less than"),
        ({"map_share": [0.5, 0.2], "first_token_s": 0}, r"load_compression\.first_token_s: is 0, expected"),
        ({"map_share": [0.5, 0.2], "levels": 0}, r"load_compression\.levels: is 0, expected"),
    ],
)
def test_settings_that_cannot_be_are_refused(raw, says):
    with pytest.raises(InvalidInput, match=says):
        build_settings(GatewaySettings, {"checkpoint": "x", "load_compression": raw})


def test_it_only_tightens_what_the_checkpoint_has_on():
    config = FocusLlavaConfig.load("checkpoints/focusllava-tiny")
    LoadCompression(map_share=(0.5, 0.2), threshold=(config.text_sampler.threshold, 0.9)).check(config)
    with pytest.raises(InvalidInput, match=r"^load_compression\.threshold: is \(1\.0, 0\.9\), expected at most 0\.99"):
        LoadCompression(threshold=(1.0, 0.9)).check(config)
    for name, sampler in (("map_share", "vision_sampler"), ("threshold", "text_sampler")):
        off = dataclasses.replace(config, **{sampler: dataclasses.replace(getattr(config, sampler), enabled=False)})
        with pytest.raises(InvalidInput, match=rf"^load_compression\.{name}: is \(0\.5, 0\.2\), expected none"):
            LoadCompression(**{name: (0.5, 0.2)}).check(off)


def test_what_the_load_sets_and_for_whom():
    load = at_level(2)

    def compressed(change=lambda request: None, *parts):
        request = ask(turn(USER, *(parts or (PNG, PNG, "what?"))))
        change(request)
        before = admit(request, LIMITS, "r")
        return before, *load.compress(before)

    _, admitted, force = compressed()
    assert force == Compression(level=2, map_share=0.35, threshold=0.7)
    assert [image.options for image in admitted.images] == [ImageOptions(map_share=0.35)] * 2
    assert (admitted.samplers.threshold, admitted.samplers.keep_ratio) == (0.7, None)
    own = {
        "threshold": lambda request: setattr(request.prune, "threshold", 0.9),
        "keep_ratio": lambda request: setattr(request.prune, "keep_ratio", 0.9),
        "text_sampler": lambda request: setattr(request.prune, "off", True),
        "vision_sampler": lambda request: setattr(request, "vision_sampler_off", True),
        "map_share": lambda request: setattr(request.turns[0].parts[1].image_options, "map_share", 0.9),
    }
    for name, change in own.items():
        before, admitted, force = compressed(change)
        assert admitted is before and force == Compression(), name
    before, admitted, force = compressed(lambda request: None, "no image")
    assert admitted is before and force == Compression()
    assert LoadController(None).compress(before) == (before, Compression())


class Held(LanguageModel):
    """Answers once it may."""

    def __init__(self):
        super().__init__()
        self.may = asyncio.Event()

    async def Generate(self, request, context):
        self.requests.append(request)
        await self.may.wait()
        yield llm_pb2.GenerateResponse(token=llm_pb2.Token(text="seven", token_ids=[1]))
        yield llm_pb2.GenerateResponse(finished=llm_pb2.Finished(reason=llm_pb2.FINISH_REASON_STOP))


async def usage_of(chats: ChatService, request_id: str, image: bytes = PNG) -> llm_pb2.Usage:
    asked = ask(turn(USER, image, "what?"))
    events = [event async for event in chats.chat(asked, request_id, Deadline(), Caller())]
    return events[-1].finished.usage


async def test_requests_that_wait_have_the_next_ones_compressed_on_the_wire():
    encoder, model = Encoder(), Held()
    async with serving(model, encoder) as clients:
        chats, clock = service(*clients), Clock()
        chats.load = paced(clock)
        asked = []
        for number in range(6):
            clock.now += SETTINGS.tighten_after_s
            asked.append(asyncio.create_task(usage_of(chats, str(number), PNG + bytes([number]))))
            while len(model.requests) <= number:
                await asyncio.sleep(0.01)
        assert chats.load.waiting == 6
        model.may.set()
        usages = await asyncio.gather(*asked)
    assert chats.load.waiting == 0, "its first token ends a request's wait"
    levels = [usage.compression_level for usage in usages]
    assert levels == [0, 0, 0, 1, 2, 3], "the fourth is one more than may wait"
    assert [round(usage.load_map_share, 2) for usage in usages[3:]] == [0.5, 0.35, 0.2]
    assert [round(request.prune.threshold, 2) for request in model.requests] == [0, 0, 0, 0.8, 0.7, 0.6]
    assert [round(request.options.map_share, 2) for request in encoder.requests] == [0, 0, 0, 0.5, 0.35, 0.2]


class HashingEncoder(Encoder):
    """Answers with the image's own hash, so that the cache takes the answer for the image's."""

    async def Encode(self, request, context):
        self.requests.append(request)
        key = dataclasses.replace(KEY, content_hash=content_hash(request.image))
        return encoder_pb2.EncodeResponse(visual_tokens=message_for(key))


async def test_an_image_that_is_known_with_more_detail_is_not_encoded_again():
    encoder, model = HashingEncoder(), LanguageModel()
    fresh = PNG + b"1"
    async with serving(model, encoder) as clients:
        chats = service(*clients)
        await usage_of(chats, "calm")
        await chats._cache.flush()
        chats.load = at_level(1)
        await usage_of(chats, "fresh", fresh)
        await chats._cache.flush()
        chats.load = at_level(2)
        known, encoded_gently = await usage_of(chats, "known"), await usage_of(chats, "fresh again", fresh)
        tight = await usage_of(chats, "another", PNG + b"2")
        chats.load = LoadController(SETTINGS, Clock())
        await usage_of(chats, "calm again", fresh)
    shares = [round(request.options.map_share, 2) for request in encoder.requests]
    assert shares == [0, 0.5, 0.35, 0], "with the load gone, the image is encoded with all its detail"
    assert [usage.compression_level for usage in (known, encoded_gently, tight)] == [2, 2, 2]
    assert [round(usage.load_map_share, 2) for usage in (known, encoded_gently, tight)] == [0, 0, 0.35]
    assert [round(request.prune.threshold, 2) for request in model.requests] == [0, 0.8, 0.7, 0.7, 0.7, 0]


async def test_a_request_that_fails_or_leaves_waits_no_longer():
    model = Held()
    async with serving(model) as clients:
        chats = service(*clients)
        leaving = asyncio.create_task(usage_of(chats, "leaves"))
        while not model.requests:
            await asyncio.sleep(0.01)
        assert chats.load.waiting == 1
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert chats.load.waiting == 0
