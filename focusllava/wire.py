"""Questions to protobuf, and events back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from focusllava.errors import FocusClientError
from focusllava.messages import Answer, ImageInfo, ModelInfo, Settings, TokenLogprob, TokenLogprobs, Turn, Usage
from focusllava.v1 import focus_pb2, llm_pb2

_ROLES = {
    "system": llm_pb2.ROLE_SYSTEM,
    "user": llm_pb2.ROLE_USER,
    "assistant": llm_pb2.ROLE_ASSISTANT,
}
_FINISH_REASONS = {
    llm_pb2.FINISH_REASON_STOP: "stop",
    llm_pb2.FINISH_REASON_LENGTH: "length",
    llm_pb2.FINISH_REASON_ABORT: "abort",
}
_SAMPLING = llm_pb2.SamplingParams.DESCRIPTOR.fields_by_name.keys()


def build_request(turns: Sequence[Turn], **settings: Unpack[Settings]) -> focus_pb2.ChatRequest:
    """The request on the wire.

    Only what the wire cannot carry is refused here (INVALID_ARGUMENT); the server judges the rest.
    """
    if unknown := settings.keys() - Settings.__annotations__.keys():
        raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}; known: {', '.join(Settings.__annotations__)}")
    for turn in turns:
        if turn.role not in _ROLES:
            raise FocusClientError("INVALID_ARGUMENT", f"turns.role: is {turn.role!r}, expected {', '.join(_ROLES)}")
    sampling: dict[str, Any] = {name: value for name, value in settings.items() if name in _SAMPLING}
    try:
        return focus_pb2.ChatRequest(
            turns=[
                focus_pb2.ChatTurn(
                    role=_ROLES[turn.role],
                    parts=[
                        focus_pb2.ChatPart(image=part) if isinstance(part, bytes) else focus_pb2.ChatPart(text=part)
                        for part in turn.parts
                    ],
                )
                for turn in turns
            ],
            sampling=llm_pb2.SamplingParams(**sampling),
            prune=llm_pb2.PruneParams(
                off=not settings.get("text_sampler", True),
                threshold=settings.get("threshold"),
                keep_ratio=settings.get("keep_ratio"),
            ),
            vision_sampler_off=not settings.get("vision_sampler", True),
            request_id=settings.get("request_id", ""),
        )
    except (ValueError, TypeError) as error:  # a negative seed, a number where words belong
        raise FocusClientError("INVALID_ARGUMENT", str(error)) from None


class AnswerState:
    """What a stream has brought so far: both clients feed it every event."""

    def __init__(self) -> None:
        self.request_id = ""
        self.text = ""
        self.images: tuple[ImageInfo, ...] = ()
        self.finish_reason = ""
        self.usage: Usage | None = None
        self.logprobs: list[TokenLogprobs] = []

    def take(self, event: focus_pb2.ChatResponse) -> str:
        """The event's new text, which may be empty. Raises FocusClientError on an error event."""
        kind = event.WhichOneof("event")
        if kind == "token":
            self.text += event.token.text
            self.logprobs += map(_logprobs, event.token.logprobs)
            return event.token.text
        if kind == "started":
            self.request_id = event.started.request_id
            self.images = tuple(_image_info(image) for image in event.started.images)
        elif kind == "finished":
            self.finish_reason = _FINISH_REASONS.get(event.finished.reason, "unspecified")
            self.usage = _usage(event.finished.usage)
        elif kind == "error":
            raise FocusClientError(event.error.code or "INTERNAL", event.error.message)
        return ""

    def answer(self) -> Answer:
        """The whole answer. Raises FocusClientError (INTERNAL) where the stream broke off."""
        if self.usage is None:
            raise FocusClientError("INTERNAL", "the stream broke off before its finished event")
        return Answer(
            text=self.text,
            finish_reason=self.finish_reason,
            images=self.images,
            usage=self.usage,
            request_id=self.request_id,
            logprobs=tuple(self.logprobs),
        )


def _image_info(image: focus_pb2.ImageInfo) -> ImageInfo:
    return ImageInfo(
        content_hash=image.content_hash,
        cached=image.cached,
        visual_tokens_uncompressed=image.visual_tokens_uncompressed,
        visual_tokens_sampled=image.visual_tokens_sampled,
        notes=tuple(image.notes),
    )


def _logprobs(message: llm_pb2.TokenLogprobs) -> TokenLogprobs:
    def entry(token: llm_pb2.TokenLogprob) -> TokenLogprob:
        return TokenLogprob(token_id=token.token_id, text=token.text, logprob=token.logprob)

    return TokenLogprobs(chosen=entry(message.chosen), top=tuple(map(entry, message.top)))


def _usage(usage: llm_pb2.Usage) -> Usage:
    return Usage(**{field: getattr(usage, field) for field in Usage.__dataclass_fields__})


def model_info(response: focus_pb2.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(**{field: getattr(response, field) for field in ModelInfo.__dataclass_fields__})
