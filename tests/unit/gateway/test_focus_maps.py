"""Focus maps over gRPC and HTTP: the shipped model's two stages behind real sockets, against LocalModel."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from focusllava import FocusMaps, LocalModel, Turn, assistant, user
from focusllava.focus_maps import focus_maps as read_maps
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, llm_pb2_grpc
from focusllava.wire import build_request
from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.types import CompressedVisualTokens
from services.encoder.pipeline import EncoderPipeline
from services.focus_maps import compose
from services.gateway.admission import AdmissionLimits, ImageSizes
from services.gateway.cache import VisualTokenCache
from services.gateway.callers import Caller
from services.gateway.chat import ChatService
from services.gateway.deadline import Deadline
from services.gateway.health import Health
from services.gateway.keys import Keys
from services.gateway.openai.http import HttpDoor
from services.gateway.stages import EncoderClient, LanguageModelClient, StageAddress
from services.gateway.stores import InProcessStore
from services.llm.async_engine import AsyncEngine
from services.llm.engine import Engine
from tests.fakes.stages import DIED, METRICS

ROOT = pathlib.Path(__file__).parents[3]
CHECKPOINT, SAMPLE = ROOT / "checkpoints" / "focusllava-tiny", (ROOT / "docs" / "assets" / "sample.png").read_bytes()
RED, YELLOW = "What number is on the red card?", "What word is on the yellow card?"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.5},
    {"threshold": 1.0},
    {"keep_ratio": 0.2},
    {"text_sampler": False},
    {"vision_sampler": False},
    {"vision_sampler": False, "text_sampler": False},
    {"map_share": 0.2},
    {"detail": "low"},
]


def turned_photo() -> bytes:
    """A JPEG that is decoded at reduced scale, stored on its side: 1,400 x 2,100 px upright."""
    image = Image.open(io.BytesIO(SAMPLE)).convert("RGB").resize((2100, 1400))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn to the right
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


PHOTO = turned_photo()


class Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    """The real pipeline; `sized` off leaves out the image's size, as an older version does."""

    def __init__(self) -> None:
        self.pipeline = EncoderPipeline.from_checkpoint(CHECKPOINT)
        self.sized = True

    async def Encode(self, request, context):
        options = wire.image_options_from_proto(request.options)
        prepared = self.pipeline.prepare(request.image, request.vision_sampler, options)
        (tokens,) = self.pipeline.encode([prepared], [request.vision_sampler])
        message = wire.tokens_to_proto(tokens)
        if not self.sized:
            message.image_height = message.image_width = 0
        return encoder_pb2.EncodeResponse(visual_tokens=message)


class LanguageModel(llm_pb2_grpc.LanguageModelServiceServicer):
    """The real engine. `lost_after` holds an entry a call: after so many events the stage is lost; None is never."""

    def __init__(self) -> None:
        self.engine = AsyncEngine(Engine.from_checkpoint(CHECKPOINT))
        self.lost_after: list[int | None] = []
        self.sent: list[str] = []

    async def Generate(self, request, context):
        lost_after = self.lost_after.pop(0) if self.lost_after else None
        asked = wire.generate_request_from_proto(request)
        async with contextlib.aclosing(self.engine.generate(asked)) as events:
            count = 0
            async for event in events:
                if count == lost_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, DIED)
                count += 1
                message = wire.event_to_proto(event)
                self.sent.append(message.WhichOneof("event"))
                yield message


@dataclass
class Served:
    encoder: Encoder
    model: LanguageModel
    service: ChatService
    http: httpx2.AsyncClient

    async def events(self, turns: list[Turn], **settings: Any) -> list[focus_pb2.ChatResponse]:
        request = build_request(turns, **settings)
        chat = self.service.chat(request, "r", Deadline(), Caller())
        return [event async for event in chat]

    async def post(self, stream: bool, images: list[bytes], detail: str = "auto", **focus: Any) -> httpx2.Response:
        urls = [f"data:;base64,{base64.b64encode(image).decode()}" for image in images]
        content = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
        body = {
            "model": "tiny",
            "stream": stream,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": RED}]}],
            "focus": focus,
        }
        return await self.http.post("/v1/chat/completions", json=body)


@pytest.fixture(scope="module")
def stages() -> Iterator[tuple[Encoder, LanguageModel]]:
    encoder, model = Encoder(), LanguageModel()
    yield encoder, model
    model.engine.close()


@pytest.fixture
async def served(stages: tuple[Encoder, LanguageModel]) -> AsyncIterator[Served]:
    encoder, model = stages
    encoder.sized, model.lost_after, model.sent = True, [], []
    server = grpc.aio.server()
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoder, server)
    llm_pb2_grpc.add_LanguageModelServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = StageAddress(target=f"127.0.0.1:{port}", backoff_s=0.01)
    clients = EncoderClient(address, encoder.pipeline.fingerprint, METRICS), LanguageModelClient(address, METRICS)
    service = ChatService(
        model_fingerprint=encoder.pipeline.fingerprint,
        config=FocusLlavaConfig.load(CHECKPOINT),
        encoder=clients[0],
        language_model=clients[1],
        cache=VisualTokenCache(InProcessStore(10**8), METRICS),
        metrics=METRICS,
        limits=AdmissionLimits(),
        image_sizes=ImageSizes(tiles=5, tile_tokens=64),
    )
    health = Health(clients, encoder.pipeline.fingerprint)
    door = HttpDoor(service, health, Keys(METRICS), model="tiny", max_model_len=4096)

    async def app(scope, receive, send):
        response = await door.respond(Request(scope, receive))
        await response(scope, receive, send)

    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as http:
        yield Served(encoder, model, service, http)
    for client in clients:
        await client.close()
    await server.stop(0)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalModel]:
    with LocalModel(CHECKPOINT, prefix_reuse=False) as model:
        yield model


def kinds(events: list[focus_pb2.ChatResponse]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


def maps_of(events: list[focus_pb2.ChatResponse]) -> FocusMaps:
    (found,) = (event.focus_maps for event in events if event.WhichOneof("event") == "focus_maps")
    return read_maps(found)


def assert_alike(found: FocusMaps, expected: FocusMaps) -> None:
    """The same maps but for the rounding of importance, which images read together and a reused prefix change."""
    for mine, other in zip(found.maps, expected.maps, strict=True):
        np.testing.assert_allclose(mine.importance, other.importance, rtol=1e-3, atol=1e-6)
    assert without_importance(found) == without_importance(expected)


def without_importance(maps: FocusMaps) -> FocusMaps:
    return dataclasses.replace(maps, maps=tuple(dataclasses.replace(one, importance=()) for one in maps.maps))


def from_json(focus: dict[str, Any]) -> FocusMaps:
    """The message that the documented JSON stands for, read as the client reads it."""
    pruning = focus["pruning"] or {"layer": 0, "threshold": None, "keep_ratio": None}
    maps = []
    for one in focus["maps"]:
        grid = one["regions"]
        regions = grid and focus_pb2.FocusRegions(
            x=grid["x"],
            y=grid["y"],
            kernels=[focus_pb2.FocusKernel(height=height, width=width) for height, width in grid["kernels"]],
            branch_ids=bytes(grid["branches"]),
        )
        floats = {name: np.frombuffer(base64.b64decode(one[name] or ""), "<f4") for name in ("boxes", "importance")}
        maps.append(
            focus_pb2.FocusMap(
                image=one["image"],
                width=one["width"],
                height=one["height"],
                regions=regions,
                boxes=floats["boxes"].tolist(),
                base_tokens=one["base_tokens"],
                kept=bytes(map(int, one["kept"])),
                importance=floats["importance"].tolist(),
            )
        )
    return read_maps(
        focus_pb2.FocusMaps(
            maps=maps,
            prune_layer=pruning["layer"],
            threshold=pruning["threshold"],
            keep_ratio=pruning["keep_ratio"],
        )
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
async def test_every_door_gives_what_the_process_chose(served: Served, local: LocalModel, settings: dict) -> None:
    reading = {name: settings[name] for name in settings.keys() & {"map_share", "detail"}}
    samplers = {name: value for name, value in settings.items() if name not in reading}
    turns = [user(RED, images=[SAMPLE, PHOTO], **reading)]
    expected = local.chat(turns, return_map=True, **samplers)
    events = await served.events(turns, return_map=True, **samplers)
    assert_alike(maps_of(events), expected.focus)
    assert kinds(events)[:3] == ["started", "token", "focus_maps"] and kinds(events)[-1] == "finished"
    # The map agrees with the accounting and, token by token, with the engine's decision.
    usage, first, second = events[-1].finished.usage, *expected.focus.maps
    assert [(one.image, one.width, one.height) for one in (first, second)] == [(0, 1027, 714), (1, 1400, 2100)]
    assert usage.visual_tokens_sampled == len(first.boxes) + len(second.boxes)
    assert usage.visual_tokens_kept == sum(first.kept) + sum(second.kept)
    kept = [[index for index, kept in enumerate(one.kept) if kept] for one in (first, second)]
    assert kept == [tokens.tolist() for tokens in expected.kept]
    if expected.decision is not None:
        assert [*first.importance, *second.importance] == expected.decision.importance.tolist()
        layer, threshold, ratio = expected.decision.layer, expected.decision.threshold, expected.decision.keep_ratio
        assert (expected.focus.prune_layer, expected.focus.threshold, expected.focus.keep_ratio) == (
            layer, threshold, ratio)  # fmt: skip
    else:
        assert expected.focus.prune_layer == 0 and not first.importance and all(first.kept)
    detail = reading.pop("detail", "auto")
    whole = (await served.post(False, [SAMPLE, PHOTO], detail, return_map=True, **samplers, **reading)).json()
    assert_alike(from_json(whole["focus"]), expected.focus)
    assert whole["choices"][0]["message"]["content"] == expected.text
    streamed = (await served.post(True, [SAMPLE, PHOTO], detail, return_map=True, **samplers, **reading)).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n\n") if line.startswith("data: {")]
    with_maps = [number for number, chunk in enumerate(chunks) if "maps" in chunk.get("focus", {})]
    assert len(with_maps) == 1
    assert_alike(from_json(chunks[with_maps[0]]["focus"]), expected.focus)
    assert chunks[with_maps[0]]["choices"][0]["delta"] == {"content": ""}
    before = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[: with_maps[0]])
    assert expected.text.startswith(before) and (not expected.text or before != expected.text or len(chunks) == 4)
    # As docs/serving.md bounds them.
    message = next(event.focus_maps for event in events if event.WhichOneof("event") == "focus_maps")
    for one, object in zip(message.maps, whole["focus"]["maps"], strict=True):
        edges, regions = len(one.regions.x) + len(one.regions.y), len(one.regions.branch_ids)
        most = 21 * (len(one.boxes) // 4) + regions + 4 * edges + 100
        assert one.ByteSize() <= most
        assert len(json.dumps(object, separators=(",", ":"))) <= 4 / 3 * most + 20 * edges + 2 * regions + 300


async def test_a_follow_up_has_its_own_map_though_everything_is_cached(served: Served, local: LocalModel) -> None:
    first = [user(RED, images=SAMPLE)]
    text = local.chat(first).text
    then = [*first, assistant(text), user(YELLOW)]
    await served.events(first)
    before = served.model.engine.stats().prompt_tokens_reused
    events = await served.events(then, return_map=True)
    assert events[0].started.images[0].cached
    assert served.model.engine.stats().prompt_tokens_reused > before + 200, "the lower layers were not computed again"
    assert_alike(maps_of(events), local.chat(then, return_map=True).focus)
    (found,) = maps_of(events).maps
    assert found.importance != local.chat(first, return_map=True).focus.maps[0].importance, "another question's map"


@pytest.mark.parametrize("lost_after", [0, 1, 2])
async def test_a_lost_stage_brings_one_map(served: Served, local: LocalModel, lost_after: int) -> None:
    turns = [user(YELLOW, images=SAMPLE)]
    served.model.lost_after = [lost_after]
    events = await served.events(turns, return_map=True)
    assert served.model.sent.count("finished") == 1 and served.model.sent.count("token") > lost_after
    assert kinds(events).count("focus_maps") == 1
    assert "".join(event.token.text for event in events) == local.chat(turns).text
    assert_alike(maps_of(events), local.chat(turns, return_map=True).focus)


async def test_nothing_is_done_for_who_does_not_ask(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[CompressedVisualTokens] = []
    monkeypatch.setattr(compose, "layout", lambda image, *_, **__: composed.append(image))
    events = await served.events([user(RED, images=SAMPLE)])
    assert kinds(events)[-1] == "finished" and "focus_maps" not in kinds(events)
    assert not composed and "decision" not in served.model.sent
    whole = (await served.post(False, [SAMPLE])).json()
    assert not {"maps", "pruning"} & whole["focus"].keys()
    await served.events([user(RED, images=SAMPLE)], return_map=True)
    assert len(composed) == 1 and served.model.sent.count("decision") == 1, "or this test cannot fail"


async def test_without_images_the_list_of_maps_is_empty(served: Served) -> None:
    events = await served.events([user("Hello")], return_map=True, max_tokens=2)
    assert maps_of(events) == FocusMaps(maps=(), prune_layer=0, threshold=None, keep_ratio=None)


async def test_an_older_encoder_is_named(served: Served) -> None:
    served.encoder.sized = False
    events = await served.events([user(RED, images=SAMPLE)], return_map=True)
    assert events[-1].error.code == "INTERNAL" and "older version" in events[-1].error.message


async def test_callers_at_once_have_their_own_maps(served: Served, local: LocalModel) -> None:
    asked = [[user(question, images=image)] for question, image in itertools.product((RED, YELLOW), (SAMPLE, PHOTO))]
    answers = await asyncio.gather(*(served.events(turns, return_map=True) for turns in asked))
    for turns, events in zip(asked, answers, strict=True):
        assert_alike(maps_of(events), local.chat(turns, return_map=True).focus)
