"""The way straight to a stage's replicas: real ports, of which some are full, lost, or another's by now."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass

import pytest

from focusllava.v1 import llm_pb2, llm_pb2_grpc
from services.common.errors import Overloaded, StageUnavailable
from services.common.port import StagePort
from services.gateway.affinity import ranked
from services.gateway.deadline import Deadline
from services.gateway.replicas import Replica, ReplicaWay
from services.gateway.stages import LanguageModelClient, StageAddress
from tests.fakes.stages import KEY, METRICS, WORDS, LanguageModel

TIMEOUT_S = 30


@dataclass
class Limits:
    max_ongoing_requests: int = 100
    max_queued_requests: int = 0


class Known:
    """Replicas that Serve would name."""

    def __init__(self, *replicas: Replica):
        self.replicas = list(replicas)
        self.asleep = False

    async def running(self) -> list[Replica]:
        while not self.replicas:
            await asyncio.sleep(0.01)
        return list(self.replicas)

    async def is_asleep(self) -> bool:
        return self.asleep and not self.replicas


@contextlib.asynccontextmanager
async def replica(model: LanguageModel, name: str = "a", limits: Limits | None = None):
    port = StagePort(model, llm_pb2_grpc.add_LanguageModelServiceServicer_to_server, lambda: limits or Limits())
    try:
        yield port, Replica(name=name, **await port.start("127.0.0.1"))
    finally:
        await port.close(0)


@contextlib.asynccontextmanager
async def calling(known: Known, **address):
    address = {"attempts": 3, "backoff_s": 0.01, "timeout_s": TIMEOUT_S, **address}
    client = LanguageModelClient(StageAddress(application="llm", **address), METRICS, known)
    async with asyncio.timeout(TIMEOUT_S):
        yield client
    await client.close()


async def text(client: LanguageModelClient, image: str = "", *said: str) -> str:
    """An answer's words. image: what the gateway knows the conversation's image by; said: the user's turns."""
    turns = [llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(text=words)]) for words in said]
    asked = llm_pb2.GenerateRequest(request_id="r", turns=turns, sampling=llm_pb2.SamplingParams())
    events = client.generate(asked, Deadline(), [image] if image else [])
    return "".join([event.token.text async for event in events])


async def test_calls_go_to_the_replica_that_has_fewer_of_them():
    models = [LanguageModel(pause_s=0.05), LanguageModel(pause_s=0.05)]
    async with replica(models[0], "a") as (_, a), replica(models[1], "b") as (_, b):
        async with calling(Known(a, b)) as client:
            answers = await asyncio.gather(*(text(client) for _ in range(10)))
    assert set(answers) == {"".join(WORDS)}
    assert [len(model.requests) for model in models] == [5, 5]


@pytest.mark.parametrize("after", [0, 2])
async def test_an_answer_goes_on_at_another_replica_where_its_own_is_lost(after):
    class Dying(LanguageModel):
        async def Generate(self, request, context):
            number = 0
            async for event in super().Generate(request, context):
                if number == after:
                    asyncio.ensure_future(self.port.close(0))
                    await asyncio.sleep(TIMEOUT_S)
                number += 1
                yield event

    dying, healthy = Dying(), LanguageModel()
    async with replica(dying, "a") as (dying.port, a), replica(healthy, "b") as (_, b):
        known = Known(a)
        async with calling(known) as client:
            answer = asyncio.create_task(text(client))
            while not dying.requests:
                await asyncio.sleep(0.005)
            known.replicas.append(b)  # Serve has not noticed that the first is gone
            assert await answer == "".join(WORDS)
            assert await text(client) == "".join(WORDS)
    assert len(dying.requests) == 1 and len(healthy.requests) == 2


async def test_a_call_waits_for_a_replica_where_the_last_one_is_lost():
    async with replica(LanguageModel(), "a") as (port, a):
        await port.close(0)
        known = Known(a)
        async with calling(known) as client:
            answer = asyncio.create_task(text(client))
            await asyncio.sleep(0.3)
            assert not answer.done()
            async with replica(LanguageModel(), "b") as (_, b):
                known.replicas[:] = [b]
                assert await answer == "".join(WORDS)


async def test_where_no_replica_comes_the_stage_is_unavailable():
    async with calling(Known(), attempts=1, timeout_s=0.1) as client:
        with pytest.raises(StageUnavailable, match="no replica of the llm stage can be reached"):
            await text(client)


async def test_a_stranger_at_a_lost_replicas_port_is_no_replica():
    """A new replica may be given the port of a lost one, whose secret it does not have."""
    stranger, healthy = LanguageModel(), LanguageModel()
    async with replica(stranger, "new") as (_, new), replica(healthy, "b") as (_, b):
        known = Known(Replica(name="old", address=new.address, secret="0" * 64), b)
        async with calling(known) as client:
            for _ in range(3):
                assert await text(client) == "".join(WORDS)
    assert not stranger.requests and len(healthy.requests) == 3


async def test_lines_to_replicas_that_are_gone_are_closed(monkeypatch):
    monkeypatch.setattr("services.gateway.replicas.IDLE_S", -1.0)
    async with replica(LanguageModel(), "a") as (_, a), replica(LanguageModel(), "b") as (_, b):
        known = Known(a)
        way = ReplicaWay("llm", known, METRICS)
        async with way.line(TIMEOUT_S):
            pass
        known.replicas[:] = [b]
        async with way.line(TIMEOUT_S):
            assert list(way._lines) == [b]
        await way.close()


async def test_a_full_replica_is_passed_over_where_another_has_room():
    """Calls of other gateways fill it, of which this one knows nothing."""
    full, free = LanguageModel(pause_s=0.2), LanguageModel()
    async with replica(full, "a", Limits(1, 0)) as (_, a), replica(free, "b") as (_, b):
        async with calling(Known(a)) as other, calling(Known(a, b)) as client:
            image = owned_by("a", a, b)
            taken = asyncio.create_task(text(other, image))
            while not full.requests:
                await asyncio.sleep(0.005)
            assert await text(client, image) == "".join(WORDS)
            with pytest.raises(Overloaded):
                await text(other, image)
            assert await taken == "".join(WORDS)
    assert (len(full.requests), len(free.requests)) == (1, 1)


async def test_a_stage_that_sleeps_is_well_and_nobody_wakes_it_to_ask():
    known = Known()
    async with calling(known, attempts=1) as client:
        known.asleep = True
        await client.check(KEY.model_fingerprint, 0.1)
        known.asleep = False
        with pytest.raises(StageUnavailable):
            await client.check(KEY.model_fingerprint, 0.1)


def owned_by(name: str, *replicas: Replica) -> str:
    """An image that belongs to the replica of this name."""
    return next(image for image in map(str, itertools.count()) if ranked(replicas, image)[0].name == name)
