"""A chat completion request as OpenAI's clients send it -> ChatRequest. What is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from focusllava.v1 import focus_pb2, image_pb2, llm_pb2
from services.gateway.openai import data_url
from services.gateway.openai.fields import WITHOUT_EFFECT, Accepted, Fields, Wrong, check_without_effect
from services.gateway.openai.settings import Count, Settings

_ROLES = {
    "system": llm_pb2.ROLE_SYSTEM,
    "developer": llm_pb2.ROLE_SYSTEM,
    "user": llm_pb2.ROLE_USER,
    "assistant": llm_pb2.ROLE_ASSISTANT,
}
_DETAILS = {
    "auto": image_pb2.IMAGE_DETAIL_UNSPECIFIED,
    "low": image_pb2.IMAGE_DETAIL_LOW,
    "high": image_pb2.IMAGE_DETAIL_HIGH,
    "original": image_pb2.IMAGE_DETAIL_HIGH,
}

_CHAT_WITHOUT_EFFECT: dict[str, Accepted] = {
    **WITHOUT_EFFECT,
    # Fields of OpenAI's.
    "audio": (),
    "function_call": ("none", "auto"),  # there are no functions to choose from
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": None,
    "prediction": None,  # a guess at the answer, to have it sooner
    "reasoning_effort": None,
    "tool_choice": ("none", "auto"),  # there are no tools to choose from
    "tools": ([],),
    "verbosity": None,
    "web_search_options": (),
    # Fields of vLLM's.
    "add_special_tokens": (False,),  # the chat template has them
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "include_reasoning": None,
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_prompt_text": (False,),
}


def _called_never(fields: Any) -> Any:
    """Drops tools that the request itself forbids to call. Others are refused before `tool_choice` is looked at."""
    if isinstance(fields, dict):
        for choice, tools in (("tool_choice", "tools"), ("function_call", "functions")):
            if fields.get(choice) == "none" and isinstance(fields.get(tools), list):
                fields = {**fields, tools: None}
            elif fields.get(tools) is not None:
                check_without_effect(tools, fields[tools], _CHAT_WITHOUT_EFFECT[tools])
    return fields


class ImageUrl(Fields):
    """An image in a data: URL, and how much of it is looked at: "low" is the whole image in one tile."""

    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"


class Part(Fields):
    """A piece of a message: words, or an image."""

    without_effect = {"annotations": None, "cache_control": None, "prompt_cache_breakpoint": None}

    type: Literal["text", "image_url", "refusal"]
    text: str | None = None
    image_url: Annotated[ImageUrl, BeforeValidator(lambda v: {"url": v} if isinstance(v, str) else v)] | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Part:
        others = [name for name in ("text", "image_url", "refusal") if name != self.type]
        if getattr(self, self.type) is None or any(getattr(self, name) is not None for name in others):
            raise ValueError(f"expected {self.type} and not {' or '.join(others)}, as its type says")
        return self


class Message(Fields):
    """A turn. A string as content is one text part."""

    without_effect = {
        "annotations": None,
        "audio": (),
        "cache_control": None,
        "function_call": (),
        "images": ([],),
        "name": None,
        "provider_specific_fields": None,
        "reasoning": None,  # an earlier answer's; no chat template of the served families shows it
        "reasoning_content": None,
        "reasoning_details": None,
        "thinking_blocks": ([],),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(fail_fast=True),
        BeforeValidator(lambda v: [{"type": "text", "text": v}] if isinstance(v, str) else v),
    ] = []
    refusal: str | None = None
    """What an assistant said in place of content."""

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if not self.content:
            if self.role != "assistant":
                raise Wrong("content", "is empty" if "content" in self.model_fields_set else "is missing")
            self.content = [Part(type="text", text=self.refusal or "")]
        return self


class FocusOptions(Fields):
    """What OpenAI has no field for: the samplers, and how images are read, for this request."""

    vision_sampler: bool = True
    text_sampler: bool = True
    threshold: float | None = None
    """gamma of Eq. 9, in (0, 1]; unset, with no keep_ratio: the checkpoint's."""
    keep_ratio: float | None = None
    """Share of the visual tokens that layers from the prune layer on see, in (0, 1]."""
    reduced_jpeg: bool | None = None
    """Whether large JPEGs may be decoded at reduced scale; unset: the checkpoint's."""
    map_share: float | None = None
    """The largest share of a feature map's tokens that the vision-guided sampler leaves, in (0, 1]; unset: its own."""

    return_map: bool = False
    """What both samplers chose of each image comes with the answer."""

    def prune(self) -> llm_pb2.PruneParams:
        """The text-guided sampler's part."""
        named = {name: getattr(self, name, None) for name in llm_pb2.PruneParams.DESCRIPTOR.fields_by_name}
        return llm_pb2.PruneParams(**{**named, "off": not self.text_sampler})


class ChatCompletionRequest(Settings):
    """The body of POST /v1/chat/completions."""

    without_effect = _CHAT_WITHOUT_EFFECT

    messages: Annotated[list[Message], Field(fail_fast=True)]
    focus: FocusOptions = FocusOptions()
    max_completion_tokens: Count | None = None
    """The newer name of max_tokens; where both are set, this one wins."""
    logprobs: bool = False
    top_logprobs: Count | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    """The opposite of continue_final_message, if it says anything."""

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, fields: Any) -> Any:
        return _called_never(fields)

    @model_validator(mode="after")
    def _agree(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise Wrong("top_logprobs", f"is {self.top_logprobs}, expected with logprobs true only")
        if self.add_generation_prompt == self.continue_final_message:
            raise Wrong(
                "add_generation_prompt",
                f"is {self.add_generation_prompt}, as continue_final_message is; expected one of them",
            )
        return self

    def names_here(self) -> tuple[tuple[str, str], ...]:
        max_tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return (
            (r"^turns\b", "messages"),
            (r"^(messages\[\d+\])\.parts\b", r"\1.content"),
            (r"^(messages\[\d+\]\.content\[\d+\])\.image\b", r"\1.image_url.url"),
            (r"^sampling\.logprobs\b", "top_logprobs"),
            (r"^sampling\.max_tokens\b", max_tokens),
            (r"^prune\.", "focus."),
            (r"^messages\[\d+\]\.content\[\d+\]\.image_options\.", "focus."),
        )

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs

    def to_chat_requests(self, request_id: str) -> list[focus_pb2.ChatRequest]:
        """A list of one request. Raises InvalidInput for an image that is not in the request."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        chat = focus_pb2.ChatRequest(
            turns=[self._turn(message, f"messages[{number}]") for number, message in enumerate(self.messages)],
            sampling=self.sampling(max_tokens, logprobs),
            prune=self.focus.prune(),
            vision_sampler_off=not self.focus.vision_sampler,
            request_id=request_id,
            continue_final_message=self.continue_final_message,
            return_map=self.focus.return_map,
        )
        return [chat]

    def _turn(self, message: Message, where: str) -> focus_pb2.ChatTurn:
        parts = []
        for number, part in enumerate(message.content):
            if part.image_url is None:
                parts.append(focus_pb2.ChatPart(text=part.text if part.refusal is None else part.refusal))
                continue
            image = data_url.decode(part.image_url.url, f"{where}.content[{number}].image_url.url")
            options = image_pb2.ImageOptions(
                detail=_DETAILS[part.image_url.detail],
                reduced_jpeg=self.focus.reduced_jpeg,
                map_share=self.focus.map_share,
            )
            parts.append(focus_pb2.ChatPart(image=image, image_options=options))
        return focus_pb2.ChatTurn(role=_ROLES[message.role], parts=parts)
