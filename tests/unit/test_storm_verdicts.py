"""What the storms call an answer, a refusal and a fault, at doors over real sockets."""

from __future__ import annotations

import time
from types import SimpleNamespace

import grpc
import pytest

from benchmarks.questions import Posters
from benchmarks.storm.doors import ANSWER, REFUSAL, Doors
from benchmarks.storm.kills import Load
from focusllava.errors import RETRY_METADATA
from tests.fakes.gateway import ScriptedGateway, started, token
from tests.fakes.http_door import open_door
from tests.fakes.stages import LanguageModel

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
WHEN = ((RETRY_METADATA, "1000"),)
QUESTION = Posters(1, 1.0).questions(1, 0)[0]


@pytest.mark.parametrize(
    "script, kind",
    [
        (None, ANSWER),
        ((0, FULL, "full", WHEN), REFUSAL),
        ((0, FULL, "request: needs 9 bytes"), "413"),
        ((0, grpc.StatusCode.INVALID_ARGUMENT, "turns: /tmp/x.py is no turn"), "400 that tells internals"),
        ((0, grpc.StatusCode.INTERNAL, "oh"), "500"),
    ],
)
async def test_endings_over_http(script, kind):
    async with open_door(LanguageModel(script)) as door:
        doors = Doors(SimpleNamespace(grpc_address="127.0.0.1:1", openai_url=f"{door.url}/v1"))
        try:
            assert (await doors.http(QUESTION)).kind == kind
        finally:
            await doors.close()


async def test_endings_over_grpc_and_a_server_that_is_gone():
    gateway = ScriptedGateway()
    doors = Doors(SimpleNamespace(grpc_address=gateway.address, openai_url="http://127.0.0.1:1/v1"), timeout_s=5)

    def refusing(*metadata):
        def script(request, context):
            context.set_trailing_metadata(metadata)
            yield from gateway.refusing(FULL, "full")(request, context)

        return script

    try:
        found = [await doors.grpc(QUESTION)]
        for script in (refusing(*WHEN), refusing()):
            gateway.script = script
            found.append(await doors.grpc(QUESTION))
        assert [ending.kind for ending in found] == [ANSWER, REFUSAL, "RESOURCE_EXHAUSTED without a time"]
        assert (await doors.http(QUESTION)).kind.startswith("lost (")
    finally:
        await doors.close()
        gateway.stop()


@pytest.mark.parametrize("begun", [True, False])
def test_an_answer_that_breaks_off_is_told_from_one_that_never_came(begun):
    gateway = ScriptedGateway()

    def script(request, context):
        if begun:
            yield from (started(), token("half"))
        context.abort(grpc.StatusCode.INTERNAL, "oh")

    gateway.script = script
    load = Load(gateway.address, [QUESTION], part="llm")
    try:
        load.start(2)
        end = time.monotonic() + 20
        while not (load.broken_off or load.failed) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        load.end()
        gateway.stop()
    assert not load.answers and bool(load.broken_off["llm"]) is begun
    assert set(load.failed) == (set() if begun else {"llm: INTERNAL: oh"})
