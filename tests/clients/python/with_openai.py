"""OpenAI's client: every field of a chat completion that changes nothing, structured output, completions."""

from __future__ import annotations

import asyncio
import urllib.request

import openai
from cases import BASE_URL, IMAGE_URL, MODEL, QUESTION, Card, Story, functions, question, tell

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=120)
ask = client.chat.completions


def whole():
    answer = ask.create(model=MODEL, messages=question())
    choice, usage = answer.choices[0], answer.usage
    return [
        choice.message.content,
        choice.finish_reason,
        usage.total_tokens == usage.prompt_tokens + usage.completion_tokens,
    ]


def streamed():
    chunks = list(ask.create(model=MODEL, messages=question(), stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return [text, chunks[-1].usage.completion_tokens > 0]


def streamed_by_its_helper():
    with ask.stream(model=MODEL, messages=question()) as stream:
        kinds = {event.type for event in stream}
        return [stream.get_final_completion().choices[0].message.content, "content.delta" in kinds]


def asynchronous():
    async def run():
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0) as other:
            answers = [other.chat.completions.create(model=MODEL, messages=question()) for _ in range(3)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    return asyncio.run(run())


def every_field_that_changes_nothing():
    answer = ask.create(
        model=MODEL,
        messages=question(),
        frequency_penalty=0,
        function_call="none",
        functions=[],
        logit_bias={},
        logprobs=False,
        max_completion_tokens=16,
        max_tokens=64,
        metadata={"a": "b"},
        modalities=["text"],
        n=1,
        parallel_tool_calls=True,
        presence_penalty=0,
        prompt_cache_key="k",
        reasoning_effort="low",
        response_format={"type": "text"},
        safety_identifier="s",
        seed=-(2**63),
        service_tier="auto",
        stop=None,
        store=True,
        temperature=0,
        tool_choice="none",
        tools=[],
        top_p=1,
        user="u",
        verbosity="low",
        extra_body={
            "best_of": 1,
            "use_beam_search": False,
            "length_penalty": 1.0,
            "min_tokens": 0,
            "top_k": -1,
            "skip_special_tokens": True,
            "echo": False,
            "add_generation_prompt": True,
            "stop_token_ids": [],
            "include_stop_str_in_output": False,
            "chat_template_kwargs": {},
            "priority": 0,
        },
    )
    return answer.choices[0].message.content


def detail_low_costs_less():
    low, high = (ask.create(model=MODEL, messages=question(detail=detail)) for detail in ("low", "high"))
    return [high.choices[0].message.content, low.usage.prompt_tokens < high.usage.prompt_tokens / 2]


def history():
    turns = [
        {"role": "system", "content": "Answer with one word."},
        *question(),
        {"role": "assistant", "content": "60", "tool_calls": [], "refusal": None, "audio": None, "annotations": []},
        {"role": "user", "content": "What number is on the red card?", "name": "ann"},
    ]
    return ask.create(model=MODEL, messages=turns).choices[0].message.content


def continued():
    turns = [*question(), {"role": "assistant", "content": "6"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    return ask.create(model=MODEL, messages=turns, extra_body=fields).choices[0].message.content


def parsed_to_a_type():
    answer = ask.parse(model=MODEL, messages=question(), response_format=Card)
    return answer.choices[0].message.parsed.model_dump()


def an_object_that_would_not_end():
    schema = {"type": "json_schema", "json_schema": {"name": "story", "schema": Story.model_json_schema()}}
    choice = ask.create(model=MODEL, messages=question(), max_tokens=64, response_format=schema).choices[0]
    return [choice.finish_reason, sorted(Story.model_validate_json(choice.message.content).model_dump())]


def one_of_the_choices():
    choices = {"guided_choice": ["40", "60", "80"]}, {"structured_outputs": {"choice": ["40", "60", "80"]}}
    return [ask.create(model=MODEL, messages=question(), extra_body=c).choices[0].message.content for c in choices]


def logprobs():
    answer = ask.create(model=MODEL, messages=question(), logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    return [
        "".join(bytes(token.bytes).decode() for token in tokens),
        {len(token.top_logprobs) for token in tokens} == {2},
    ]


def completion():
    answer = client.completions.create(model=MODEL, prompt="The number is", max_tokens=4, extra_body={"min_tokens": 4})
    return [answer.object, answer.usage.completion_tokens, answer.choices[0].text]


def completions_of_several_prompts():
    answer = client.completions.create(model=MODEL, prompt=["The number is", "The word is"], max_tokens=4)
    return [choice.index for choice in answer.choices]


def health():
    with urllib.request.urlopen(BASE_URL.removesuffix("/v1") + "/health", timeout=30) as response:
        return response.status


def tools_are_refused_by_name():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    try:
        ask.create(model=MODEL, messages=question(), tools=[tool])
    except openai.BadRequestError as error:
        return error.param


def responses_are_refused():
    picture = {"type": "input_image", "image_url": IMAGE_URL, "detail": "auto"}
    turn = {"role": "user", "content": [picture, {"type": "input_text", "text": QUESTION}]}
    try:
        client.responses.create(model=MODEL, input=[turn])
    except openai.NotFoundError as error:
        return "/v1/responses" in str(error)


if __name__ == "__main__":
    tell(*functions(__name__))
