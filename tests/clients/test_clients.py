"""What other people's clients are told when they ask what number is on the red card, each in its own way."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cluster.checks import REPOSITORY
from tests.clients.conftest import ENVIRONMENTS, cases

HERE = REPOSITORY / "tests" / "clients"


class Like:
    """Equal to what passes a check."""

    def __init__(self, name: str, check: Callable[[Any], bool]):
        self._name, self._check = name, check

    def __eq__(self, said: object) -> bool:
        return self._check(said)

    def __repr__(self) -> str:
        return self._name


def is_card(said: Any) -> bool:
    right = isinstance(said, dict) and said.keys() == {"number", "colour"}
    return right and said["number"] == 60 and said["colour"] in ("red", "yellow", "pink")


SIXTY = " 60"
CARD = Like("a card with the number 60", is_card)
OBJECT = Like("a JSON object", lambda said: isinstance(said, dict))
WORDS = Like("a text", lambda said: isinstance(said, str))
PYTHON = {
    "openai": {
        "whole": [SIXTY, "stop", True],
        "streamed": [SIXTY, True],
        "streamed_by_its_helper": [SIXTY, True],
        "asynchronous": [SIXTY] * 3,
        "every_field_that_changes_nothing": SIXTY,
        "detail_low_costs_less": [SIXTY, True],
        "history": SIXTY,
        "continued": "0",
        "parsed_to_a_type": CARD,
        "an_object_that_would_not_end": ["length", ["cards", "title"]],
        "one_of_the_choices": ["60", "60"],
        "logprobs": [SIXTY + "</s>", True],
        "completion": ["text_completion", 4, WORDS],
        "completions_of_several_prompts": [0, 1],
        "health": 200,
        "tools_are_refused_by_name": "tools",
        "responses_are_refused": True,
    },
    "langchain": {
        "image_as_a_string": SIXTY,
        "image_as_a_standard_block": [SIXTY, True, "stop"],
        "named_message_and_history": SIXTY,
        "every_setting": [SIXTY, True],
        "streamed": [SIXTY, True],
        "batch_and_async": [SIXTY] * 3,
        "structured_output": CARD,
        "structured_output_with_the_raw_answer": [None, CARD, CARD],
        "structured_output_in_json_mode": OBJECT,
        "completion": WORDS,
        "completions_in_a_batch": [WORDS, WORDS],
        "tools_are_refused_by_name": ["OpenAIInvalidRequestError", True],
    },
    "litellm": {
        "whole": [SIXTY, "stop", True],
        "every_common_argument": [SIXTY, True],
        "streamed": [SIXTY, True],
        "structured_output": CARD,
        "json_mode": OBJECT,
        "its_vllm_provider": "60",
        "completion": ["text_completion", WORDS],
        "tools_are_refused_by_name": True,
    },
    "llama_index": {
        "whole": [SIXTY, True],
        "detail_low_costs_less": True,
        "streamed": SIXTY,
        "asynchronous": SIXTY,
        "structured_output": CARD,
        "structured_output_of_a_chat": CARD,
        "complete_in_a_chat": WORDS,
        "completion_mode": [WORDS, WORDS],
        "completion_mode_of_a_chat": WORDS,
    },
    "instructor": {
        "json_schema": CARD,
        "json_schema_with_its_own_image": CARD,
        "json": OBJECT,
        "json_with_the_completion": [CARD, True],
        "partial_results_of_a_stream": CARD,
        "tools_are_refused_by_name": True,
    },
    "pydantic_ai": {
        "whole": [SIXTY, True],
        "every_common_setting": SIXTY,
        "history": SIXTY,
        "streamed": [SIXTY, True],
        "native_output": CARD,
        "prompted_output": OBJECT,
        "tools_are_refused_by_name": True,
        "an_address_is_refused": True,
    },
}
NODE = {
    "openai": {
        "whole": [SIXTY, "stop", True],
        "streamed": [SIXTY, True],
        "streamed_by_its_helper": SIXTY,
        "parsed_to_a_type": CARD,
        "completion": ["text_completion", WORDS],
        "tools_are_refused_by_name": "tools",
    },
    "ai_sdk": {
        "whole": [SIXTY, "stop", True],
        "every_setting": SIXTY,
        "streamed": [SIXTY, True],
        "object": CARD,
        "object_streamed": CARD,
        "one_of_the_choices": "60",
        "completion": WORDS,
        "openais_chat": [SIXTY, True],
        "openais_chat_with_an_object": CARD,
        "openais_completion": WORDS,
        "openais_responses_are_refused": [404, True],
    },
}


@pytest.mark.parametrize("client", PYTHON)
def test_python(client, server, run):
    python = sys.executable if client == "openai" else ENVIRONMENTS / client / "bin" / "python"
    said = cases(run(python, HERE / "python" / f"with_{client}.py", f"{server.url}/v1", server.model))
    assert said == PYTHON[client]


@pytest.mark.parametrize("client", NODE)
def test_node(client, server, run):
    said = cases(run("node", HERE / "node" / f"with_{client}.mjs", f"{server.url}/v1", server.model))
    assert said == NODE[client]


def test_node_over_grpc(server, run):
    said = cases(run("node", HERE / "node" / "with_grpc.mjs", server.grpc))
    assert said == {
        "whole": [SIXTY, "FINISH_REASON_STOP", 53],
        "focus_map": [1, 1027, 299, 53],
        "model_info": server.model,
        "a_bad_request_is_refused_by_name": [3, "sampling.temperature"],
    }


def test_buf_curl(server, run):
    """The command that docs/clients.md shows."""
    image = base64.b64encode((REPOSITORY / "docs" / "assets" / "sample.png").read_bytes()).decode()
    parts = [{"image": image}, {"text": "What number is on the red card?"}]
    request = json.dumps({"turns": [{"role": "ROLE_USER", "parts": parts}], "return_map": True})
    buf = HERE / "node" / "node_modules" / ".bin" / "buf"
    url = f"http://{server.grpc}/focusllava.v1.FocusService/Chat"
    options = ("--schema", REPOSITORY / "protos", "--protocol", "grpc", "--http2-prior-knowledge")
    printed = run(buf, "curl", *options, "--header", "application: gateway", "--data", "@-", url, given=request)
    decoder, events = json.JSONDecoder(), []
    while printed := printed.lstrip():
        event, end = decoder.raw_decode(printed)
        events.append(event)
        printed = printed[end:]
    assert "".join(event.get("token", {}).get("text", "") for event in events) == SIXTY
    (maps,) = (event["focusMaps"] for event in events if "focusMaps" in event)
    assert len(maps["maps"][0]["boxes"]) == 4 * 299 and events[-1]["finished"]["reason"] == "FINISH_REASON_STOP"
