"""langchain-openai: ChatOpenAI as its documentation shows it, and OpenAI, which asks for completions."""

from __future__ import annotations

import asyncio
import base64
import json

from cases import BASE_URL, IMAGE, IMAGE_URL, MODEL, QUESTION, Card, functions, tell
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

SETTINGS = {"model": MODEL, "base_url": BASE_URL, "api_key": "none", "max_retries": 0, "timeout": 120}
chat = ChatOpenAI(**SETTINGS)
WORDS = {"type": "text", "text": QUESTION}
BLOCK = {"type": "image", "base64": base64.b64encode(IMAGE).decode(), "mime_type": "image/png"}


def _asked(*parts, **fields) -> HumanMessage:
    return HumanMessage(content=[*parts, WORDS], **fields)


def image_as_a_string():
    return chat.invoke([_asked({"type": "image_url", "image_url": IMAGE_URL})]).content


def image_as_a_standard_block():
    answer = chat.invoke([_asked(BLOCK)])
    return [answer.content, answer.usage_metadata["output_tokens"] > 0, answer.response_metadata["finish_reason"]]


def named_message_and_history():
    turns = [SystemMessage("Be brief."), _asked(BLOCK, name="ann"), AIMessage("60"), HumanMessage(QUESTION, name="ann")]
    return chat.invoke(turns).content


def every_setting():
    model = ChatOpenAI(
        **SETTINGS,
        temperature=0,
        max_tokens=16,
        top_p=1,
        seed=1,
        n=1,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        stop=["\n"],
        logprobs=True,
        top_logprobs=1,
        service_tier="auto",
        stream_usage=True,
        reasoning_effort="low",
        verbosity="low",
        store=False,
        metadata={"a": "b"},
    )
    answer = model.invoke([_asked(BLOCK)])
    return [answer.content, len(answer.response_metadata["logprobs"]["content"]) > 0]


def streamed():
    chunks = list(ChatOpenAI(**SETTINGS, stream_usage=True).stream([_asked(BLOCK)]))
    return [
        "".join(chunk.content for chunk in chunks),
        sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) > 0,
    ]


def batch_and_async():
    async def run():
        return await chat.abatch([[_asked(BLOCK)], [_asked(BLOCK)]])

    return [answer.content for answer in [*chat.batch([[_asked(BLOCK)]]), *asyncio.run(run())]]


def structured_output():
    return chat.with_structured_output(Card).invoke([_asked(BLOCK)]).model_dump()


def structured_output_with_the_raw_answer():
    answer = chat.with_structured_output(Card, method="json_schema", include_raw=True).invoke([_asked(BLOCK)])
    return [answer["parsing_error"], answer["parsed"].model_dump(), json.loads(answer["raw"].content)]


def structured_output_in_json_mode():
    schema = {"title": "Card", "type": "object", "properties": {}}
    return chat.with_structured_output(schema, method="json_mode").invoke([_asked(BLOCK)])


def completion():
    return OpenAI(**SETTINGS, max_tokens=4).invoke("The number is")


def completions_in_a_batch():
    return OpenAI(**SETTINGS, max_tokens=4).batch(["The number is", "The word is"])


def tools_are_refused_by_name():
    try:
        chat.with_structured_output(Card, method="function_calling").invoke([_asked(BLOCK)])
    except Exception as error:
        return [type(error).__name__, "tools" in str(error)]


if __name__ == "__main__":
    tell(*functions(__name__))
