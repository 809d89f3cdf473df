"""llama-index's OpenAILike: chat with an image at detail low, streaming, structured output, and completion mode."""

from __future__ import annotations

import asyncio

from cases import BASE_URL, IMAGE, MODEL, QUESTION, Card, functions, tell
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.llms.openai_like import OpenAILike

HERE = {"model": MODEL, "api_base": BASE_URL, "api_key": "none", "max_retries": 0, "timeout": 120}
chat = OpenAILike(**HERE, is_chat_model=True, should_use_structured_outputs=True)


def _asked(**fields) -> ChatMessage:
    image = ImageBlock(image=IMAGE, image_mimetype="image/png", **fields)
    return ChatMessage(role="user", blocks=[image, TextBlock(text=QUESTION)])


def whole():
    answer = chat.chat([ChatMessage(role="system", content="Be brief."), _asked()])
    return [answer.message.content, answer.raw.usage.completion_tokens > 0]


def detail_low_costs_less():
    low, high = (chat.chat([_asked(detail=detail)]).raw.usage.prompt_tokens for detail in ("low", "high"))
    return low < high / 2


def streamed():
    return [piece.message.content for piece in chat.stream_chat([_asked()])][-1]


def asynchronous():
    return asyncio.run(chat.achat([_asked()])).message.content


def structured_output():
    return chat.structured_predict(Card, ChatPromptTemplate([_asked()])).model_dump()


def structured_output_of_a_chat():
    return chat.as_structured_llm(Card).chat([_asked()]).raw.model_dump()


def complete_in_a_chat():
    return chat.complete(QUESTION).text


def completion_mode():
    plain = OpenAILike(**HERE, is_chat_model=False, max_tokens=4)
    pieces = list(plain.stream_complete("The number is"))
    return [plain.complete("The number is").text, pieces[-1].text]


def completion_mode_of_a_chat():
    plain = OpenAILike(**HERE, is_chat_model=False, max_tokens=4)
    return plain.chat([ChatMessage(role="user", content=QUESTION)]).message.content


if __name__ == "__main__":
    tell(*functions(__name__))
