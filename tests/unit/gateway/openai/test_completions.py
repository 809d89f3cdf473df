"""Text completions: OpenAI's own client and its older objects, over a real socket."""

from __future__ import annotations

import asyncio

import grpc
import openai
import pytest

from focusllava.v1 import llm_pb2
from tests.fakes.http_door import TEXT, Door, open_door
from tests.fakes.stages import PROMPT_TOKENS, WORDS, LanguageModel

RAW = llm_pb2.RawPrompt


async def complete(door: Door, prompt="Once", **fields):
    return await door.client.completions.create(model="tiny", prompt=prompt, **fields)


async def test_a_whole_answer():
    async with open_door() as door:
        answer = await complete(door)
    assert answer.choices[0].text == TEXT and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None and answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, len(WORDS))
    (request,) = door.model.requests
    assert request.raw_prompt == RAW(text="Once") and not request.turns and not door.encoder.requests
    assert request.sampling == llm_pb2.SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("  One\ud7ff two\n", RAW(text="  One\ud7ff two\n")),
        (["Once"], RAW(text="Once")),
        ([5, 0, 7], RAW(token_ids=llm_pb2.TokenIds(ids=[5, 0, 7]))),
        ([[5]], RAW(token_ids=llm_pb2.TokenIds(ids=[5]))),
    ],
)
async def test_every_way_to_write_a_prompt(prompt, expected):
    async with open_door() as door:
        await complete(door, prompt, max_tokens=3)
    assert door.model.requests[0].raw_prompt == expected and door.model.requests[0].sampling.max_tokens == 3


async def test_a_stream_is_the_whole_answer_in_pieces():
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with open_door() as door:
        chunks = [chunk async for chunk in await complete(door, stream=True, stream_options=options)]
        plain = [chunk async for chunk in await complete(door, stream=True)]
    assert [chunk.choices[0].text for chunk in plain] == [*WORDS, ""]
    assert [chunk.choices[0].finish_reason for chunk in plain] == [None] * len(WORDS) + ["stop"]
    assert not any(chunk.usage for chunk in plain) and {chunk.object for chunk in plain} == {"text_completion"}
    assert [chunk.usage.completion_tokens for chunk in chunks] == [*range(1, len(WORDS) + 1), len(WORDS), len(WORDS)]
    assert not chunks[-1].choices and len({chunk.id for chunk in chunks}) == 1


async def test_several_prompts_are_several_choices():
    prompts = ["One", [5, 6], "Three"]
    model = LanguageModel(pause_s=0.01)
    async with open_door(model) as door:
        whole = await complete(door, prompts, logprobs=0)
        options = {"include_usage": True}
        chunks = [chunk async for chunk in await complete(door, prompts, stream=True, stream_options=options)]
        asked = [request.raw_prompt for request in model.requests]
    expected = [RAW(text="One"), RAW(token_ids=llm_pb2.TokenIds(ids=[5, 6])), RAW(text="Three")]
    assert sorted(map(str, asked[:3])) == sorted(map(str, expected)) and len(asked) == 6
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and {c.text for c in whole.choices} == {TEXT}
    assert all(choice.logprobs.text_offset[0] == 0 for choice in whole.choices)
    usage = (3 * PROMPT_TOKENS, 3 * len(WORDS))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == usage
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT] * 3 and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].index for chunk in chunks[:3]] != [0, 0, 0]  # at the same time


async def test_one_of_several_prompts_that_is_refused_refuses_all():
    too_long = (0, grpc.StatusCode.INVALID_ARGUMENT, "raw_prompt: is too long")
    model = LanguageModel(None, too_long, pause_s=1.0)
    async with open_door(model) as door:
        status, error = await door.refused({"prompt": ["a", "b"]}, "/v1/completions")
        assert (status, error["param"]) == (400, "prompt")
        await asyncio.wait_for(model.cancelled.wait(), 20)  # the other one


async def test_log_probabilities_in_lists():
    async with open_door() as door:
        whole = await complete(door, logprobs=0)
        stream = [chunk async for chunk in await complete(door, logprobs=0, stream=True)]
    found = whole.choices[0].logprobs
    numbers = [str(number) for number in range(len(WORDS))]
    assert found.tokens == numbers and found.token_logprobs == [-n for n in range(len(WORDS))]
    assert found.text_offset == list(range(len(WORDS)))  # the scripted tokens are one character each
    assert found.top_logprobs == [{token: -float(token)} for token in numbers]
    pieces = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert [piece.tokens[0] for piece in pieces] == numbers
    assert [piece.text_offset[0] for piece in pieces] == found.text_offset


async def test_a_stages_refusal_names_the_prompt():
    too_long = (0, grpc.StatusCode.INVALID_ARGUMENT, "raw_prompt: makes a prompt of 9000 tokens")
    async with open_door(LanguageModel(too_long)) as door:
        with pytest.raises(openai.BadRequestError) as caught:
            await complete(door)
    assert caught.value.param == "prompt" and "prompt: makes a prompt of 9000 tokens" in str(caught.value)


async def test_a_stages_refusal_of_a_constraint_names_the_clients_own_field():
    says = "sampling.constraint.json_schema: is no JSON Schema"
    refusals = [(0, grpc.StatusCode.INVALID_ARGUMENT, says)] * 3
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}
    async with open_door(LanguageModel(*refusals)) as door:
        for body, field in (
            ({"response_format": schema}, "response_format.json_schema.schema"),
            ({"guided_json": {"type": 5}}, "guided_json"),
            ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json"),
        ):
            status, error = await door.refused(body)
            assert (status, error["param"], error["message"]) == (400, field, f"{field}: is no JSON Schema")
