"""GET /health tells whether both stages answer, and asks seldom; CORS opens the door to the sites that are named."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest

from focusllava.errors import RETRY_METADATA
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.gateway import health
from services.gateway.deployment import GatewaySettings
from services.gateway.health import Health
from services.gateway.stages import EncoderClient, LanguageModelClient, StageAddress
from tests.fakes.http_door import open_door
from tests.fakes.stages import DIED, KEY, METRICS, LanguageModel, serving

SITE = "https://app.example.org"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


async def test_healthy_and_asked_once_however_many_ask():
    async with open_door() as door:
        answers = await asyncio.gather(*(door.raw.get("/health") for _ in range(20)))
        assert [(answer.status_code, answer.json()) for answer in answers] == [(200, {"status": "ok"})] * 20
        assert door.model.checks == 1


async def test_a_stage_that_answers_requests_is_not_asked():
    async with open_door() as door:
        await door.ask()
        assert (await door.raw.get("/health")).status_code == 200
    assert door.model.checks == 0


async def test_a_stage_that_is_gone_and_comes_back(monkeypatch):
    monkeypatch.setattr(health, "FRESH_S", 0.1)
    model = LanguageModel()
    async with open_door(model) as door:
        assert (await door.raw.get("/health")).status_code == 200
        await asyncio.sleep(0.15)
        model.check_failure = grpc.StatusCode.UNAVAILABLE, DIED
        answer = await door.raw.get("/health")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["message"] == "the llm stage is restarting or cannot be reached; try again"
        model.check_failure = None
        await asyncio.sleep(0.15)
        assert (await door.raw.get("/health")).status_code == 200


async def test_what_is_wrong_with_a_stage():
    async with serving() as clients:
        assert await Health(clients, "another").failures() == ["the llm stage: model_fingerprint: is another"]
        for client in clients:
            client.heard_at = -math.inf
        assert await Health(clients, KEY.model_fingerprint).failures() == []
    nobody = StageAddress(target="127.0.0.1:1")
    for client in (EncoderClient(nobody, "", METRICS), LanguageModelClient(nobody, METRICS)):
        (line,) = await Health([client], "").failures()
        assert line == f"the {client.name} stage is restarting or cannot be reached; try again"
        await client.close()


async def test_a_stage_that_is_full_is_there():
    model = LanguageModel()
    model.check_failure = grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ((RETRY_METADATA, "1000"),)
    async with open_door(model) as door:
        assert (await door.raw.get("/health")).status_code == 200


async def test_a_stage_that_hangs(monkeypatch):
    monkeypatch.setattr(health, "TIMEOUT_S", 0.3)
    model = LanguageModel()
    model.check_pause_s = 5.0
    async with open_door(model) as door:
        answers = await asyncio.gather(*(door.raw.get("/health") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {503} and model.checks == 1
    assert answers[0].json()["error"]["message"] == "the llm stage has not answered in 0.3 s"


async def test_no_other_site_may_ask_unless_it_is_named():
    async with open_door() as door:
        answer = await door.raw.options("/v1/models", headers={"origin": SITE, **PREFLIGHT})
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
        answer = await door.raw.get("/v1/models", headers={"origin": SITE})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origins, allowed", [([SITE], SITE), (["*"], "*")])
async def test_a_named_site_may_ask(origins, allowed):
    async with open_door(cors_origins=origins) as door:
        asked = await door.raw.options("/v1/chat/completions", headers={"origin": SITE, **PREFLIGHT})
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == allowed
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        door.raw.headers["origin"] = SITE
        answers = [await door.raw.get("/v1/models"), await door.raw.post("/v1/chat/completions")]
        assert [answer.status_code for answer in answers] == [200, 415]
        assert {answer.headers["access-control-allow-origin"] for answer in answers} == {allowed}
        pieces = [chunk async for chunk in await door.ask(stream=True)]
        assert len(pieces) > 3
        door.raw.headers["origin"] = "https://evil.example"
        other = await door.raw.get("/v1/models")
        assert other.headers.get("access-control-allow-origin") == (None if allowed == SITE else "*")


def test_sites_are_settings():
    settings = build_settings(
        GatewaySettings, {"checkpoint": "c", "cors_origins": [SITE, "http://127.0.0.1:3000", "*"]}
    )
    assert settings.cors_origins == (SITE, "http://127.0.0.1:3000", "*")
    for wrong in ("app.example.org", "https://app.example.org/", "https://*.example.org", ""):
        with pytest.raises(InvalidInput, match=r"cors_origins\[1\]: is "):
            build_settings(GatewaySettings, {"checkpoint": "c", "cors_origins": [SITE, wrong]})
    with pytest.raises(InvalidInput, match="cors_origins: is 'x', expected a list"):
        build_settings(GatewaySettings, {"checkpoint": "c", "cors_origins": "x"})
