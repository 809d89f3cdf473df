"""Questions to protobuf, and events back."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from focusllava.errors import FocusClientError
from focusllava.focus_maps import FocusMaps, focus_maps
from focusllava.messages import (
    Answer,
    ImageFile,
    ImageInfo,
    ModelInfo,
    Settings,
    TokenLogprob,
    TokenLogprobs,
    Turn,
    Usage,
    check_size,
)
from focusllava.v1 import focus_pb2, image_pb2, llm_pb2

_ROLES = {
    "system": llm_pb2.ROLE_SYSTEM,
    "user": llm_pb2.ROLE_USER,
    "assistant": llm_pb2.ROLE_ASSISTANT,
}
_DETAILS = {
    None: image_pb2.IMAGE_DETAIL_UNSPECIFIED,
    "auto": image_pb2.IMAGE_DETAIL_UNSPECIFIED,
    "low": image_pb2.IMAGE_DETAIL_LOW,
    "high": image_pb2.IMAGE_DETAIL_HIGH,
}
_FINISH_REASONS = {
    llm_pb2.FINISH_REASON_STOP: "stop",
    llm_pb2.FINISH_REASON_LENGTH: "length",
    llm_pb2.FINISH_REASON_ABORT: "abort",
}
_EXPECTED = {
    FieldDescriptor.CPPTYPE_UINT32: f"a whole number from 0 to {2**32 - 1}",
    FieldDescriptor.CPPTYPE_UINT64: f"a whole number from 0 to {2**64 - 1}",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_STRING: "text",
}
_EXPECTED_OF = {
    "stop": "text, or several in a list",
    "stop_token_ids": "a list of token ids",
    "logit_bias": "a mapping from token ids to numbers",
    "seed": f"a whole number from {-(2**63)} to {2**64 - 1}",
}


def build_request(turns: Sequence[Turn], **settings: Unpack[Settings]) -> focus_pb2.ChatRequest:
    """The request on the wire.

    Only what the wire cannot carry is refused here (INVALID_ARGUMENT, RESOURCE_EXHAUSTED); the server judges the rest.
    """
    known = Settings.__optional_keys__
    if unknown := settings.keys() - known:
        raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    files = [part.data if isinstance(part, ImageFile) else part for turn in turns for part in turn.parts]
    check_size(sum(len(file) for file in files if isinstance(file, bytes)), "images, together")
    request = focus_pb2.ChatRequest(
        turns=[_turn(turn, f"turns[{number}]") for number, turn in enumerate(turns)],
        sampling=llm_pb2.SamplingParams(),
        prune=llm_pb2.PruneParams(off=_is_off(settings.get("text_sampler"))),
        vision_sampler_off=_is_off(settings.get("vision_sampler")),
    )
    for name, value in settings.items():
        for message in (request.sampling, request.prune, request):
            if value is not None and name in message.DESCRIPTOR.fields_by_name:
                _set(message, name, value)
    _set_constraint(request.sampling, settings)
    return request


def _set_constraint(sampling: llm_pb2.SamplingParams, settings: Settings) -> None:
    fields = llm_pb2.Constraint.DESCRIPTOR.fields_by_name
    given = {name: value for name, value in settings.items() if name in fields and value not in (None, False)}
    if len(given) > 1:
        raise FocusClientError("INVALID_ARGUMENT", f"{', '.join(given)}: expected one of them at most")
    for name, value in given.items():
        try:
            if name == "choice":
                if isinstance(value, str):
                    raise TypeError
                sampling.constraint.choice.texts.extend(value)  # type: ignore[arg-type]
                sampling.constraint.choice.SetInParent()
            else:
                text = json.dumps(value) if isinstance(value, Mapping) and name == "json_schema" else value
                setattr(sampling.constraint, name, text)
        except (ValueError, TypeError):
            expected = {"choice": "a list of texts", "json_schema": "a mapping or JSON text", "json_object": "True"}
            raise FocusClientError(
                "INVALID_ARGUMENT", f"{name}: is {reprlib.repr(value)}, expected {expected.get(name, 'text')}"
            ) from None


def _turn(turn: Turn, name: str) -> focus_pb2.ChatTurn:
    if turn.role not in _ROLES:
        raise FocusClientError("INVALID_ARGUMENT", f"{name}.role: is {turn.role!r}, expected {', '.join(_ROLES)}")
    parts = [_part(part, f"{name}.parts[{number}]") for number, part in enumerate(turn.parts)]
    return focus_pb2.ChatTurn(role=_ROLES[turn.role], parts=parts)


def _part(part: str | bytes | ImageFile, name: str) -> focus_pb2.ChatPart:
    try:
        if isinstance(part, ImageFile):
            return focus_pb2.ChatPart(image=part.data, image_options=_image_options(part, name))
        if isinstance(part, bytes):
            return focus_pb2.ChatPart(image=part)
        if isinstance(part, str):
            return focus_pb2.ChatPart(text=part)
    except UnicodeEncodeError:  # half a character, as a terminal that is not UTF-8 makes them
        pass
    raise FocusClientError("INVALID_ARGUMENT", f"{name}: is {reprlib.repr(part)}, expected text or bytes of an image")


def _image_options(file: ImageFile, name: str) -> image_pb2.ImageOptions:
    if file.detail not in _DETAILS:
        raise FocusClientError("INVALID_ARGUMENT", f"{name}.detail: is {file.detail!r}, expected low, high or auto")
    options = image_pb2.ImageOptions(detail=_DETAILS[file.detail])
    for option in ("reduced_jpeg", "map_share"):
        if (value := getattr(file, option)) is not None:
            _set(options, option, value)
    return options


def _is_off(sampler: bool | None) -> bool:
    return sampler is not None and not sampler


def _set(message: Message, name: str, value: object) -> None:
    """One field at a time, because protobuf's own errors name neither the field nor, often, the value."""
    try:
        if name == "stop":
            message.stop.extend([value] if isinstance(value, str) else value)  # type: ignore[attr-defined]
        elif name == "stop_token_ids":
            message.stop_token_ids.extend(value)  # type: ignore[attr-defined]
        elif name == "logit_bias":
            message.logit_bias.update(value)  # type: ignore[attr-defined]
        elif name == "seed" and isinstance(value, int) and -(2**63) <= value < 0:
            message.seed = value + 2**64  # type: ignore[attr-defined]
        else:
            setattr(message, name, value)
    except (ValueError, TypeError, AttributeError):
        field = message.DESCRIPTOR.fields_by_name[name]
        expected = _EXPECTED_OF.get(name) or _EXPECTED[field.cpp_type]
        raise FocusClientError("INVALID_ARGUMENT", f"{name}: is {value!r}, expected {expected}") from None


class AnswerState:
    """What a stream has brought so far: both clients feed it every event."""

    def __init__(self) -> None:
        self.request_id = ""
        self.text = ""
        self.images: tuple[ImageInfo, ...] = ()
        self.finish_reason = ""
        self.usage: Usage | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.focus: FocusMaps | None = None
        """What both samplers chose, from soon after the first token on; None for who did not ask."""

    def take(self, event: focus_pb2.ChatResponse) -> str:
        """The event's new text, which may be empty. Raises FocusClientError on an error event."""
        kind = event.WhichOneof("event")
        if kind == "token":
            self.logprobs += map(_logprobs, event.token.logprobs)
            return self.extend(event.token.text, event.token.token_ids)
        if kind == "started":
            self.request_id = event.started.request_id
            self.images = tuple(_image_info(image) for image in event.started.images)
        elif kind == "focus_maps":
            self.focus = focus_maps(event.focus_maps)
        elif kind == "finished":
            self.finish_reason = _FINISH_REASONS.get(event.finished.reason, "unspecified")
            self.usage = _usage(event.finished.usage)
        elif kind == "error":
            raise FocusClientError(event.error.code or "INTERNAL", event.error.message)
        return ""

    def extend(self, text: str, token_ids: Iterable[int]) -> str:
        """Adds to the answer, and gives the text back."""
        self.text += text
        self.token_ids += token_ids
        return text

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
            focus=self.focus,
            token_ids=tuple(self.token_ids),
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
        return TokenLogprob(token_id=token.token_id, text=token.text, logprob=token.logprob, raw_bytes=token.raw_bytes)

    return TokenLogprobs(chosen=entry(message.chosen), top=tuple(map(entry, message.top)))


def _usage(usage: llm_pb2.Usage) -> Usage:
    return Usage(**{field: getattr(usage, field) for field in Usage.__dataclass_fields__})


def model_info(response: focus_pb2.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(**{field: getattr(response, field) for field in ModelInfo.__dataclass_fields__})
