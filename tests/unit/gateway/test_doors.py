"""Keys, names and limits at both doors, over real sockets: gRPC and HTTP, scripted stages behind them."""

from __future__ import annotations

import asyncio
import base64
import contextlib

import grpc
import grpc.aio
import openai
import pytest

from focusllava import AsyncFocusClient, FocusClientError
from focusllava.v1 import focus_pb2, focus_pb2_grpc, llm_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.common.grpc_status import Refused
from services.gateway import deployment
from services.gateway.admission import AdmissionLimits
from services.gateway.deployment import Gateway
from services.gateway.keys import Keys, hash_of, new_key
from services.gateway.turns import Load
from tests.fakes.http_door import QUESTION, TEXT, open_door
from tests.fakes.stages import METRICS, PNG, LanguageModel, png, service, serving

ALICE, BOB = new_key(), new_key()
ASKED = {"model": "tiny", "messages": [QUESTION]}


def keys(**limits: int) -> Keys:
    """Alice's has the limits, Bob's none."""
    lines = [f"{{name: alice, sha256: {hash_of(ALICE)}, {', '.join(f'{k}: {v}' for k, v in limits.items())}}}"]
    lines.append(f"{{name: bob, sha256: {hash_of(BOB)}}}")
    return Keys(METRICS, text=f"keys: [{', '.join(lines)}]")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Proxy(focus_pb2_grpc.FocusServiceServicer):
    """Passes calls on, as Ray's proxy does: where the replica raises, the status is the one in the context."""

    def __init__(self, replica):
        self._replica = replica

    async def Chat(self, request, context):
        with contextlib.suppress(Refused):
            async for event in self._replica.Chat(request, context):
                yield event

    async def GetModelInfo(self, request, context):
        with contextlib.suppress(Refused):
            return await self._replica.GetModelInfo(request, context)


@contextlib.asynccontextmanager
async def grpc_door(known: Keys, model: LanguageModel | None = None, limits: AdmissionLimits | None = None):
    """The gateway's own methods behind a gRPC server; yields its address."""
    async with serving(model) as clients:
        replica = Gateway.func_or_class.__new__(Gateway.func_or_class)
        replica._service, replica._keys = service(*clients), known
        replica._service.limits = limits or replica._service.limits
        replica._config, replica._max_model_len = FocusLlavaConfig.load("checkpoints/focusllava-tiny"), 4096
        replica._name, replica._fingerprint = "tiny", "f" * 64
        server = grpc.aio.server()
        focus_pb2_grpc.add_FocusServiceServicer_to_server(Proxy(replica), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)


async def ask_grpc(address: str, api_key: str | None) -> str:
    async with AsyncFocusClient(address, api_key=api_key, timeout_s=20) as client:
        return (await client.ask(PNG, "What does the card say?").result()).text


async def test_grpc_takes_a_known_key_alone():
    async with grpc_door(keys()) as address:
        assert await ask_grpc(address, ALICE) == TEXT
        for wrong, says in ((None, "is missing"), ("fl-other", "has a key that is not known here")):
            with pytest.raises(FocusClientError) as caught:
                await ask_grpc(address, wrong)
            assert caught.value.code == "UNAUTHENTICATED"
            assert caught.value.message == f"authorization: {says}, expected 'Bearer KEY'"
        async with grpc.aio.insecure_channel(address) as channel:
            info = focus_pb2_grpc.FocusServiceStub(channel).GetModelInfo
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await info(focus_pb2.GetModelInfoRequest())
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            found = await info(focus_pb2.GetModelInfoRequest(), metadata=tuple(bearer(BOB).items()))
            assert (found.name, found.max_context_tokens) == ("tiny", 4096)


async def test_grpc_says_the_id_of_a_call_whoever_chose_it():
    async with grpc_door(Keys(METRICS)) as address, grpc.aio.insecure_channel(address) as channel:
        part = focus_pb2.ChatTurn(role=llm_pb2.ROLE_USER, parts=[focus_pb2.ChatPart(text="what?")])
        for field, metadata, expected in [
            ("mine", "other", "mine"),
            ("", "offered-1", "offered-1"),
            ("", "no spaces", None),
            ("", None, None),
        ]:
            call = focus_pb2_grpc.FocusServiceStub(channel).Chat(
                focus_pb2.ChatRequest(turns=[part], request_id=field),
                metadata=(("x-request-id", metadata),) if metadata else (),
            )
            events = [event async for event in call]
            (said,) = [value for name, value in await call.trailing_metadata() if name == "x-request-id"]
            assert events[0].started.request_id == said and (said == expected or (expected is None and len(said) == 32))


async def test_grpc_without_keys_asks_for_none():
    async with grpc_door(Keys(METRICS)) as address:
        assert await ask_grpc(address, None) == await ask_grpc(address, "whatever") == TEXT


async def test_grpc_holds_a_key_to_its_limits():
    async with grpc_door(keys(requests_per_minute=1)) as address:
        await ask_grpc(address, ALICE)
        with pytest.raises(FocusClientError) as caught:
            await ask_grpc(address, ALICE)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert "the key 'alice' has used its 1 requests a minute; try again in" in caught.value.message
        assert await ask_grpc(address, BOB) == TEXT


async def test_http_takes_a_known_key_alone_as_openais_clients_send_it():
    async with open_door(keys=keys()) as door:
        for client_key in (ALICE, BOB):
            client = door.client.with_options(api_key=client_key)
            assert (await client.chat.completions.create(**ASKED)).choices[0].message.content == TEXT
            assert [model.id async for model in client.models.list()] == ["tiny"]
        wrong = door.client.with_options(api_key="fl-other")
        for call in (wrong.chat.completions.create(**ASKED), wrong.models.list(), wrong.models.retrieve("tiny")):
            with pytest.raises(openai.AuthenticationError) as caught:
                await call
            assert caught.value.code == "invalid_api_key" and caught.value.param == "authorization"
        none = await door.raw.post("/v1/chat/completions", json=ASKED)
        assert none.status_code == 401 and none.headers["www-authenticate"] == "Bearer"
        assert none.json()["error"] == {
            "message": "authorization: is missing, expected 'Bearer KEY'",
            "type": "authentication_error",
            "param": "authorization",
            "code": "invalid_api_key",
        }
        assert [(await door.raw.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]
        assert len(door.model.requests) == 2


async def test_a_wrong_key_is_refused_before_the_body_is_read():
    async with open_door(keys=keys()) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 1000000\r\nauthorization: Bearer fl-other\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 401")
        writer.close()


@pytest.mark.parametrize(
    "limits, says, most_s",
    [
        ({"requests_per_minute": 1}, "the key 'alice' has used its 1 requests a minute", 60),
        ({"tokens_per_minute": 1}, "the key 'alice' has used its 1 tokens a minute", 720),
    ],
)
async def test_http_says_when_a_key_may_ask_again(limits, says, most_s):
    async with open_door(keys=keys(**limits)) as door:
        await door.post({}, **bearer(ALICE))
        refused = await door.raw.post("/v1/chat/completions", json=ASKED, headers=bearer(ALICE))
        assert refused.status_code == 429 and says in refused.json()["error"]["message"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 < int(refused.headers["retry-after"]) <= most_s
        assert (await door.post({}, **bearer(BOB)))[0] == 200


async def test_two_that_come_at_once_are_two_and_the_refused_one_hears_when_to_come_again():
    async with open_door(keys=keys(requests_per_minute=1)) as door:
        posts = [door.raw.post("/v1/chat/completions", json=ASKED, headers=bearer(ALICE)) for _ in range(2)]
        first, second = sorted(await asyncio.gather(*posts), key=lambda answer: answer.status_code)
        assert (first.status_code, second.status_code) == (200, 429)
        assert 50 <= int(second.headers["retry-after"]) <= 60


async def test_a_keys_longest_answer():
    async with open_door(keys=keys(max_tokens=5)) as door:
        status, error = await door.refused({"max_tokens": 6}, **bearer(ALICE))
        assert (status, error["param"]) == (413, "max_tokens") and "the limit is 5" in error["message"]
        assert (await door.post({}, **bearer(ALICE)))[0] == 200
        assert door.model.requests[-1].sampling.max_tokens == 5
        assert (await door.post({"max_tokens": 6}, **bearer(BOB)))[0] == 200


async def test_a_keys_requests_in_flight():
    model = LanguageModel(pause_s=0.05)
    async with open_door(model, keys=keys(concurrency=2)) as door:
        asked = [door.post({}, **bearer(ALICE)) for _ in range(6)]
        statuses = sorted(status for status, _ in await asyncio.gather(*asked))
        assert statuses == [200, 200, 429, 429, 429, 429]
        assert (await door.post({}, **bearer(ALICE)))[0] == 200


async def test_a_storm_of_one_key_starves_no_other():
    """One request is at the stages at once, 40 of Alice's wait: Bob's three, which come last, are served first."""
    limits = AdmissionLimits(running=Load(requests=1, tokens=10**6, tiles=100))
    async with open_door(LanguageModel(pause_s=0.005), limits=limits, keys=keys()) as door:
        done: list[str] = []

        async def ask(name: str, key: str) -> None:
            status, _ = await door.post({}, **bearer(key))
            assert status == 200
            done.append(name)

        storm = [asyncio.create_task(ask("alice", ALICE)) for _ in range(40)]
        while len(done) < 3:  # all of Alice's are in line
            await asyncio.sleep(0.01)
        before = len(done)
        await asyncio.gather(*(ask("bob", BOB) for _ in range(3)))
        assert done[before:].count("alice") <= 12, done  # in turns, and what came while Bob's were read
        await asyncio.gather(*storm)
        assert len(done) == 43


async def test_a_storm_beyond_what_may_wait_is_refused_in_openais_json_and_the_rest_is_answered():
    few = Load(requests=2, tokens=10**6, tiles=100)
    limits = AdmissionLimits(running=few, waiting=few)
    async with open_door(LanguageModel(pause_s=0.02), limits=limits) as door:
        answers = await asyncio.gather(*(door.raw.post("/v1/chat/completions", json=ASKED) for _ in range(30)))
        assert {answer.status_code for answer in answers} == {200, 429}
        assert sum(answer.status_code == 200 for answer in answers) >= 4
        for answer in answers:
            if answer.status_code == 429:
                error = answer.json()["error"]
                assert (
                    error["message"] == "the server is full; try again later" and answer.headers["retry-after"] == "1"
                )
        assert (await door.post({}))[0] == 200


async def test_a_deadline_holds_while_a_request_waits_for_its_turn():
    limits = AdmissionLimits(running=Load(requests=1, tokens=10**6, tiles=100))
    async with open_door(LanguageModel(pause_s=1), limits=limits) as door:
        first = asyncio.create_task(door.post({}))
        while not door.model.requests:
            await asyncio.sleep(0.01)
        status, error = await door.refused({}, **{"focusllava-timeout-ms": "200"})
        assert status == 504 and "deadline" in error["message"]
        assert (await first)[0] == 200 and len(door.model.requests) == 1


async def test_bodies_beyond_the_bytes_that_are_held_are_refused_before_they_are_read():
    large = base64.b64encode(png() + bytes(200_000)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{large}"}}
    body = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}]}
    async with open_door(LanguageModel(pause_s=0.1), limits=AdmissionLimits(held_bytes=500_000)) as door:
        answers = await asyncio.gather(*(door.post(body) for _ in range(8)))
        statuses = [status for status, _ in answers]
        assert 200 in statuses and 429 in statuses and set(statuses) == {200, 429}
        refused = next(answer for status, answer in answers if status == 429)
        assert "bytes of requests, its limit is 500000" in refused["error"]["message"]
        assert (await door.post(body))[0] == 200  # nothing stays held
        assert door.http_door._service.held._total == 0


async def test_a_request_that_is_answered_holds_its_bytes_to_its_end():
    model = LanguageModel(words=["x"] * 1000, pause_s=0.01)
    async with open_door(model) as door:
        held = door.http_door._service.held
        stream = await door.ask(stream=True)
        async for _ in stream:
            assert held._total > len(PNG)
            break
        await stream.close()
        await asyncio.wait_for(model.cancelled.wait(), 20)
        while held._total:
            await asyncio.sleep(0.01)


OTHER_NAMES = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "[::2]",
    "1.2.3.4",
]


async def test_a_page_whose_name_is_made_to_point_here_may_not_ask():
    async with open_door(allowed_hosts=()) as door:
        for host in OTHER_NAMES:
            answer = await door.raw.get("/v1/models", headers={"host": host})
            assert answer.status_code == 421 and answer.json()["error"]["param"] == "host", host
            assert (await door.raw.post("/v1/chat/completions", json=ASKED, headers={"host": host})).status_code == 421
            assert (await door.raw.get("/ready", headers={"host": host})).status_code == 200
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.0.0.2", "[::1]:8000", "app.localhost"):
            assert (await door.raw.get("/v1/models", headers={"host": host})).status_code == 200, host
    assert not door.model.requests


async def test_named_hosts_may_ask():
    async with open_door(allowed_hosts=("focus.example.org",)) as door:
        for host, status in (("focus.example.org:443", 200), ("localhost", 200), ("evil.example", 421)):
            assert (await door.raw.get("/v1/models", headers={"host": host})).status_code == status, host


async def test_the_model_says_how_long_a_conversation_may_be():
    async with open_door(limits=AdmissionLimits(max_images=3, max_tokens=77)) as door:
        model = (await door.client.models.retrieve("tiny")).model_dump()
    assert model["max_model_len"] == 4096
    assert model["focus"]["max_images"] == 3 and model["focus"]["max_tokens"] == 77


def test_what_an_image_can_become_at_most_follows_from_the_checkpoint():
    sizes = deployment._image_sizes(FocusLlavaConfig.load("checkpoints/focusllava-tiny"))
    config = FocusLlavaConfig.load("checkpoints/focusllava-tiny")
    most = max(height * width for height, width in config.image_grid_pinpoints)
    assert (sizes.tiles - 1) * config.tile_px**2 == most and sizes.tile_tokens == config.patches_per_side**2
