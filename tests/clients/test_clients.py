"""What other people's clients are told when they ask what number is on the red card, each in its own way."""

from __future__ import annotations

import sys

import pytest

from cluster.checks import REPOSITORY
from tests.clients.conftest import ENVIRONMENTS, cases

HERE = REPOSITORY / "tests" / "clients"
SIXTY = " 60"
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
        "parsed_to_a_type": True,
        "one_of_the_choices": ["60", "60"],
        "logprobs": [SIXTY + "</s>", True],
        "completion": ["text_completion", 4, True],
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
        "structured_output": True,
        "structured_output_with_the_raw_answer": [None, True, True],
        "structured_output_in_json_mode": True,
        "completion": True,
        "tools_are_refused_by_name": ["OpenAIInvalidRequestError", True],
    },
    "litellm": {
        "whole": [SIXTY, "stop", True],
        "every_common_argument": [SIXTY, True],
        "streamed": [SIXTY, True],
        "structured_output": True,
        "json_mode": "{",
        "its_vllm_provider": "60",
        "completion": ["text_completion", True],
        "tools_are_refused_by_name": True,
    },
    "llama_index": {
        "whole": [SIXTY, True],
        "detail_low_costs_less": True,
        "streamed": SIXTY,
        "asynchronous": SIXTY,
        "structured_output": True,
        "structured_output_of_a_chat": True,
        "complete_in_a_chat": True,
        "completion_mode": [True, True],
        "completion_mode_of_a_chat": True,
    },
    "instructor": {
        "json_schema": True,
        "json_schema_with_its_own_image": True,
        "json": True,
        "json_with_the_completion": [True, True],
        "partial_results_of_a_stream": True,
        "tools_are_refused_by_name": True,
    },
    "pydantic_ai": {
        "whole": [SIXTY, True],
        "every_common_setting": SIXTY,
        "history": SIXTY,
        "streamed": [SIXTY, True],
        "native_output": True,
        "prompted_output": True,
        "tools_are_refused_by_name": True,
        "an_address_is_refused": True,
    },
}
NODE = {
    "openai": {
        "whole": [SIXTY, "stop", True],
        "streamed": [SIXTY, True],
        "streamed_by_its_helper": SIXTY,
        "parsed_to_a_type": True,
        "completion": ["text_completion", "string"],
        "tools_are_refused_by_name": "tools",
    },
    "ai_sdk": {
        "whole": [SIXTY, "stop", True],
        "every_setting": SIXTY,
        "streamed": [SIXTY, True],
        "object": True,
        "object_streamed": True,
        "one_of_the_choices": "60",
        "completion": "string",
        "openais_chat": [SIXTY, True],
        "openais_chat_with_an_object": True,
        "openais_completion": "string",
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
