"""instructor in its JSON and JSON_SCHEMA modes; its default mode, TOOLS, is refused by name."""

from __future__ import annotations

import instructor
import openai
import pydantic
from cases import BASE_URL, IMAGE_URL, MODEL, QUESTION, Card, functions, question, tell

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=120)


class Anything(pydantic.BaseModel):
    """A type that any JSON object is of: JSON mode promises no more, and a small model follows no schema in words."""

    model_config = pydantic.ConfigDict(extra="allow")


def _create(mode: instructor.Mode, model: type, messages: list, **fields):
    ask = instructor.from_openai(client, mode=mode).chat.completions
    return ask.create(model=MODEL, response_model=model, messages=messages, max_retries=0, **fields)


def json_schema():
    return _create(instructor.Mode.JSON_SCHEMA, Card, question()).model_dump()


def json_schema_with_its_own_image():
    asked = {"role": "user", "content": [instructor.Image.from_base64(IMAGE_URL), QUESTION]}
    return _create(instructor.Mode.JSON_SCHEMA, Card, [asked]).model_dump()


def json():
    return _create(instructor.Mode.JSON, Anything, question()).model_dump()


def json_with_the_completion():
    ask = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions
    card, raw = ask.create_with_completion(model=MODEL, response_model=Card, messages=question(), max_retries=0)
    return [card.model_dump(), raw.usage.completion_tokens > 0]


def partial_results_of_a_stream():
    ask = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions
    *_, last = ask.create_partial(model=MODEL, response_model=Card, messages=question(), max_retries=0)
    return last.model_dump()


def tools_are_refused_by_name():
    try:
        _create(instructor.Mode.TOOLS, Card, question())
    except Exception as error:
        return "tools" in str(error)


if __name__ == "__main__":
    tell(*functions(__name__))
