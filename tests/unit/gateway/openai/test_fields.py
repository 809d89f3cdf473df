"""Every field that OpenAI and vLLM know of a request: carried out, without effect, or refused by name and value."""

from __future__ import annotations

import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat.chat_completion_content_part_image_param import ChatCompletionContentPartImageParam, ImageURL

from focusllava.v1 import llm_pb2
from services.gateway.openai.completion import CompletionRequest
from services.gateway.openai.request import ChatCompletionRequest, ImageUrl, Message, Part
from services.gateway.openai.settings import StreamOptions
from tests.fakes.http_door import open_door
from tests.fakes.stages import PROMPT_TOKENS, WORDS

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
EVERYWHERE = [
    {"n": 1}, {"best_of": 1}, {"echo": False}, {"metadata": {"a": 1}}, {"service_tier": "flex"}, {"store": True},
    {"user": "u"}, {"safety_identifier": "s"}, {"prompt_cache_key": "k"}, {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "implicit"}}, {"logit_bias": {}}, {"stop": []}, {"stop_token_ids": []},
    {"min_tokens": 0}, {"use_beam_search": False}, {"length_penalty": 1}, {"length_penalty": 1.0},
    {"early_stopping": False}, {"skip_special_tokens": True}, {"spaces_between_special_tokens": True}, {"priority": 0},
    {"include_stop_str_in_output": False}, {"ignore_eos": False}, {"top_k": -1}, {"top_k": 0}, {"top_p": 1},
    {"min_p": 0}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"repetition_penalty": 1}, {"temperature": 0},
    {"bad_words": []}, {"allowed_token_ids": []}, {"return_token_ids": False}, {"return_tokens_as_token_ids": False},
    {"stream_options": {"include_usage": True}}, {"stream": False}, {"structured_outputs": {}}, {"vllm_xargs": {}},
    {"response_format": {"type": "text"}}, {"truncation_side": "left"}, {"session_id": "s"}, {"logits_processors": []},
    {"guided_decoding_backend": "xgrammar"}, {"thinking_token_budget": -1}, {"kv_transfer_params": {}},
    {"structured_outputs": {"json_object": False, "disable_any_whitespace": False, "json": None}},
]  # fmt: skip
IN_CHAT = [
    {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True},
    {"functions": []}, {"function_call": "none"}, {"tools": [TOOL], "tool_choice": "none"},
    {"functions": [{"name": "f"}], "function_call": "none"}, {"reasoning_effort": "high"}, {"verbosity": "low"},
    {"modalities": ["text"]}, {"prediction": {"type": "content", "content": "x"}}, {"add_generation_prompt": True},
    {"chat_template_kwargs": {}}, {"documents": []}, {"mm_processor_kwargs": {}}, {"media_io_kwargs": {}},
    {"add_special_tokens": False}, {"include_reasoning": True}, {"logprobs": False, "top_logprobs": 0},
    {"continue_final_message": False}, {"focus": {}}, {"focus": {"vision_sampler": True, "threshold": None}},
]  # fmt: skip
IN_TEXT = [{"suffix": ""}, {"add_special_tokens": True}]
NULLS = sorted(
    {
        *chat_params.CompletionCreateParamsBase.__annotations__,
        *ChatCompletionRequest.without_effect,
        *ChatCompletionRequest.names(),
    }
    - {"model", "messages"}
)


async def test_what_changes_nothing_is_accepted_and_changes_nothing():
    async with open_door() as door:
        for path, bodies in (
            ("/v1/chat/completions", [{}, *EVERYWHERE, *IN_CHAT, dict.fromkeys(NULLS)]),
            ("/v1/completions", [{}, *EVERYWHERE, *IN_TEXT, dict.fromkeys(CompletionRequest.without_effect)]),
        ):
            door.model.requests.clear()
            for body in bodies:
                assert (await door.post(body, path))[0] == 200, body
            plain, *others = door.model.requests
            for body, request in zip(bodies[1:], others, strict=True):
                request.request_id = plain.request_id
                for name in body.keys() & {"top_k", "top_p", "min_p", "min_tokens", "temperature", "presence_penalty",
                                           "frequency_penalty", "repetition_penalty"}:  # fmt: skip
                    request.sampling.ClearField(name)
                assert request == plain, body


REFUSED_EVERYWHERE = [
    ({"n": 2}, "n", "is 2, which is not supported; expected 1"),
    ({"n": True}, "n", "is True, which is not supported; expected 1"),
    ({"best_of": 3}, "best_of", "is 3"),
    ({"echo": True}, "echo", "is True, which is not supported; expected false"),
    ({"use_beam_search": True}, "use_beam_search", "is True"),
    ({"length_penalty": 0.5}, "length_penalty", "is 0.5"),
    ({"priority": -1}, "priority", "is -1"),
    ({"bad_words": ["x"]}, "bad_words", "is ['x'], which is not supported; expected []"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "is 1, which is not supported"),
    ({"moderation": {"model": "m"}}, "moderation", "is {'model': 'm'}, which is not supported"),
    ({"cache_salt": "x"}, "cache_salt", "is 'x'"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "is 5"),
    ({"min_tokens": 9, "max_tokens": 5}, "min_tokens", "is 9, expected 0 to max_tokens, which is 5"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "is -1"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "has 65 ids"),
    ({"logit_bias": {"7": 101}}, "logit_bias[7]", "is 101.0, expected [-100, 100]"),
    ({"logit_bias": {"seven": 1}}, "logit_bias", "has the key 'seven', expected token ids"),
    ({"logit_bias": {str(2**32): 1}}, "logit_bias", "has the key '4294967296', expected token ids"),
    ({"logit_bias": {"7": "1"}}, "logit_bias", "is '1' for token 7, expected a number"),
    ({"logit_bias": {"7": True}}, "logit_bias", "is True for token 7"),
    ({"logit_bias": {"7": 10**400}}, "logit_bias", "for token 7, expected a number"),
    ({"temperature": 10**400}, "temperature", "is 1000000000"),
    ({"logit_bias": {"-7": 1}}, "logit_bias", "has the key '-7'"),
    ({"logit_bias": [7]}, "logit_bias", "is [7], expected"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "has 1025 tokens, expected at most 1024"),
    ({"top_k": -2}, "top_k", "is -2"),
    ({"seed": 2**64}, "seed", "is 18446744073709551616"),
    ({"seed": -(2**63) - 1}, "seed", "is -9223372036854775809"),
    ({"seed": 1.5}, "seed", "is 1.5"),
    ({"stream_options": {"include": True}}, "stream_options.include", "is not supported"),
    ({"nonsense": 1}, "nonsense", "is not supported"),
    ({"request_id": "no spaces"}, "request_id", "expected up to 128 letters"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "is 'structural_tag', expected 'text'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "expected json_schema with"),
    (
        {"response_format": {"type": "text", "schema": {}}},
        "response_format.schema",
        "is not supported with type 'text'",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        "response_format.json_schema.schema",
        "is 5, expected a JSON Schema",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "guided_regex",
        "is set beside response_format",
    ),
    (
        {"guided_choice": ["a"], "guided_regex": "a"},
        "guided_regex",
        "is set beside guided_choice, expected one of them",
    ),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "beside structured_outputs.json"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "is 'x'"),
    ({"structured_outputs": {"lark": "x"}}, "structured_outputs.lark", "is not supported"),
    ({"guided_choice": []}, "guided_choice", "is empty, expected at least one text"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]", "is empty"),
    ({"guided_regex": "a" * 70_000}, "guided_regex", "has 70000 characters, expected at most 65536"),
    ({"guided_json": 5}, "guided_json", "is 5, expected"),
]
REFUSED_IN_CHAT = [
    ({"tools": [TOOL]}, "tools", "which is not supported; expected []"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tools", "which is not supported; expected []"),
    ({"tool_choice": "required", "tools": [TOOL]}, "tools", "which is not supported; expected []"),
    ({"tool_choice": "required"}, "tool_choice", 'is \'required\', which is not supported; expected "none" or "auto"'),
    ({"functions": [{"name": "f"}]}, "functions", "which is not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "is {'name': 'f'}"),
    (
        {"modalities": ["text", "audio"]},
        "modalities",
        "is ['text', 'audio'], which is not supported; expected [\"text\"]",
    ),
    ({"audio": {"voice": "x"}}, "audio", "which is not supported"),
    ({"web_search_options": {}}, "web_search_options", "is {}, which is not supported"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "is {'x': 1}"),
    ({"chat_template": "x"}, "chat_template", "is 'x'"),
    ({"add_generation_prompt": False}, "add_generation_prompt", "is False, as continue_final_message is"),
    ({"continue_final_message": True}, "continue_final_message", "expects the last turn to be the assistant's"),
    ({"max_completion_tokens": 9999, "max_tokens": 1}, "max_completion_tokens", "is 9999, the limit is 4096"),
    ({"logprobs": 1}, "logprobs", "is 1"),
    ({"prompt": "x"}, "prompt", "is not supported"),
    ({"suffix": ""}, "suffix", "is not supported"),
]
REFUSED_IN_TEXT = [
    ({"suffix": "x"}, "suffix", "is 'x', which is not supported; expected \"\""),
    ({"prompt": ["a"] * 33}, "prompt", "holds 33 prompts, expected at most 32"),
    ({"prompt": ["a", 5]}, "prompt", "expected text, token ids, or a list of one kind"),
    ({"prompt": [[1], []]}, "prompt", "is [[1], []], expected text, token ids"),
    ({"prompt": []}, "prompt", "is [], expected text, token ids"),
    ({"prompt": [1, "a"]}, "prompt", "holds 'a', expected token ids"),
    ({"prompt": "x" * 65_537}, "prompt", "has 65537 characters, the limit is 65536"),
    ({"prompt": [5, -1]}, "prompt", "holds -1, expected token ids"),
    ({"prompt": None}, "prompt", "is missing"),
    ({"logprobs": 21}, "logprobs", "is 21, expected [0, 20]"),
    ({"logprobs": True}, "logprobs", "is True"),
    ({"messages": []}, "messages", "is not supported"),
    ({"tools": []}, "tools", "is not supported"),
]


async def test_what_would_change_the_answer_is_refused_by_name_and_value():
    async with open_door() as door:
        for path, cases in (
            ("/v1/chat/completions", REFUSED_EVERYWHERE + REFUSED_IN_CHAT),
            ("/v1/completions", REFUSED_EVERYWHERE + REFUSED_IN_TEXT),
        ):
            for body, field, says in cases:
                status, error = await door.refused(body, path)
                assert (status in (400, 413), error["param"]) == (True, field), (path, body, error)
                assert says in error["message"] and error["message"].startswith(f"{field}: "), (path, body, error)
        assert not door.model.requests and not door.encoder.requests


def known(kind) -> set[str]:
    return {*kind.names(), *kind.without_effect}


def test_every_field_of_openais_types_is_known():
    """A new version of the client package that knows a new field must be decided on here."""
    assert set(chat_params.CompletionCreateParamsStreaming.__annotations__) <= known(ChatCompletionRequest)
    assert {*text_params.CompletionCreateParamsBase.__annotations__, "stream"} <= known(CompletionRequest)
    assert set(ChatCompletionStreamOptionsParam.__annotations__) <= known(StreamOptions)
    for param in (ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam):
        assert set(param.__annotations__) <= known(Message)
    for param in (ChatCompletionContentPartTextParam, ChatCompletionContentPartImageParam):
        assert set(param.__annotations__) <= known(Part)
    assert set(ImageURL.__annotations__) <= known(ImageUrl)


async def test_settings_that_are_carried_out():
    asked = {"min_tokens": 2, "max_tokens": 9, "stop_token_ids": [5, 6], "logit_bias": {"7": -100, "8": 1.5},
             "include_stop_str_in_output": True, "skip_special_tokens": False, "seed": -1, "top_k": 3}  # fmt: skip
    expected = llm_pb2.SamplingParams(
        min_tokens=2, max_tokens=9, stop_token_ids=[5, 6], logit_bias={7: -100, 8: 1.5},
        include_stop_str_in_output=True, keep_special_tokens=True, seed=2**64 - 1, top_k=3,
    )  # fmt: skip
    async with open_door() as door:
        for path in ("/v1/chat/completions", "/v1/completions"):
            assert (await door.post(asked, path))[0] == 200
            assert door.model.requests[-1].sampling == expected
        assert (await door.post({"max_tokens": 3, "max_completion_tokens": 8, "request_id": "mine"}))[0] == 200
        assert door.model.requests[-1].sampling.max_tokens == 8  # the newer field
        assert door.model.requests[-1].request_id.startswith("mine.")
        for seed in (2**63, 2**64 - 1, -(2**63)):
            assert (await door.post({"seed": seed}))[0] == 200
            assert door.model.requests[-1].sampling.seed == seed % 2**64


SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "default": None}}}
CONSTRAINTS = [
    ({"response_format": {"type": "json_object"}}, llm_pb2.Constraint(json_object=True)),
    ({"structured_outputs": {"json_object": True}}, llm_pb2.Constraint(json_object=True)),
    ({"guided_choice": ["a", "b"]}, llm_pb2.Constraint(choice=llm_pb2.Choices(texts=["a", "b"]))),
    ({"structured_outputs": {"choice": ["a"]}}, llm_pb2.Constraint(choice=llm_pb2.Choices(texts=["a"]))),
    ({"guided_regex": "a+"}, llm_pb2.Constraint(regex="a+")),
    ({"structured_outputs": {"regex": "a+"}}, llm_pb2.Constraint(regex="a+")),
    ({"guided_grammar": 'start: "a"'}, llm_pb2.Constraint(grammar='start: "a"')),
    ({"structured_outputs": {"grammar": "x"}, "response_format": {"type": "text"}}, llm_pb2.Constraint(grammar="x")),
    *[
        (body, llm_pb2.Constraint(json_schema='{"type":"object","properties":{"a":{"type":"string","default":null}}}'))
        for body in (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            {"guided_json": SCHEMA},
            {"structured_outputs": {"json": SCHEMA}},
            {"guided_json": '{"type":"object","properties":{"a":{"type":"string","default":null}}}'},
        )
    ],
]


async def test_what_an_answer_must_match_reaches_the_stage():
    async with open_door() as door:
        for body, constraint in CONSTRAINTS:
            for path in ("/v1/chat/completions", "/v1/completions"):
                assert (await door.post(body, path))[0] == 200, body
                assert door.model.requests[-1].sampling.constraint == constraint, body


async def test_usage_in_every_piece():
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    async with open_door() as door:
        chunks = [chunk async for chunk in await door.ask(stream=True, stream_options=options)]
        silent = [chunk async for chunk in await door.ask(stream=True, stream_options={"include_usage": True})]
        without = [
            chunk async for chunk in await door.ask(stream=True, stream_options={"continuous_usage_stats": True})
        ]
    counts = [0, *range(1, len(WORDS) + 1), len(WORDS), len(WORDS)]
    assert [chunk.usage.completion_tokens for chunk in chunks] == counts
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {PROMPT_TOKENS}
    assert all(chunk.usage.total_tokens == PROMPT_TOKENS + chunk.usage.completion_tokens for chunk in chunks)
    assert [chunk.usage is None for chunk in silent] == [True] * (len(silent) - 1) + [False]
    assert [chunk.usage.completion_tokens for chunk in without] == counts[:-1]
