"""OpenAI's API: its own client over a real socket, real gRPC to scripted stages behind the door."""

from __future__ import annotations

import asyncio
import base64
import json

import grpc
import openai
import pytest

from focusllava.errors import RETRY_METADATA
from focusllava.v1 import llm_pb2
from services.gateway.admission import AdmissionLimits
from tests.fakes.http_door import QUESTION, TEXT, open_door
from tests.fakes.stages import DIED, PNG, WORDS, Encoder, LanguageModel


async def test_a_whole_answer():
    async with open_door() as door:
        answer = await door.ask()
        model = (await door.client.models.list()).data[0]
        same = await door.client.models.retrieve("tiny")
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == len(WORDS)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(WORDS)
    assert answer.model == model.id == same.id == "tiny" and answer.id.startswith("chatcmpl-")
    assert answer.focus["images"][0]["cached"] is False and answer.focus["images"][0]["visual_tokens_sampled"] > 0
    assert door.encoder.requests[0].image == PNG


async def test_a_stream_is_the_whole_answer_in_pieces():
    async with open_door(LanguageModel(pause_s=0.01)) as door:
        stream = await door.ask(stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        plain = [chunk async for chunk in await door.ask(stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and [delta.content for delta in deltas[1:-1]] == WORDS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "stop"]
    assert chunks[-1].usage.completion_tokens == len(WORDS) and not chunks[-1].choices
    assert chunks[-2].focus["images"][0]["visual_tokens_sampled"] > 0
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(plain) == len(chunks) - 1 and not any(chunk.usage for chunk in plain)


async def test_every_setting_reaches_the_stage_under_its_own_name():
    async with open_door() as door:
        await door.ask(
            max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=2**63, stop=["x", "y"], presence_penalty=-1,
            frequency_penalty=1.5, logprobs=True, top_logprobs=3, metadata={"a": "b", "c": 1}, n=1, store=False,
            response_format={"type": "text"}, user="u",
            extra_body={"top_k": 5, "min_p": 0.25, "repetition_penalty": 1.25, "ignore_eos": True,
                        "focus": {"keep_ratio": 0.5, "vision_sampler": False}},
        )  # fmt: skip
        await door.ask(stop="z", max_tokens=3, max_completion_tokens=3,
                       extra_body={"focus": {"text_sampler": False}})  # fmt: skip
        await door.ask(extra_body={"focus": {"threshold": 0.75}}, logprobs=True)
    first, second, third = door.model.requests
    assert first.sampling == llm_pb2.SamplingParams(
        max_tokens=7, temperature=0.5, top_p=0.9, seed=2**63, stop=["x", "y"], presence_penalty=-1,
        frequency_penalty=1.5, logprobs=3, top_k=5, min_p=0.25, repetition_penalty=1.25, ignore_eos=True,
    )  # fmt: skip
    assert first.prune == llm_pb2.PruneParams(keep_ratio=0.5)
    assert [request.vision_sampler for request in door.encoder.requests][:2] == [False, True]
    assert second.sampling == llm_pb2.SamplingParams(max_tokens=3, stop=["z"]) and second.prune.off
    assert third.prune == llm_pb2.PruneParams(threshold=0.75) and third.sampling.logprobs == 0


async def test_a_conversation_with_the_answer_as_the_client_hands_it_back():
    async with open_door() as door:
        first = await door.ask()
        system = {"role": "developer", "content": "Be short."}
        messages = [system, QUESTION, first.choices[0].message.model_dump(), {"role": "user", "content": "Why?"}]
        await door.ask(messages=messages)
    turns = door.model.requests[-1].turns
    roles = [llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_USER, llm_pb2.ROLE_ASSISTANT, llm_pb2.ROLE_USER]
    assert [turn.role for turn in turns] == roles
    assert [turns[0].parts[0].text, turns[2].parts[0].text, turns[3].parts[0].text] == ["Be short.", TEXT, "Why?"]
    assert turns[1].parts[0].image_index == 0 and len(door.model.requests[-1].images) == 1


async def test_log_probabilities():
    async with open_door() as door:
        whole = await door.ask(logprobs=True)
        stream = [chunk async for chunk in await door.ask(logprobs=True, stream=True)]
    entries = whole.choices[0].logprobs.content
    assert [(entry.token, entry.logprob) for entry in entries] == [(str(n), -n) for n in range(len(WORDS))]
    assert entries[3].bytes == [ord("3")] and entries[3].top_logprobs == []
    pieces = [chunk.choices[0].logprobs.content[0] for chunk in stream if chunk.choices[0].logprobs]
    assert pieces == entries


REFUSED = [
    (b"", 400, "body", "is empty, expected JSON"),
    (b"{", 400, "body", "invalid JSON"),
    (b"[1]", 400, "body", "is [1]"),
    ({"model": "gpt"}, 404, "model", "is 'gpt', this server has 'tiny'"),
    ({"messages": []}, 400, "messages", "is empty"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "is 'tool', expected 'system'"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content", "the question is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content[0].type", "'audio'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0]", "expected text"),
    ({"turns": 1}, 400, "turns", "is not supported"),
    ({f"k{n}": 1 for n in range(9_000)}, 400, "k0", "is not supported"),
    ({"messages": [1] * 70_000}, 400, "messages[0]", "is 1, expected"),
    ({"messages": [1] * 80_000}, 413, "body", "commas and brackets, the limit is 75536"),
    ({"focus": {"treshold": 0.5}}, 400, "focus.treshold", "is not supported"),
    ({"focus": {"threshold": 1.5}}, 400, "focus.threshold", "is 1.5"),
    ({"n": 2}, 400, "n", "is 2, which is not supported; expected 1"),
    ({"max_tokens": -1}, 400, "max_tokens", "is -1, expected greater than or equal to 0"),
    ({"max_tokens": "7"}, 400, "max_tokens", "is '7', expected a valid integer"),
    ({"max_tokens": 0}, 400, "max_tokens", "is 0"),
    ({"max_tokens": 99999}, 413, "max_tokens", "the limit is 4096"),
    ({"temperature": 3}, 400, "temperature", "is 3.0"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "is 2, expected with logprobs true only"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "is 21"),
]
NO_IMAGES = [
    ("https://example.org/card.png", "is 'https://example.org/card.png', expected data:image/...;base64,..."),
    ("file:///etc/passwd", "nothing is fetched"),
    ("data:image/png,abc", "expected data:image/...;base64,..."),
    ("data:image/png;base64,a", "is not base64: its last character is alone"),
    ("data:image/png;base64,AA==AAAA", "is not base64: character 3 is '=' (padding stands at its end only)"),
    ("data:image/png;base64,ab\u00e9=", "is not base64: character 3 is '\u00e9'"),
    ("data:image/png;base64,", "has 0 bytes"),
    ("data:image/png;base64,AAAA", "is not a readable image"),
]


async def test_what_is_refused_names_field_and_value():
    async with open_door() as door:
        for body, status, field, says in REFUSED:
            found, error = await door.refused(body)
            assert (found, error["param"]) == (status, field), (body, error)
            assert says in error["message"] and error["message"].startswith(f"{field}: "), (body, error)
    assert not door.model.requests and not door.encoder.requests


async def test_an_image_that_is_none():
    async with open_door() as door:
        for url, says in NO_IMAGES:
            image = {"type": "image_url", "image_url": {"url": url}}
            messages = [{"role": "user", "content": [{"type": "text", "text": "what?"}, image]}]
            status, error = await door.refused({"messages": messages})
            assert status == 400 and error["param"] == "messages[0].content[1].image_url.url", (url, error)
            assert says in error["message"] and error["type"] == "invalid_request_error", (url, error)


async def test_a_body_over_the_limit():
    async def pieces():
        for _ in range(16):
            yield b" " * 2**20

    async with open_door(limits=AdmissionLimits(max_image_bytes_total=2**20)) as door:
        for content in (b" " * 2**24, pieces()):  # with a length in its header and without
            headers = {"content-type": "application/json"}
            response = await door.raw.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 413 and response.json()["error"]["param"] == "body"
        assert (await door.ask()).choices[0].message.content == TEXT


async def test_a_large_image_in_pieces_is_the_image():
    image = PNG + bytes(range(256)) * 8_000  # over a mebibyte of base64; what follows a PNG's end is not looked at
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    asked = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, QUESTION["content"][1]]}
    async with open_door() as door:
        await door.ask(messages=[asked])
    assert door.encoder.requests[0].image == image


async def test_a_page_of_another_site_cannot_ask():
    async with open_door() as door:
        for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            status, error = await door.refused({}, **{"content-type": media_type})
            assert (status, error["param"]) == (415, "content-type"), media_type
        assert not door.encoder.requests
        body = json.dumps({"model": "tiny", "messages": [QUESTION]})
        with_charset = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await door.raw.post("/v1/chat/completions", content=body, headers=with_charset)).status_code == 200


async def test_other_paths_and_methods():
    async with open_door() as door:
        nowhere = await door.raw.post("/v1/responses", json={"model": "tiny", "input": "?"})
        wrong = [await door.raw.get("/v1/chat/completions"), await door.raw.delete("/health")]
        wrong.append(await door.raw.head("/v1/chat/completions"))
        with pytest.raises(openai.NotFoundError, match="model: is 'other'"):
            await door.client.models.retrieve("other")
    assert nowhere.status_code == 404 and "/v1/chat/completions" in nowhere.json()["error"]["message"]
    assert [(each.status_code, each.headers["allow"]) for each in wrong] == [
        (405, "POST"), (405, "GET, HEAD"), (405, "POST"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny"])
async def test_head_is_get_without_a_body(path):
    async with open_door() as door:
        whole, head = await door.raw.get(path), await door.raw.head(path)
        assert head.status_code == whole.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
        assert (await door.raw.get(path)).content == whole.content  # the connection goes on


async def test_the_request_id_is_the_callers():
    async with open_door() as door:
        answer = await door.client.chat.completions.with_raw_response.create(
            model="tiny", messages=[QUESTION], extra_headers={"x-request-id": "mine-1"}
        )
        status, error = await door.refused({}, **{"x-request-id": "no spaces"})
    assert answer.parse().id == "chatcmpl-mine-1"
    assert door.model.requests[0].request_id.startswith("mine-1.")
    assert (status, error["param"]) == (400, "x-request-id")


@pytest.mark.parametrize(
    "stage, code, details, expected",
    [
        ("llm", grpc.StatusCode.INVALID_ARGUMENT, "turns: are too long", 400),
        ("llm", grpc.StatusCode.FAILED_PRECONDITION, "model_fingerprint: is ab...", 503),
        ("llm", grpc.StatusCode.UNAVAILABLE, DIED, 503),
        ("encoder", grpc.StatusCode.INVALID_ARGUMENT, "image: is damaged", 400),
    ],
)
async def test_a_stages_refusal_is_the_clients_error(stage, code, details, expected):
    failures = [(0, code, details)] * 3 if stage == "llm" else []
    encoder = Encoder((code, details)) if stage == "encoder" else Encoder()
    async with open_door(LanguageModel(*failures), encoder) as door:
        with pytest.raises(openai.APIStatusError) as caught:
            await door.ask(stream=True)
    assert caught.value.status_code == expected
    if "image" in details:
        assert caught.value.param == "messages[0].content[0].image_url.url"
    if "turns" in details:
        assert caught.value.body["message"] == "messages: are too long"


async def test_a_full_stage_is_429_and_says_when_to_come_back():
    full = "sampling.constraint: 64 others wait to be compiled"
    refused = (0, grpc.StatusCode.RESOURCE_EXHAUSTED, full, ((RETRY_METADATA, "1500"),))
    async with open_door(LanguageModel(refused)) as door:
        answer = await door.raw.post("/v1/chat/completions", json={"model": "tiny", "messages": [QUESTION]})
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "64 others wait to be compiled" in error["message"]


async def test_what_can_never_fit_is_not_to_be_tried_again():
    async with open_door(LanguageModel((0, grpc.StatusCode.RESOURCE_EXHAUSTED, "request: needs 9 bytes"))) as door:
        status, error = await door.refused({})
    assert (status, error["message"]) == (413, "request: needs 9 bytes")


async def test_an_answer_that_breaks_off_is_an_error_and_not_an_end():
    lost = (2, grpc.StatusCode.INTERNAL, "no such memory")
    async with open_door(LanguageModel(lost, lost)) as door:
        words = []
        with pytest.raises(openai.APIError, match="the llm stage failed"):
            async for chunk in await door.ask(stream=True):
                words.append(chunk.choices[0].delta.content)
        status, error = await door.refused({})
    assert words == ["", *WORDS[:2]]
    assert (status, error["type"]) == (500, "server_error")


async def test_a_client_that_leaves_stops_the_generation():
    model = LanguageModel(words=["x"] * 10_000, pause_s=0.01)
    async with open_door(model) as door:
        stream = await door.ask(stream=True)
        async for _ in stream:
            break
        await stream.close()
        await asyncio.wait_for(model.cancelled.wait(), 20)


async def test_the_callers_deadline_holds():
    async with open_door(LanguageModel(pause_s=5)) as door:
        status, error = await door.refused({}, **{"focusllava-timeout-ms": "300"})
    assert status == 504 and "deadline" in error["message"]


async def test_a_client_tries_again_what_may_succeed_and_nothing_else():
    """The client's own retries are on: a full stage is asked again, a deadline that passed is not."""
    full = (0, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ((RETRY_METADATA, "10"),))
    async with open_door(LanguageModel(full)) as door:
        answer = await door.client.with_options(max_retries=1).chat.completions.create(
            model="tiny", messages=[QUESTION]
        )
    assert answer.choices[0].message.content == TEXT and len(door.model.requests) == 2
    async with open_door(LanguageModel(pause_s=5)) as door:
        with pytest.raises(openai.InternalServerError):
            await door.client.with_options(max_retries=2).chat.completions.create(
                model="tiny", messages=[QUESTION], extra_headers={"focusllava-timeout-ms": "300"}
            )
    assert len(door.model.requests) == 1
