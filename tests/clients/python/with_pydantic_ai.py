"""pydantic-ai: an agent with an image, whole and streamed, with native and prompted output."""

from __future__ import annotations

import asyncio

import pydantic
from cases import BASE_URL, IMAGE, MODEL, QUESTION, Card, functions, tell
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key="none"))
ASKED = [QUESTION, BinaryContent(data=IMAGE, media_type="image/png")]


class Anything(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")


def whole():
    result = Agent(model, instructions="Be brief.").run_sync(ASKED)
    return [result.output, result.usage.output_tokens > 0]


def every_common_setting():
    settings = ModelSettings(
        max_tokens=16,
        temperature=0,
        top_p=1,
        timeout=120,
        parallel_tool_calls=False,
        seed=1,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        stop_sequences=["\n"],
    )
    return Agent(model, model_settings=settings).run_sync(ASKED).output


def history():
    agent = Agent(model, system_prompt="Be brief.")
    first = agent.run_sync(ASKED)
    return agent.run_sync(QUESTION, message_history=first.all_messages()).output


def streamed():
    async def run():
        async with Agent(model).run_stream(ASKED) as result:
            return [await result.get_output(), result.usage.output_tokens > 0]

    return asyncio.run(run())


def native_output():
    return Agent(model, output_type=NativeOutput(Card), retries=0).run_sync(ASKED).output.model_dump()


def prompted_output():
    return Agent(model, output_type=PromptedOutput(Anything), retries=0).run_sync(ASKED).output.model_dump()


def tools_are_refused_by_name():
    try:
        Agent(model, output_type=Card, retries=0).run_sync(ASKED)
    except Exception as error:
        return "tools" in str(error)


def an_address_is_refused():
    try:
        Agent(model).run_sync([QUESTION, ImageUrl(url="http://127.0.0.1:9/card.png")])
    except Exception as error:
        return "nothing is fetched" in str(error)


if __name__ == "__main__":
    tell(*functions(__name__))
