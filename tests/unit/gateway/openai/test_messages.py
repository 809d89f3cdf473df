"""Images and conversations as OpenAI's clients write them."""

from __future__ import annotations

import json

import pytest

from focusllava.v1 import image_pb2, llm_pb2
from services.gateway.openai.request import ChatCompletionRequest
from tests.fakes.http_door import IMAGE, QUESTION, TEXT, open_door
from tests.fakes.stages import PNG

IMAGE_URL = IMAGE["image_url"]["url"]
WORD = {"type": "text", "text": "Why?"}
HIGH, LOW, UNSET = image_pb2.IMAGE_DETAIL_HIGH, image_pb2.IMAGE_DETAIL_LOW, image_pb2.IMAGE_DETAIL_UNSPECIFIED


@pytest.mark.parametrize(
    "part, detail",
    [
        ({"type": "image_url", "image_url": IMAGE_URL}, UNSET),
        ({"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": None}}, UNSET),
        ({"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "auto"}, "text": None}, UNSET),
        ({"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "low"}}, LOW),
        ({"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "high"}, "cache_control": {}}, HIGH),
        ({"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "original"}}, HIGH),
        ({"type": "image_url", "image_url": IMAGE_URL.replace("data:image/png", "DATA:IMAGE/PNG") + "\n"}, UNSET),
    ],
)
def test_images_as_clients_write_them(part, detail):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": [part]}],
        "focus": {"reduced_jpeg": False, "map_share": 0.5},
    }
    request = ChatCompletionRequest.parse(json.dumps(body).encode(), 1000).to_chat_requests("r")[0]
    (found,) = request.turns[0].parts
    assert found.image == PNG
    assert found.image_options == image_pb2.ImageOptions(detail=detail, reduced_jpeg=False, map_share=0.5)


ANSWERED = {"role": "assistant", "content": "Seven.", "tool_calls": [], "annotations": [], "refusal": None,
            "audio": None, "function_call": None, "reasoning_content": "", "name": "bot",
            "provider_specific_fields": {"refusal": None}}  # fmt: skip


MESSAGES = [
    ([QUESTION, ANSWERED, {"role": "user", "name": "Ann", "content": "Why?"}], ["user", "assistant", "user"]),
    ([{"role": "system", "content": "a", "name": "s"}, {"role": "developer", "content": [WORD]}, QUESTION],
     ["system", "system", "user"]),
    ([QUESTION, {"role": "system", "content": "Be short."}], ["user", "system"]),
    ([{"role": "user", "content": [IMAGE]}], ["user"]),
    ([QUESTION, ANSWERED], ["user", "assistant"]),
    ([QUESTION, {"role": "assistant", "content": None, "refusal": "No."}, QUESTION], ["user", "assistant", "user"]),
    ([QUESTION, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, QUESTION],
     ["user", "assistant", "user"]),
    ([QUESTION, {"role": "assistant", "content": None, "tool_calls": None}, QUESTION], ["user", "assistant", "user"]),
]  # fmt: skip


NO_MESSAGES = [
    ({**ANSWERED, "tool_calls": [{"id": "x"}]}, "messages[1].tool_calls", "is [{'id': 'x'}], which is not supported"),
    ({**ANSWERED, "function_call": {"name": "f"}}, "messages[1].function_call", "which is not supported"),
    ({**ANSWERED, "audio": {"id": "x"}}, "messages[1].audio", "is {'id': 'x'}"),
    ({"role": "tool", "content": "x", "tool_call_id": "y"}, "messages[1].tool_call_id", "is not supported"),
    ({"role": "function", "content": "x", "name": "y"}, "messages[1].role", "is 'function'"),
    ({"role": "user", "content": None}, "messages[1].content", "is missing"),
    ({"role": "user", "content": []}, "messages[1].content", "is empty"),
    ({"role": "user", "content": "  "}, "messages[1].content", "the question is empty"),
    ({"role": "assistant", "content": [IMAGE]}, "messages[1].content[0].image_url.url", "user turns only"),
    ({"role": "user", "content": [{"type": "video_url", "video_url": {}}]}, "messages[1].content[0].video_url", "not"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "full"}}]},
     "messages[1].content[0].image_url.detail", "is 'full', expected 'auto', 'low'"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": IMAGE_URL, "text": "x"}]},
     "messages[1].content[0]", "expected image_url and not text or refusal"),
]  # fmt: skip


async def test_conversations_as_clients_keep_them():
    async with open_door() as door:
        for messages, roles in MESSAGES:
            status, answer = await door.post({"messages": messages})
            assert (status, answer["choices"][0]["message"]["content"]) == (200, TEXT), answer
            names = [llm_pb2.Role.Name(turn.role)[5:].lower() for turn in door.model.requests[-1].turns]
            assert names == roles and not door.model.requests[-1].continue_final_message
        said = [request.turns[1].parts[0].text for request in door.model.requests[-3:]]
        assert said == ["No.", "No.", ""]
        for message, field, says in NO_MESSAGES:
            status, error = await door.refused({"messages": [QUESTION, message]})
            assert (status, error["param"]) == (400, field) and says in error["message"], error


async def test_an_answer_that_the_client_began_is_continued():
    async with open_door() as door:
        for fields in ({}, {"add_generation_prompt": False}):
            messages = [QUESTION, {"role": "assistant", "content": "It says"}]
            status, _ = await door.post({"messages": messages, "continue_final_message": True, **fields})
            request = door.model.requests[-1]
            assert status == 200 and request.continue_final_message and request.turns[-1].parts[0].text == "It says"
        status, error = await door.refused(
            {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
        )
        assert (status, error["param"]) == (400, "add_generation_prompt")
