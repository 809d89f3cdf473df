"""litellm's `openai/` and `hosted_vllm/` providers, with every argument that its documentation lists as common."""

from __future__ import annotations

import json

import litellm
from cases import BASE_URL, MODEL, Card, functions, question, tell

HERE = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": "none", "max_retries": 0, "timeout": 120}


def whole():
    answer = litellm.completion(messages=question(), **HERE)
    return [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens > 0]


def every_common_argument():
    answer = litellm.completion(
        messages=question(),
        **HERE,
        temperature=0,
        top_p=1,
        n=1,
        stream=False,
        stop=["\n"],
        max_tokens=16,
        max_completion_tokens=16,
        modalities=["text"],
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        user="u",
        response_format={"type": "text"},
        seed=1,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
        logprobs=True,
        top_logprobs=1,
        reasoning_effort="low",
        service_tier="auto",
        store=False,
        safety_identifier="s",
        prompt_cache_key="k",
        extra_headers={"x-mine": "1"},
        metadata={"a": "b"},
        functions=[],
        function_call="none",
    )
    return [answer.choices[0].message.content, len(answer.choices[0].logprobs.content) > 0]


def streamed():
    pieces = list(litellm.completion(messages=question(), **HERE, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    return [text, any(getattr(piece, "usage", None) and piece.usage.completion_tokens > 0 for piece in pieces)]


def structured_output():
    answer = litellm.completion(messages=question(), **HERE, response_format=Card)
    return Card.model_validate_json(answer.choices[0].message.content).model_dump()


def json_mode():
    answer = litellm.completion(messages=question(), **HERE, response_format={"type": "json_object"})
    return json.loads(answer.choices[0].message.content)


def its_vllm_provider():
    settings = HERE | {"model": f"hosted_vllm/{MODEL}"}
    answer = litellm.completion(messages=question(), **settings, guided_choice=["40", "60", "80"], top_k=-1)
    return answer.choices[0].message.content


def completion():
    answer = litellm.text_completion(
        prompt="The number is", **HERE | {"model": f"text-completion-openai/{MODEL}"}, max_tokens=4
    )
    return [answer.object, answer.choices[0].text]


def tools_are_refused_by_name():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    try:
        litellm.completion(messages=question(), **HERE, tools=[tool])
    except litellm.BadRequestError as error:
        return "tools" in str(error)


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    tell(*functions(__name__))
