"""A chat completion request as OpenAI's clients send it -> ChatRequest. What is not supported is refused by name."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from focusllava.v1 import focus_pb2, llm_pb2
from services.common.errors import InvalidInput, TooLarge

_UINT32, _UINT64 = 2**32 - 1, 2**64 - 1
_ROLES = {
    "system": llm_pb2.ROLE_SYSTEM,
    "developer": llm_pb2.ROLE_SYSTEM,
    "user": llm_pb2.ROLE_USER,
    "assistant": llm_pb2.ROLE_ASSISTANT,
}
_MOST_FIELDS = 10_000
"""And elements of a body, beside the commas and brackets of its text."""
_DECODED_CHARS = 2**20
"""Of base64 at once: others may run between two pieces. A multiple of 4."""
_SHOWN_CHARS = 60
"""Of a refused value, which may be an image."""
_HERE = (
    (re.compile(r"^turns\b"), "messages"),
    (re.compile(r"^(messages\[\d+\])\.parts\b"), r"\1.content"),
    (re.compile(r"^(messages\[\d+\]\.content\[\d+\])\.image\b"), r"\1.image_url.url"),
    (re.compile(r"^sampling\.logprobs\b"), "top_logprobs"),
    (re.compile(r"^sampling\."), ""),
    (re.compile(r"^prune\."), "focus."),
    (re.compile(r"^request_id\b"), "x-request-id"),
)
"""Fields of a ChatRequest, at the start of an error's line, by their names here."""

Count = Annotated[int, Field(ge=0, le=_UINT32)]


class _Unknown(ValueError):
    """A field that there is none of."""


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_and_set(cls, fields: Any) -> Any:
        """Without nulls, which say nothing. Raises for the first unknown field alone: there may be thousands."""
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given:
            if name not in cls.model_fields:
                raise _Unknown(name)
        return given


class ImageUrl(_Fields):
    url: str
    detail: Literal["auto", "high"] = "auto"


class Part(_Fields):
    """A piece of a message: words, or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Part:
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"expected {self.type} and not {other}, as its type says")
        return self


class Message(_Fields):
    """A turn. A string as content is one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(fail_fast=True),
        BeforeValidator(lambda v: [{"type": "text", "text": v}] if isinstance(v, str) else v),
    ]


class StreamOptions(_Fields):
    include_usage: bool = False


class TextFormat(_Fields):
    type: Literal["text"]


class FocusOptions(_Fields):
    """What OpenAI has no field for: the samplers, for this request."""

    vision_sampler: bool = True
    text_sampler: bool = True
    threshold: float | None = None
    """gamma of Eq. 9, in (0, 1]; unset, with no keep_ratio: the checkpoint's."""
    keep_ratio: float | None = None
    """Share of the visual tokens that layers from the prune layer on see, in (0, 1]."""


class ChatCompletionRequest(_Fields):
    """The body of POST /v1/chat/completions. Unset settings are the gRPC API's: greedy, 256 tokens."""

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True)]
    focus: FocusOptions = FocusOptions()

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Field(ge=0, le=_UINT64)] | None = None
    stop: Annotated[list[str], Field(fail_fast=True), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = []
    logprobs: bool = False
    top_logprobs: Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    # vLLM's, beside OpenAI's.
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False

    # With one value that means what is done anyway, or none that changes the answer.
    n: Literal[1] = 1
    response_format: TextFormat | None = None
    store: Literal[False] = False
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None  # not looked at, and so no error for each of its thousands

    @model_validator(mode="after")
    def _agree(self) -> ChatCompletionRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(f"max_tokens is {self.max_tokens}, max_completion_tokens {self.max_completion_tokens}")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, expected with logprobs true only")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options expects stream true")
        return self


def parse(body: bytes, max_text_chars: int) -> ChatCompletionRequest:
    """Raises InvalidInput: what is wrong, with which field and value; TooLarge for more fields than such text needs."""
    # Each becomes an object or an error, under the interpreter's lock: a small body of them would stop the replica.
    fields = body.count(b",") + body.count(b"[") + body.count(b"{")
    if fields > max_text_chars + _MOST_FIELDS:
        raise TooLarge(f"has {fields} commas and brackets, the limit is {max_text_chars + _MOST_FIELDS}", field="body")
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        _refuse(error)


def to_chat_request(asked: ChatCompletionRequest, request_id: str) -> focus_pb2.ChatRequest:
    """The same request as the gRPC API takes it. Raises InvalidInput for an image that is not in the request."""
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    max_tokens = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
    return focus_pb2.ChatRequest(
        turns=[_turn(message, f"messages[{number}]") for number, message in enumerate(asked.messages)],
        sampling=llm_pb2.SamplingParams(
            max_tokens=max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=asked.stop,
            ignore_eos=asked.ignore_eos,
            top_k=asked.top_k,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logprobs=logprobs,
        ),
        prune=llm_pb2.PruneParams(
            off=not asked.focus.text_sampler, threshold=asked.focus.threshold, keep_ratio=asked.focus.keep_ratio
        ),
        vision_sampler_off=not asked.focus.vision_sampler,
        request_id=request_id,
    )


def named_here(line: str) -> str:
    """An error's line about a ChatRequest with the field's name in this API."""
    for pattern, name in _HERE:
        line = pattern.sub(name, line)
    return line


def field_of(line: str) -> str | None:
    """The field that an error's line begins with."""
    found = re.match(r"([a-zA-Z_][\w-]*(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)*): ", line)
    return found[1] if found else None


def _turn(message: Message, where: str) -> focus_pb2.ChatTurn:
    parts = []
    for number, part in enumerate(message.content):
        if part.image_url:
            image = _image(part.image_url.url, f"{where}.content[{number}].image_url.url")
            parts.append(focus_pb2.ChatPart(image=image))
        else:
            parts.append(focus_pb2.ChatPart(text=part.text))
    return focus_pb2.ChatTurn(role=_ROLES[message.role], parts=parts)


def _image(url: str, field: str) -> bytes:
    head, comma, data = url.partition(",")
    # To fetch what a stranger names would let them reach whatever this machine reaches.
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        expected = "expected data:image/...;base64,... (nothing is fetched: send the file itself)"
        raise InvalidInput(f"is {url[:_SHOWN_CHARS]!r}, {expected}", field=field)
    try:
        if 0 <= data.find("=") < len(data) - 2:
            raise ValueError("padding stands at its end only")
        pieces = (data[start : start + _DECODED_CHARS] for start in range(0, len(data), _DECODED_CHARS))
        return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"is not base64: {error}", field=field) from None


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    kind, message, value = first["type"], first["msg"], first.get("input")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _Unknown):
        where, message = f"{where}.{_shown(cause)}".removeprefix("."), "is not supported"
    elif kind == "missing":
        message = "is missing"
    elif kind == "value_error":
        message = str(cause)
    elif kind == "json_invalid":
        where, message = "body", message[0].lower() + message[1:]
    else:
        message = f"is {_shown(repr(value))}, " + re.sub(r"^Input should be ", "expected ", message)
    raise InvalidInput(message, field=where or "body")


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
