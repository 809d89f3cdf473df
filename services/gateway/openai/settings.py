"""Settings that chat and text completions share -> SamplingParams."""

from __future__ import annotations

import abc
import re
import time
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError

from focusllava.v1 import focus_pb2, llm_pb2
from services.common.call_metadata import REQUEST_ID_HEADER
from services.common.errors import TooLarge
from services.gateway.openai.constraint import Constrained
from services.gateway.openai.fields import WITHOUT_EFFECT, Fields, refuse, shown

_UINT32 = 2**32 - 1
_MOST_BIAS = 1e30
"""A bias that a float32 still holds; the range of the setting is checked after this."""
_MOST_FIELDS = 10_000
"""Most fields and elements of a body, beside the commas and brackets of its text."""

Count = Annotated[int, Field(ge=0, le=_UINT32)]


def _seed(value: Any) -> Any:
    """A seed as 64 bits without a sign: clients draw it with a sign and without."""
    return value % 2**64 if type(value) is int and -(2**63) <= value < 0 else value


def _bias(value: Any) -> Any:
    """Biases by token id, which JSON can only write as a string."""
    if not isinstance(value, dict):
        return value
    for name, bias in value.items():  # the first wrong one alone: there may be thousands
        if not (name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) <= _UINT32):
            raise ValueError(f"has the key {shown(repr(name))}, expected token ids")
        if type(bias) not in (int, float) or not -_MOST_BIAS < bias < _MOST_BIAS:
            raise ValueError(f"is {shown(repr(bias))} for token {name}, expected a number")
    return {int(name): bias for name, bias in value.items()}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How an answer is to be written: what is kept of a request when its body, up to 80 MB, is dropped."""

    stream: bool
    usage: bool
    """A stream has the usage at its end."""
    continuous_usage: bool
    """A stream has the usage in every piece."""
    logprobs: bool
    request_id: str
    created: int
    """The time of the request, in seconds since 1970."""
    names: tuple[tuple[str, str], ...]
    """Patterns of a ChatRequest's fields, at the start of an error's line, and their names in the request."""

    def renamed(self, line: str) -> str:
        """An error's line about a ChatRequest with the field's name in the request."""
        for pattern, name in self.names:
            line = re.sub(pattern, name, line)
        return line


class StreamOptions(Fields):
    """What a stream holds beside the text. Without a stream it says nothing: a whole answer has its usage."""

    without_effect = {"include_obfuscation": None}
    include_usage: bool = False
    """The usage comes at the end."""
    continuous_usage_stats: bool = False
    """The usage comes in every piece: a field of vLLM's."""


class Settings(Constrained):
    """What every request for an answer may set. Unset settings are the gRPC API's: greedy, 256 tokens."""

    without_effect = WITHOUT_EFFECT

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    request_id: str | None = None
    """vLLM's field, which goes before the header x-request-id."""

    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_seed)] | None = None
    stop: Annotated[list[str], Field(fail_fast=True), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = []
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] = {}

    # Fields of vLLM's that OpenAI has not.
    top_k: Annotated[Count, BeforeValidator(lambda v: 0 if v == -1 else v)] | None = None
    min_p: float | None = None
    min_tokens: Count | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[Count], Field(fail_fast=True)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    @classmethod
    def parse(cls, body: bytes, max_text_chars: int) -> Self:
        """Raises InvalidInput for what is wrong, with field and value; TooLarge for more fields than text needs."""
        # Each becomes an object or an error, under the interpreter's lock: a small body of them would stop the replica.
        fields, limit = body.count(b",") + body.count(b"[") + body.count(b"{"), max_text_chars + _MOST_FIELDS
        if fields > limit:
            raise TooLarge(f"has {fields} commas and brackets, the limit is {limit}", field="body")
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            refuse(error)

    @abc.abstractmethod
    def to_chat_requests(self, request_id: str) -> list[focus_pb2.ChatRequest]:
        """The gRPC API's requests, one an answer. Raises InvalidInput for what only shows as they are made."""

    def asked(self, request_id: str) -> Asked:
        """How the answer is to be written. Raises InvalidInput for more than one constraint."""
        constraint, _ = self.constraint()
        return Asked(
            stream=self.stream,
            usage=self.stream_options.include_usage,
            continuous_usage=self.stream_options.continuous_usage_stats,
            logprobs=self.with_logprobs,
            request_id=request_id,
            created=int(time.time()),
            names=(
                *self.names_here(),
                (r"^sampling\.constraint(\.\w+)?", constraint),
                (r"^sampling\.", ""),
                (r"^request_id\b", "request_id" if self.request_id else REQUEST_ID_HEADER),
            ),
        )

    @abc.abstractmethod
    def names_here(self) -> tuple[tuple[str, str], ...]:
        """Pairs as in Asked.names, for the fields that this kind of request has its own names for."""

    @property
    @abc.abstractmethod
    def with_logprobs(self) -> bool:
        """Whether the answer is to have log probabilities."""

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> llm_pb2.SamplingParams:
        """The gRPC API's settings: the fields that bear its names, and the rest by hand.

        Raises InvalidInput for more than one constraint.
        """
        known = llm_pb2.SamplingParams.DESCRIPTOR.fields_by_name
        fields = {name: getattr(self, name) for name in known if name in type(self).model_fields}
        fields |= {"max_tokens": max_tokens, "logprobs": logprobs, "constraint": self.constraint()[1]}
        return llm_pb2.SamplingParams(**fields, keep_special_tokens=not self.skip_special_tokens)
